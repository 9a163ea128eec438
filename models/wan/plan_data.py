"""A dataset for a plan: its buckets, lengths and counts, from what can be seen of it within a second. No torch."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from models.wan.arch import VariantInfo
from models.wan.layer_memory import Workload
from models.wan.media import MEMO_FILE, media_rules, time_rows, video_tokens, without_images
from utils.config.schema import DatasetConfig, TrainConfig
from utils.data.buckets import Bucket, MediaRules, build_buckets
from utils.data.inspect import run_length
from utils.data.manifest import Manifest, build_manifest, default_cache_dir
from utils.data.masks import MaskGrid
from utils.data.media import MediaInfo
from utils.data.memo import HashMemo
from utils.data.sampler import BatchPlan
from utils.errors import UserError

MAX_TEXT_TOKENS = 512
# English text in UMT5's vocabulary has about four characters per token.
_CHARACTERS_PER_TOKEN = 4
# The sizes that the official samplers offer, for who has no dataset yet.
_PUBLISHED_BUCKETS = {
    "ti2v-5b": ((1280, 704, 121), (832, 480, 81), (512, 512, 1)),
    "t2v-a14b": ((1280, 720, 81), (832, 480, 81), (512, 512, 1)),
    "i2v-a14b": ((1280, 720, 81), (832, 480, 81)),
}


@dataclass(frozen=True)
class BucketUse:
    """One bucket: its tokens in the DiT, and how many of the samples that were seen are in it."""

    bucket: Bucket
    tokens: int
    samples: int


@dataclass(frozen=True)
class DataPlan:
    """What a plan knows of the data.

    Attributes:
        source: "dataset" (samples were seen), "buckets" (only the configured buckets), or "published" (no dataset: the
            sizes that the model was made for).
        buckets: the largest first; those of samples that were seen, else all that may come.
        mean: the mean sample; without samples, the largest bucket.
        largest_text: tokens of the longest caption; without samples, the most that UMT5 reads here.
        samples, files, skipped: counts of what was seen; `skipped` by reason.
        not_examined: files that there was no time to look into.
        text_tokens: of all captions that were seen, each once.
        micro_batches_per_epoch, steps: of all copies, scaled up by the files that were not examined; None without samples.
    """

    source: str
    buckets: tuple[BucketUse, ...]
    mean: Workload
    largest_text: int
    samples: int = 0
    files: int = 0
    skipped: tuple[tuple[str, int], ...] = ()
    not_examined: int = 0
    text_tokens: int = 0
    micro_batches_per_epoch: float | None = None
    steps: int | None = None

    @property
    def unseen_factor(self) -> float:
        """All files over those that were examined."""
        seen = self.files + sum(count for _, count in self.skipped)
        return (seen + self.not_examined) / seen if seen else 1.0


class _QuickMemo(HashMemo):
    """A memo that hashes nothing and stops probing files when its time is over; what an earlier run knew is used."""

    def __init__(self, path: Path, seconds: float) -> None:
        super().__init__(path, read_only=True)
        self._deadline = time.monotonic() + seconds
        self.late: set[Path] = set()

    def content_hash(self, path: Path, *, compare_time: bool = False) -> str:
        """A stand-in: a plan compares no contents."""
        return ""

    def mask_grid(self, path: Path, medium: MediaInfo, bucket: Bucket, stride: int) -> MaskGrid:
        """As `HashMemo`, while there is time."""
        self._check_time(path)
        return super().mask_grid(path, medium, bucket, stride)

    def media_info(self, path: Path) -> MediaInfo:
        """As `HashMemo`, while there is time."""
        known = self._entries.get(str(path.absolute()))
        if known is None or known.info is None:
            self._check_time(path)
        return super().media_info(path)

    def _check_time(self, path: Path) -> None:
        if time.monotonic() > self._deadline:
            self.late.add(path)
            raise UserError(f"{path}: not examined")


def plan_data(
    dataset: DatasetConfig | None, config: TrainConfig, variant: VariantInfo, copies: int, seconds: float
) -> DataPlan:
    """What the dataset comes to.

    Args:
        dataset: None where its TOML is not there.
        config: the run.
        variant: of the model.
        copies: of the model, over which micro-batches are shared out.
        seconds: how long files may be examined; those that an earlier run knows cost no time.

    Raises:
        UserError: the bucket keys are illegal.
    """
    if dataset is None:
        published = tuple(Bucket(*sizes) for sizes in _PUBLISHED_BUCKETS[variant.name])
        return _without_samples("published", published, config, variant)
    rules = media_rules(variant)
    buckets = {
        bucket for directory in dataset.directory for bucket in build_buckets(dataset, directory, rules)
    }
    if variant.model_type == "i2v":
        buckets = {bucket for bucket in buckets if bucket.num_frames > 1} or buckets
    present = tuple(directory for directory in dataset.directory if Path(directory.path).is_dir())
    if present:
        memo = _QuickMemo(default_cache_dir(dataset) / MEMO_FILE, seconds)
        manifest = _scan(replace(dataset, directory=present), rules, memo)
        if variant.model_type == "i2v":
            manifest = without_images(manifest, allow_empty=True)
        if manifest.samples:
            return _from_samples(manifest, memo.late, config, variant, copies)
    return _without_samples("buckets", tuple(buckets), config, variant)


def caption_tokens(caption: str) -> int:
    """About how many tokens a caption has; the tokenizer itself takes seconds to load."""
    return min(MAX_TEXT_TOKENS, 1 + -(-len(caption) // _CHARACTERS_PER_TOKEN))


def _scan(dataset: DatasetConfig, rules: MediaRules, memo: HashMemo) -> Manifest:
    caption_rule = "skip" if dataset.missing_caption == "error" else dataset.missing_caption
    masked = tuple(
        (
            directory
            if directory.mask_path is None or Path(directory.mask_path).is_dir()
            else replace(directory, mask_path=None)
        )
        for directory in dataset.directory
    )
    lenient = replace(dataset, on_bad_file="skip", missing_caption=caption_rule, directory=masked)
    return build_manifest(lenient, rules, memo, allow_empty=True)


def _from_samples(
    manifest: Manifest, late: set[Path], config: TrainConfig, variant: VariantInfo, copies: int
) -> DataPlan:
    samples = manifest.samples
    counts = Counter(sample.bucket for sample in samples)
    per_sample = [fmean(caption_tokens(text) for text in sample.captions) for sample in samples]
    tokens = {bucket: video_tokens(variant, bucket) for bucket in counts}
    captions = {text for sample in samples for text in sample.captions}
    rows = fmean(time_rows(variant, sample.bucket, config.model.first_frame_prob) for sample in samples)
    per_step = config.gradient_accumulation_steps * copies
    batches = BatchPlan(samples, config.micro_batch_size_per_gpu, config.seed)
    length = run_length(replace(config, gradient_accumulation_steps=per_step), batches)
    skipped = Counter(entry.code for entry in manifest.skipped if entry.path not in late)
    found = DataPlan(
        source="dataset",
        buckets=_largest_first(BucketUse(bucket, tokens[bucket], counts[bucket]) for bucket in counts),
        mean=Workload(fmean(tokens[sample.bucket] for sample in samples), fmean(per_sample), rows),
        largest_text=max(caption_tokens(text) for text in captions),
        samples=len(samples),
        files=len({sample.path for sample in samples}),
        skipped=tuple(skipped.most_common()),
        not_examined=len(late),
        text_tokens=sum(caption_tokens(text) for text in captions),
    )
    factor = found.unseen_factor
    steps = length.steps if config.max_steps is not None else round(length.steps * factor)
    return replace(found, micro_batches_per_epoch=length.micro_batches_per_epoch * factor, steps=steps)


def _without_samples(
    source: str, buckets: Sequence[Bucket], config: TrainConfig, variant: VariantInfo
) -> DataPlan:
    uses = _largest_first(BucketUse(bucket, video_tokens(variant, bucket), 0) for bucket in buckets)
    rows = time_rows(variant, uses[0].bucket, config.model.first_frame_prob)
    return DataPlan(source, uses, Workload(uses[0].tokens, MAX_TEXT_TOKENS, rows), MAX_TEXT_TOKENS)


def _largest_first(uses: Iterable[BucketUse]) -> tuple[BucketUse, ...]:
    return tuple(sorted(uses, key=lambda use: (-use.tokens, use.bucket)))
