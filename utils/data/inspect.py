"""What a dataset comes to, in numbers: per file, per bucket, per caption length, per epoch. Nothing is written here."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from utils.config.schema import TrainConfig
from utils.data.buckets import Bucket, MediaRules
from utils.data.manifest import BAD_FILE_CODES, Manifest, SampleRecord, SkippedFile
from utils.data.media import load_clip
from utils.data.sampler import BatchPlan
from utils.errors import UserError
from utils.progress import Progress

_TOKEN_BIN = 32


@dataclass(frozen=True)
class FileRow:
    """One line of the per-file table. What does not apply to a file, or is not known, is None.

    `seconds` is the length of the whole file, `clip_start_seconds` and `clip_seconds` say which part of it is used.
    `caption_tokens` is that of the longest of `num_captions`. `masked_share` is the part of the area that a loss mask
    leaves out.
    """

    file: str
    status: str
    reason: str | None = None
    detail: str | None = None
    kind: str | None = None
    width: int | None = None
    height: int | None = None
    bucket: str | None = None
    frames_in: int | None = None
    frames_used: int | None = None
    seconds: float | None = None
    clip_start_seconds: float | None = None
    clip_seconds: float | None = None
    num_captions: int | None = None
    caption_tokens: int | None = None
    is_truncated: bool | None = None
    num_repeats: float | None = None
    mask: str | None = None
    masked_share: float | None = None


@dataclass(frozen=True)
class SkipRow:
    """How many files were left out for one kind of reason, and the first of them."""

    reason: str
    count: int
    example: str
    detail: str


@dataclass(frozen=True)
class BucketRow:
    """What falls into one bucket. An epoch here is the first; `visits_in_run` counts all of them."""

    bucket: str
    samples: int
    share: float
    images: int
    videos: int
    visits_in_epoch: int
    micro_batches_in_epoch: int
    short_micro_batches_in_epoch: int
    visits_in_run: int


@dataclass(frozen=True)
class CountBin:
    """Captions with `low` to `high` tokens (both included); `high` None is open."""

    low: int
    high: int | None
    count: int


@dataclass(frozen=True)
class RunLength:
    """What one copy of the model does with the dataset.

    Attributes:
        micro_batches_first_epoch: in epoch 0.
        micro_batches_per_epoch: mean over the epochs of the run; epochs differ where `num_repeats` is a fraction.
        steps_per_epoch: the same in optimizer steps. A step may reach over the end of an epoch, so it is a fraction.
        epochs: how many the run touches.
        steps: of the whole run.
    """

    micro_batches_first_epoch: int
    micro_batches_per_epoch: float
    steps_per_epoch: float
    epochs: int
    steps: int


def printable(text: object) -> str:
    """The text with what is no UTF-8 (in file names) as escapes, so that it can be written anywhere."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def undecodable(samples: Sequence[SampleRecord], rules: MediaRules) -> dict[int, str]:
    """Decode every clip as far as it reaches, one at a time; why those that fail do, by the id of their sample."""
    failures: dict[int, str] = {}
    progress = Progress("decoding", len(samples))
    for sample in samples:
        try:
            load_clip(sample, rules)
        except UserError as error:
            failures[sample.sample_id] = printable(error)
        progress.advance(1)
    progress.close()
    return failures


def file_rows(
    manifest: Manifest,
    fps: float,
    caption_tokens: Mapping[str, int] | None,
    max_tokens: int,
    failures: Mapping[int, str] | None = None,
) -> list[FileRow]:
    """The per-file table: what was skipped first (damaged files before those that a rule leaves out), then what is kept.

    Args:
        manifest: what there is.
        fps: of the model.
        caption_tokens: length of every caption, None where it is not known; of several the longest is shown.
        max_tokens: where a caption is cut off.
        failures: of clips that are kept and cannot be decoded, by the id of their sample.
    """
    failures = failures or {}
    by_urgency = sorted(manifest.skipped, key=lambda skipped: skipped.code not in BAD_FILE_CODES)
    rows = [
        FileRow(printable(entry.path), "skipped", entry.code, printable(entry.reason)) for entry in by_urgency
    ]
    for sample in manifest.samples:
        tokens = None if caption_tokens is None else max(caption_tokens[one] for one in sample.captions)
        is_video = sample.kind == "video"
        rows.append(
            FileRow(
                file=printable(sample.path),
                status="kept",
                reason="undecodable" if sample.sample_id in failures else None,
                detail=failures.get(sample.sample_id),
                kind=sample.kind,
                width=sample.info.width,
                height=sample.info.height,
                bucket=str(sample.bucket),
                frames_in=sample.info.num_frames,
                frames_used=sample.bucket.num_frames,
                seconds=round(sample.info.seconds, 3) if is_video else None,
                clip_start_seconds=round(sample.clip_start_seconds, 3) if is_video else None,
                clip_seconds=round(sample.bucket.num_frames / fps, 3) if is_video else None,
                num_captions=len(sample.captions),
                caption_tokens=tokens,
                is_truncated=None if tokens is None else tokens > max_tokens,
                num_repeats=sample.num_repeats,
                mask=None if sample.mask is None else printable(sample.mask.path),
                masked_share=None if sample.mask is None else round(sample.mask.grid.masked_share, 4),
            )
        )
    return rows


def skip_rows(skipped: Sequence[SkippedFile]) -> list[SkipRow]:
    """Skipped files by kind of reason, the most frequent first."""
    first: dict[str, SkippedFile] = {}
    for entry in skipped:
        first.setdefault(entry.code, entry)
    counts = Counter(entry.code for entry in skipped).most_common()
    return [
        SkipRow(code, count, printable(first[code].path), printable(first[code].reason))
        for code, count in counts
    ]


def skipped_share(manifest: Manifest) -> float:
    """Skipped entries of the directories over all of them; 0 of an empty directory."""
    kept = len({sample.path for sample in manifest.samples})
    total = kept + len(manifest.skipped)
    return len(manifest.skipped) / total if total else 0.0


def bucket_rows(samples: Sequence[SampleRecord], plan: BatchPlan, epochs: int) -> list[BucketRow]:
    """One row per bucket that holds a sample, in order of the buckets."""
    members: dict[Bucket, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        members[sample.bucket].append(index)
    batches = plan.epoch_batches(0)
    in_epoch, in_run = plan.visits_before(1), plan.visits_before(epochs)
    num_batches = Counter(batch.bucket for batch in batches)
    num_short = Counter(batch.bucket for batch in batches if len(batch.visits) < plan.micro_batch_size)
    rows = []
    for bucket, indices in sorted(members.items()):
        videos = sum(samples[index].kind == "video" for index in indices)
        rows.append(
            BucketRow(
                bucket=str(bucket),
                samples=len(indices),
                share=len(indices) / len(samples),
                images=len(indices) - videos,
                videos=videos,
                visits_in_epoch=sum(in_epoch[index] for index in indices),
                micro_batches_in_epoch=num_batches[bucket],
                short_micro_batches_in_epoch=num_short[bucket],
                visits_in_run=sum(in_run[index] for index in indices),
            )
        )
    return rows


def caption_histogram(lengths: Sequence[int], max_tokens: int) -> list[CountBin]:
    """How many captions have how many tokens, in bins of 32 up to `max_tokens` and one above."""
    starts = range(1, max_tokens + 1, _TOKEN_BIN)
    bins = [(low, min(low + _TOKEN_BIN - 1, max_tokens)) for low in starts]
    rows = [CountBin(low, high, sum(low <= length <= high for length in lengths)) for low, high in bins]
    return [*rows, CountBin(max_tokens + 1, None, sum(length > max_tokens for length in lengths))]


def run_length(config: TrainConfig, plan: BatchPlan) -> RunLength:
    """Micro-batches and steps of the configured run with one copy of the model."""
    per_step = config.gradient_accumulation_steps
    epochs = config.epochs
    if config.max_steps is not None:
        epochs = plan.epoch_of(config.max_steps * per_step - 1) + 1
    total = plan.batches_before(epochs)
    return RunLength(
        micro_batches_first_epoch=plan.batches_before(1),
        micro_batches_per_epoch=total / epochs,
        steps_per_epoch=total / epochs / per_step,
        epochs=epochs,
        steps=-(-total // per_step) if config.max_steps is None else config.max_steps,
    )


def choose_samples(samples: Sequence[SampleRecord], limit: int) -> list[SampleRecord]:
    """At most `limit` samples to look at, in order of their buckets: a like number of each bucket, evenly spaced in it."""
    groups: dict[Bucket, list[SampleRecord]] = defaultdict(list)
    for sample in samples:
        groups[sample.bucket].append(sample)
    shares = dict.fromkeys(sorted(groups), 0)
    left = min(limit, len(samples))
    while left:
        for bucket in shares:
            if left and shares[bucket] < len(groups[bucket]):
                shares[bucket] += 1
                left -= 1
    return [
        groups[bucket][index * len(groups[bucket]) // share]
        for bucket, share in shares.items()
        for index in range(share)
    ]
