"""One door to media of both kinds: what a file is, and the clip that the model sees of it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from PIL import Image

from utils.data.buckets import Bucket, MediaRules
from utils.data.images import image_suffixes, load_image
from utils.data.videos import VIDEO_SUFFIXES, pictures_at, probe_video
from utils.errors import UserError

if TYPE_CHECKING:
    import torch

MediaKind = Literal["image", "video"]

# Raise whenever `load_frames` and `scale_frames` give other pixels for the same file, bucket and start: it is part of the cache key.
PREPROCESSING_VERSION = 1

# Containers round times to 1 ms or finer, so a length (the sum of two rounded times) may be this much too long.
_LENGTH_ROUNDING_SECONDS = 0.002


@dataclass(frozen=True)
class MediaInfo:
    """What is in a media file.

    Attributes:
        kind: image or video.
        width, height: as displayed, in px (EXIF orientation, rotation and pixel shape applied).
        num_frames: frames in the file; 1 for an image.
        fps: average frames per second in the file; 0 for an image.
        seconds: from the appearance of the first frame to the end of the last one; 0 for an image.
        start_seconds: the file's own time of the first frame, from which everything else counts.
    """

    kind: MediaKind
    width: int
    height: int
    num_frames: int = 1
    fps: float = 0.0
    seconds: float = 0.0
    start_seconds: float = 0.0


class ClipSource(Protocol):
    """What `load_frames` needs to know of a sample (`manifest.SampleRecord` has it)."""

    @property
    def path(self) -> Path: ...  # noqa: D102

    @property
    def bucket(self) -> Bucket: ...  # noqa: D102

    @property
    def clip_start_seconds(self) -> float: ...  # noqa: D102

    @property
    def info(self) -> MediaInfo: ...  # noqa: D102


def media_kind(path: Path) -> MediaKind | None:
    """Image or video by the file name's ending, None for anything else."""
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return "video"
    return "image" if suffix in image_suffixes() else None


def probe_media(path: Path) -> MediaInfo:
    """What is in a media file. Images are decoded whole; of videos the first frame, and all packet headers are read.

    Raises:
        UserError: not an image or video, empty, damaged, cut off, animated, or more pixels than Pillow's
            `MAX_IMAGE_PIXELS`. The message names the file and the reason.
    """
    if media_kind(path) == "video":
        facts = probe_video(path)
        return MediaInfo(
            kind="video",
            width=facts.width,
            height=facts.height,
            num_frames=facts.num_frames,
            fps=facts.num_frames / facts.seconds,
            seconds=facts.seconds,
            start_seconds=facts.start_seconds,
        )
    width, height = load_image(path).size
    return MediaInfo(kind="image", width=width, height=height)


def frames_available(info: MediaInfo, fps: float) -> int:
    """How many frames a medium has at `fps`: frame i exists if it is shown (at i / fps seconds) before the end."""
    if info.kind == "image":
        return 1
    return max(1, math.ceil((info.seconds - _LENGTH_ROUNDING_SECONDS) * fps))


def load_frames(record: ClipSource, rules: MediaRules) -> np.ndarray:
    """The clip's frames, scaled and cropped to the bucket: uint8 [F, H, W, C], C = 3. Needs no torch.

    Output frame i shows the source at `clip_start_seconds + i / rules.fps`, so motion keeps its speed whatever the
    frame rate of the file. Each frame is scaled to cover the bucket with its aspect ratio kept (Lanczos), then
    cropped at the centre, in one resampling.

    Raises:
        UserError: the file cannot be decoded as far as the clip reaches. The message names it.
    """
    try:
        record.path.stat()
    except OSError as error:
        raise UserError(
            f"{record.path}: not readable any more ({error.strerror}); run the same command again"
        ) from error
    bucket = record.bucket
    frames_FHWC = np.empty((bucket.num_frames, bucket.height, bucket.width, 3), dtype=np.uint8)
    if record.info.kind == "image":
        frames_FHWC[:] = fit_to_bucket(load_image(record.path), 1.0, bucket)
    else:
        times = [record.clip_start_seconds + index / rules.fps for index in range(bucket.num_frames)]
        index = 0
        for picture, count in pictures_at(record.path, times, record.info.start_seconds):
            frames_FHWC[index : index + count] = fit_to_bucket(picture.image, picture.pixel_aspect, bucket)
            index += count
    return frames_FHWC


def scale_frames(frames_FHWC: np.ndarray) -> "torch.Tensor":
    """Frames of `load_frames` as the model sees them: `video_CFHW`, float32 in [-1, 1]."""
    import torch

    video_CFHW = (
        torch.from_numpy(frames_FHWC)
        .permute(3, 0, 1, 2)
        .to(torch.float32, memory_format=torch.contiguous_format)
    )
    return video_CFHW.div_(127.5).sub_(1.0)


def load_clip(record: ClipSource, rules: MediaRules) -> "torch.Tensor":
    """The clip that the model sees: `video_CFHW`, float32 in [-1, 1], C = 3, of exactly the bucket's size.

    Raises:
        UserError: as `load_frames`.
    """
    return scale_frames(load_frames(record, rules))


def fit_to_bucket(
    image: Image.Image,
    pixel_aspect: float,
    bucket: Bucket,
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
) -> np.ndarray:
    """Scale to cover the bucket and crop at the centre.

    Args:
        image: RGB or grey, upright.
        pixel_aspect: width / height of one of its pixels.
        bucket: the size to reach.
        resampling: how to scale.

    Returns:
        uint8 [H, W, C] of the bucket's size; [H, W] of a grey image.
    """
    width, height = image.size
    scale = max(bucket.width / (width * pixel_aspect), bucket.height / height)
    crop_width = min(width, bucket.width / (scale * pixel_aspect))
    crop_height = min(height, bucket.height / scale)
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    box = (left, top, left + crop_width, top + crop_height)
    return np.asarray(image.resize((bucket.width, bucket.height), resampling, box=box))
