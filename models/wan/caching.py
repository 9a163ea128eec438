"""What is encoded once and kept: latents by the VAE, caption states by UMT5; and reading both back.

An item's key names everything that made it (content, preprocessing, weights), so nothing stale is ever read. The
encoders live only while the cache fills.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from models.wan.arch import VariantInfo
from models.wan.checkpoint import CheckpointPaths
from models.wan.layouts import weight_files
from models.wan.media import media_rules
from models.wan.text_encoder import MAX_TEXT_TOKENS, TextEncoder, WanTokenizer
from models.wan.tokenizer_place import read_spiece
from models.wan.vae import WanVae, load_vae
from utils.config.schema import ModelConfig, TrainConfig
from utils.data.cache import CacheStore
from utils.data.cache_keys import LATENTS, TEXT, latent_parts, make_key, text_parts
from utils.data.decode import ClipJob, automatic_workers, decoded_clips
from utils.data.fill import Encode, FillItem, FillStats, Load, fill_cache
from utils.data.manifest import Manifest, SampleRecord
from utils.data.media import scale_frames
from utils.data.memo import HashMemo
from utils.data.reasons import MadeOf, Want, caption_identity
from utils.distributed import Processes
from utils.errors import UserError
from utils.files import content_hash

OnProgress = Callable[[int, int], None]
EMPTY_CAPTION = ""
# Captions go through UMT5 together whose lengths fall into the same step, so many at most.
LENGTH_STEP = 16
TEXT_BATCH_SIZE = 16
_MASK_CHANNELS = 4
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class WeightHashes:
    """Content hashes of what encodes: part of every cache key."""

    vae: str
    text_encoder: str
    tokenizer: str


@dataclass(frozen=True)
class LatentFilling:
    """How latents are made, as far as it does not change what they are.

    Attributes:
        batch_size: clips of one bucket that go through the VAE together, at most.
        decode_workers: processes that decode ahead; 0 decodes in this one.
        skip_bad: list a clip that cannot be decoded in `FillStats.failures` and go on, instead of stopping.
    """

    batch_size: int = 1
    decode_workers: int = 0
    skip_bad: bool = False


DEFAULT_FILLING = LatentFilling()


def hash_weights(paths: CheckpointPaths, memo: HashMemo) -> WeightHashes:
    """Hash VAE, UMT5 and tokenizer files; unchanged files are looked up in `memo` instead of read.

    Never by size alone, whatever `memo` trusts: two encoders of one architecture have the same size.
    """
    hashed = partial(memo.content_hash, compare_time=True)
    if paths.tokenizer_dir.is_dir():
        files = [paths.tokenizer_dir / name for name in _TOKENIZER_FILES]
        tokenizer = "-".join(hashed(path) for path in files if path.exists())
    else:
        tokenizer = xxhash.xxh3_128_hexdigest(read_spiece(paths.tokenizer_dir))
    return WeightHashes(hash_part(paths.vae, hashed), hash_part(paths.text_encoder, hashed), tokenizer)


def hash_part(place: Path, hashed: Callable[[Path], str] = content_hash) -> str:
    """Content hash of a part of a checkpoint, of one file or several; `hashed` gives that of a file."""
    hashes = [hashed(file) for file in weight_files(place)]
    return hashes[0] if len(hashes) == 1 else xxhash.xxh3_128_hexdigest("-".join(hashes).encode())


def build_filling(config: TrainConfig, num_processes_here: int, *, skip_bad: bool) -> LatentFilling:
    """How the configuration wants latents to be made, on a machine with so many ranks."""
    workers = config.decode_workers
    if workers is None:
        workers = automatic_workers(num_processes_here)
    return LatentFilling(config.caching_batch_size, workers, skip_bad)


class WanCache:
    """Keys of every sample's items, filling what is missing, and reading."""

    def __init__(
        self,
        manifest: Manifest,
        store: CacheStore,
        hashes: WeightHashes,
        config: ModelConfig,
        variant: VariantInfo,
    ) -> None:
        self._samples = manifest.samples
        self._store = store
        self._hashes = hashes
        self._config = config
        self._variant = variant
        self._rules = media_rules(variant)
        self._conditioned = variant.model_type == "i2v"
        settings = {"first_frame_condition": self._conditioned}
        self._latent_parts = [
            latent_parts(sample, self._rules, hashes.vae, config.vae_dtype, settings)
            for sample in self._samples
        ]
        self._latent_keys = [make_key(LATENTS, parts) for parts in self._latent_parts]
        self._text_parts = {
            caption: text_parts(
                caption,
                hashes.text_encoder,
                hashes.tokenizer,
                config.dtype,
                {"attention": config.text_attn_implementation, "max_tokens": MAX_TEXT_TOKENS},
            )
            for caption in sorted({EMPTY_CAPTION, *all_captions(self._samples)})
        }
        self._text_keys = {caption: make_key(TEXT, parts) for caption, parts in self._text_parts.items()}

    def of(self, manifest: Manifest) -> "WanCache":
        """The same store and settings for other samples."""
        return WanCache(manifest, self._store, self._hashes, self._config, self._variant)

    def keys(self) -> set[str]:
        """Keys of all items that training reads; of captions only where their states are cached."""
        return {want.key for want in self.wants(LATENTS) + self.wants(TEXT)}

    def wants(self, kind: str) -> list[Want]:
        """All items of a kind that training reads, and what they are made of."""
        if kind == LATENTS:
            return [
                Want(LATENTS, key, str(sample.sample_id), parts)
                for key, sample, parts in zip(
                    self._latent_keys, self._samples, self._latent_parts, strict=True
                )
            ]
        if not self._config.cache_text_embeddings:
            return []
        samples_of: dict[str, list[str]] = {caption: [] for caption in self._text_keys}
        for sample in self._samples:
            for caption in sample.captions:
                samples_of[caption].append(str(sample.sample_id))
        return [
            Want(TEXT, key, caption_identity(caption), self._text_parts[caption], tuple(samples_of[caption]))
            for caption, key in self._text_keys.items()
        ]

    def missing(self, kind: str) -> set[str]:
        """Keys of the items of a kind that are not in the store."""
        return set(self._store.missing(want.key for want in self.wants(kind)))

    def reasons(self, kind: str, made_of: MadeOf, made: Set[str], regenerate: bool) -> Counter[str]:
        """Why how many of the items that were missing and are `made` now had to be; with `regenerate` all others too."""
        wants = self.wants(kind)
        reasons = made_of.reasons(wants, made)
        if regenerate:
            reasons["asked for"] = len({want.key for want in wants} - made)
        return reasons

    def read_latents(self, sample_index: int) -> dict[str, Tensor]:
        """`latents` [C, F, H, W] float32, and for I2V `cond` [20, F, H, W]: mask and encoded first frame."""
        return self._store.get(self._latent_keys[sample_index])

    def read_text(self, caption: str) -> Tensor:
        """States of a caption of the dataset (or the empty one) at its true length, [L, D]."""
        return self._store.get(self._text_keys[caption])["states"]

    def fill_latents(
        self,
        paths: CheckpointPaths,
        processes: Processes,
        regenerate: bool,
        on_progress: OnProgress,
        how: LatentFilling = DEFAULT_FILLING,
    ) -> FillStats:
        """Encode this rank's share of the latents: the missing ones, or all with `regenerate`.

        Raises:
            UserError: a clip cannot be decoded and `how` does not skip it, or the disk is full.
        """
        items = [
            FillItem(
                key=key,
                group=_bucket_group(sample),
                payload=sample,
                metadata={
                    "vae": self._hashes.vae,
                    "dtype": self._config.vae_dtype,
                    "bucket": str(sample.bucket),
                },
            )
            for key, sample in zip(self._latent_keys, self._samples, strict=True)
        ]
        make = partial(self._latent_encoder, paths.vae, processes.device)

        def scaled(frames_FHWC: np.ndarray | UserError) -> Tensor | UserError:
            if not isinstance(frames_FHWC, UserError):
                return scale_frames(frames_FHWC)
            if not how.skip_bad:
                raise frames_FHWC
            return frames_FHWC

        @contextmanager
        def load(samples: Sequence[SampleRecord]) -> Iterator[Iterator[Tensor | UserError]]:
            jobs = [ClipJob(sample, self._rules, sample.content_hash, sample.mtime_ns) for sample in samples]
            with decoded_clips(jobs, how.decode_workers) as frames:
                yield map(scaled, frames)

        return self._fill(items, make, how.batch_size, processes, regenerate, on_progress, load)

    def fill_text(
        self,
        paths: CheckpointPaths,
        tokenizer: WanTokenizer,
        processes: Processes,
        regenerate: bool,
        on_progress: OnProgress,
    ) -> FillStats:
        """The same for caption states, captions of like length together."""
        # What made it, for cache_tool.py; never the caption itself.
        made_by = {"text_encoder": self._hashes.text_encoder, "dtype": self._config.dtype}
        items = [
            FillItem(key, (len(tokenizer(caption)) // LENGTH_STEP,), payload=caption, metadata=made_by)
            for caption, key in self._text_keys.items()
        ]

        def make() -> Encode:
            dtype = getattr(torch, self._config.dtype)
            attention = self._config.text_attn_implementation
            encoder = TextEncoder(paths.text_encoder, tokenizer, dtype, processes.device, attention)
            return lambda batch: (
                {"states": states} for states in encoder.encode([item.payload for item in batch])
            )

        return self._fill(items, make, TEXT_BATCH_SIZE, processes, regenerate, on_progress)

    def _fill(
        self,
        items: Sequence[FillItem],
        make_encoder: Callable[[], Encode],
        batch_size: int,
        processes: Processes,
        regenerate: bool,
        on_progress: OnProgress,
        load: Load | None = None,
    ) -> FillStats:
        # The encoder loads at the first item that is missing, so a warm cache loads nothing.
        encoder = cache(make_encoder)

        try:
            return fill_cache(
                self._store,
                items,
                lambda batch: encoder()(batch),
                load=load,
                rank=processes.rank,
                world_size=processes.world_size,
                batch_size=batch_size,
                regenerate=regenerate,
                on_progress=on_progress,
            )
        finally:
            encoder.cache_clear()
            gc.collect()
            if processes.device.type == "cuda":
                torch.cuda.empty_cache()

    def _latent_encoder(self, vae_path: Path, device: torch.device) -> Encode:
        vae = load_vae(vae_path, getattr(torch, self._config.vae_dtype), device)

        def encode(batch: Sequence[FillItem]) -> Iterator[dict[str, Tensor]]:
            video_BCFHW = _stacked([item.payload for item in batch])
            try:
                encoded = {"latents": vae.encode(video_BCFHW).float().cpu()}
                if self._conditioned:
                    encoded["cond"] = first_frame_condition(video_BCFHW, vae).float().cpu()
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"the GPU has no memory left to encode {len(batch)} clip(s) of {list(video_BCFHW.shape[2:])} (frames, "
                    "height, width); lower caching_batch_size, or the resolutions or frame_buckets of the dataset"
                ) from error
            for row in range(len(batch)):
                yield {name: tensors[row] for name, tensors in encoded.items()}

        return encode


def _stacked(videos_CFHW: Sequence[Tensor]) -> Tensor:
    """Clips as a batch; one alone is not copied."""
    return torch.stack(list(videos_CFHW)) if len(videos_CFHW) > 1 else videos_CFHW[0].unsqueeze(0)


def all_captions(samples: Iterable[SampleRecord]) -> set[str]:
    """Every caption of every sample."""
    return {caption for sample in samples for caption in sample.captions}


def _bucket_group(sample: SampleRecord) -> tuple[int, ...]:
    return (sample.bucket.width, sample.bucket.height, sample.bucket.num_frames)


def first_frame_condition(video_BCFHW: Tensor, vae: WanVae) -> Tensor:
    """I2V's conditioning channels: mask [B, 4, F, H, W] (1 on latent frame 0) over latents of the first frame.

    The frames behind the first are 0 in [-1, 1], which is mid-grey, and go through the VAE with it (official
    `wan/image2video.py`); zero latents would be something else.
    """
    filled = torch.zeros_like(video_BCFHW)
    filled[:, :, :1] = video_BCFHW[:, :, :1]
    latents = vae.encode(filled).float()
    mask = torch.zeros_like(latents[:, :1]).repeat(1, _MASK_CHANNELS, 1, 1, 1)
    mask[:, :, :1] = 1.0
    return torch.cat((mask, latents), dim=1)
