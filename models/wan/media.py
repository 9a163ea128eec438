"""What media are to a Wan 2.2 variant: the rules of clips, which files count, tokens of a clip. No torch."""

from dataclasses import replace

from models.wan.arch import VariantInfo
from utils.data.buckets import Bucket, MediaRules
from utils.data.manifest import Manifest, SkippedFile
from utils.errors import UserError

# In a dataset's cache: what is known of its files.
MEMO_FILE = "content_hashes.jsonl"


def media_rules(variant: VariantInfo) -> MediaRules:
    """What clips must look like for this variant."""
    return MediaRules(
        fps=variant.fps,
        pixel_multiple=variant.pixel_multiple,
        frame_quantum=variant.vae_stride[0],
        latent_stride=variant.vae_stride[1],
    )


def video_tokens(variant: VariantInfo, bucket: Bucket) -> int:
    """Tokens of one clip of this bucket in the DiT."""
    frames, multiple = variant.latent_frames(bucket.num_frames), variant.pixel_multiple
    return frames * (bucket.width // multiple) * (bucket.height // multiple)


def time_rows(variant: VariantInfo, bucket: Bucket, first_frame_prob: float) -> int:
    """Timesteps that the DiT is told of one clip: one, or one per latent frame where its first frame may be clean."""
    return variant.latent_frames(bucket.num_frames) if first_frame_prob > 0 else 1


def without_images(manifest: Manifest, *, allow_empty: bool = False) -> Manifest:
    """Leave images out: to an image-to-video model an image shows its first frame, which is all of the answer.

    Raises:
        UserError: nothing is left, unless `allow_empty`.
    """
    videos = tuple(sample for sample in manifest.samples if sample.kind == "video")
    reason = "is an image, and an image-to-video model learns from videos only"
    images = tuple(
        SkippedFile(sample.path, reason, "no_bucket") for sample in manifest.samples if sample.kind == "image"
    )
    if not videos and not allow_empty:
        raise UserError(f"the dataset has no video among its {len(images)} usable files: each {reason}")
    return replace(manifest, samples=videos, skipped=manifest.skipped + images)
