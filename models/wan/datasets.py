"""From a dataset's folders to a cache that holds all its items: scanning, filling, and telling what became of each file."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from models.wan.arch import VariantInfo
from models.wan.caching import (
    LatentFilling,
    OnProgress,
    WanCache,
    WeightHashes,
    all_captions,
    build_filling,
    hash_weights,
)
from models.wan.checkpoint import CheckpointPaths
from models.wan.media import MEMO_FILE, media_rules, without_images
from models.wan.text_encoder import MAX_TEXT_TOKENS, WanTokenizer
from utils.config.schema import DatasetConfig, TrainConfig
from utils.data.cache import CacheStore
from utils.data.cache_keys import LATENTS, TEXT
from utils.data.fill import FillStats
from utils.data.manifest import (
    BAD_FILE_CODES,
    Manifest,
    SampleRecord,
    SkippedFile,
    build_manifest,
    default_cache_dir,
)
from utils.data.memo import HashMemo
from utils.data.reasons import MEMORY_FILE, MadeOf, describe
from utils.distributed import Processes, gather_objects, num_processes_here, on_every_rank, on_main
from utils.errors import UserError
from utils.shared_progress import SharedProgress

Say = Callable[[str], None]
_MAX_LINES_SHOWN = 10
_WHERE_ALL_ARE = " (all: dataset.csv in the run directory, or dataset_inspect.py)"


@dataclass(frozen=True)
class CacheUse:
    """What the command line says about the cache: encode anew, and which files count as unchanged by their size."""

    regenerate: bool = False
    trust_sizes: bool = False


@dataclass(frozen=True)
class CachedDataset:
    """A dataset all of whose items are in its cache."""

    manifest: Manifest
    cache: WanCache
    hashes: WeightHashes
    root: Path

    def videos(self, variant: VariantInfo) -> "CachedDataset | None":
        """Its samples with more than one latent frame; None where there is none."""
        kept = tuple(
            sample for sample in self.manifest.samples if variant.latent_frames(sample.bucket.num_frames) > 1
        )
        if not kept:
            return None
        manifest = replace(self.manifest, samples=kept)
        return replace(self, manifest=manifest, cache=self.cache.of(manifest))


def cache_dataset(
    dataset: DatasetConfig,
    label: str,
    config: TrainConfig,
    variant: VariantInfo,
    paths: CheckpointPaths,
    processes: Processes,
    use: CacheUse,
    say: Say,
) -> CachedDataset:
    """Scan a dataset and fill its cache with what is missing, each rank a share. Every rank must call it.

    Args:
        dataset: its folders and buckets.
        label: what messages call it.
        config: of the training.
        variant: of the model.
        paths: what encodes.
        processes: this one among all.
        use: what the command line says.
        say: speaks for all.

    Raises:
        UserError: on every rank: the dataset is empty or unreadable, a file breaks a rule, or the disk is full.
    """
    root = default_cache_dir(dataset)
    memo = HashMemo(root / MEMO_FILE, trust_sizes=use.trust_sizes)
    manifest, hashes = on_main(lambda: scan_dataset(dataset, variant, paths, memo))
    _say_manifest(manifest, label, any(directory.mask_path for directory in dataset.directory), say)
    if use.trust_sizes:
        say(_describe_trust(memo))
    store = on_every_rank(lambda: CacheStore(root))
    cache = WanCache(manifest, store, hashes, config.model, variant)
    tokenizer = on_every_rank(lambda: WanTokenizer(paths.tokenizer_dir))
    if processes.is_main:
        _say_long_captions(manifest, tokenizer, say)
    filler = _Filler(
        cache,
        paths,
        processes,
        build_filling(
            config,
            num_processes_here(),
            skip_bad=dataset.on_bad_file == "skip",
        ),
        MadeOf(root / MEMORY_FILE),
        use.regenerate,
        say,
    )
    failures = filler.fill_latents()
    if config.model.cache_text_embeddings:
        filler.fill_text(tokenizer)
    if failures:
        known = len(manifest.skipped)
        manifest = without_failures(manifest, cache, failures)
        _say_some(
            [f"  skipped {file.path}: {file.reason}" for file in manifest.skipped[known:]],
            say,
            _WHERE_ALL_ARE,
        )
        cache = cache.of(manifest)
    on_main(lambda: filler.made_of.remember(cache.wants(LATENTS) + cache.wants(TEXT)))
    return CachedDataset(manifest, cache, hashes, root)


def scan_dataset(
    dataset: DatasetConfig, variant: VariantInfo, paths: CheckpointPaths, memo: HashMemo
) -> tuple[Manifest, WeightHashes]:
    """The samples that this variant trains on, and hashes of what encodes them.

    Raises:
        UserError: as `build_manifest`, or nothing is left for this variant.
    """
    manifest = build_manifest(dataset, media_rules(variant), memo)
    if variant.model_type == "i2v":
        manifest = without_images(manifest)
    hashes = hash_weights(paths, memo)
    memo.save()
    return manifest, hashes


def without_failures(manifest: Manifest, cache: WanCache, failures: Mapping[str, str]) -> Manifest:
    """Leave out the clips whose latents could not be made, by key with the reason.

    They were found while decoding: the beginning of their file, which the scan looks at, is whole.

    Raises:
        UserError: nothing is left.
    """
    kept: list[SampleRecord] = []
    skipped: list[SkippedFile] = []
    for sample, want in zip(manifest.samples, cache.wants(LATENTS), strict=True):
        if want.key not in failures:
            kept.append(sample)
            continue
        place = f"clip from {sample.clip_start_seconds:.2f} s: " if sample.clip_start_seconds else ""
        reason = failures[want.key].removeprefix(f"{sample.path}: ")
        skipped.append(SkippedFile(sample.path, f"{place}{reason}", "unreadable"))
    if not kept:
        raise UserError(
            f"dataset: nothing to train on, none of its {len(skipped)} clips can be decoded, e.g. {skipped[0].path}: "
            f"{skipped[0].reason}"
        )
    return replace(manifest, samples=tuple(kept), skipped=(*manifest.skipped, *skipped))


def data_fingerprint(manifest: Manifest) -> str:
    """Names everything about the dataset that the order and content of samples depends on."""
    rows = sorted(
        (
            sample.sample_id,
            sample.content_hash,
            sample.captions,
            str(sample.bucket),
            sample.num_repeats,
            sample.clip_start_seconds,
            # Nothing at all without a mask, so that a dataset without any keeps its name.
            *(() if sample.mask is None else (sample.mask.content_hash,)),
        )
        for sample in manifest.samples
    )
    return xxhash.xxh3_128_hexdigest(json.dumps(rows).encode())


@dataclass(frozen=True)
class _Filler:
    """Encodes what is missing of one dataset and says what was done and why."""

    cache: WanCache
    paths: CheckpointPaths
    processes: Processes
    how: LatentFilling
    made_of: MadeOf
    regenerate: bool
    say: Say

    def fill_latents(self) -> dict[str, str]:
        """Reasons, by key, of the clips that could not be decoded."""
        return self._fill(
            "latents",
            LATENTS,
            lambda on_progress: self.cache.fill_latents(
                self.paths, self.processes, self.regenerate, on_progress, self.how
            ),
        )

    def fill_text(self, tokenizer: WanTokenizer) -> None:
        """Captions."""
        self._fill(
            "captions",
            TEXT,
            lambda on_progress: self.cache.fill_text(
                self.paths, tokenizer, self.processes, self.regenerate, on_progress
            ),
        )

    def _fill(self, what: str, kind: str, work: Callable[[OnProgress], FillStats]) -> dict[str, str]:
        missing = on_main(lambda: self.cache.missing(kind))
        with SharedProgress(f"caching {what}", self.processes) as progress:
            stats = on_every_rank(lambda: work(progress.report))
        everything: list[FillStats] = gather_objects(stats)
        total, encoded = (
            sum(getattr(part, name) for part in everything) for name in ("num_items", "num_encoded")
        )
        failures = {key: reason for part in everything for key, reason in part.failures}
        reasons = on_main(
            lambda: self.cache.reasons(kind, self.made_of, missing - failures.keys(), self.regenerate)
        )
        why = f" ({describe(reasons)})" if encoded else ""
        lost = f", {len(failures)} cannot be decoded" if failures else ""
        there = total - encoded - len(failures)
        self.say(f"cache of {what}: {total} items, {encoded} encoded now{why}, {there} there already{lost}")
        return failures


def _describe_trust(memo: HashMemo) -> str:
    return (
        f"--trust_cache: {memo.num_trusted} file(s) with another time stamp or place count as unchanged because they have "
        f"the size that is known; {memo.num_read} new or of another size were read"
    )


def _say_manifest(manifest: Manifest, label: str, wants_masks: bool, say: Say) -> None:
    counts: dict[str, int] = {}
    for sample in manifest.samples:
        counts[str(sample.bucket)] = counts.get(str(sample.bucket), 0) + 1
    buckets = ", ".join(f"{bucket}: {count}" for bucket, count in sorted(counts.items()))
    say(f"{label}: {len(manifest.samples)} samples ({buckets}); {len(manifest.skipped)} files skipped")
    if wants_masks:
        masked = sum(sample.mask is not None for sample in manifest.samples)
        say(f"loss masks: {masked} of {len(manifest.samples)} samples; the others count whole")
    # What is left out by accident comes first, before what is left out by rule.
    by_urgency = sorted(manifest.skipped, key=lambda skipped: skipped.code not in BAD_FILE_CODES)
    _say_some([f"  skipped {skipped.path}: {skipped.reason}" for skipped in by_urgency], say, _WHERE_ALL_ARE)
    _say_some([f"warning: {warning}" for warning in manifest.warnings], say)


def _say_long_captions(manifest: Manifest, tokenizer: WanTokenizer, say: Say) -> None:
    """Name every caption of which the model does not see the end."""
    counts = {caption: tokenizer.count(caption) for caption in all_captions(manifest.samples)}
    # Clips of one video share its captions; each is named once.
    files = dict.fromkeys((sample.path, sample.captions) for sample in manifest.samples)
    too_long = [
        f"warning: {path}: its caption {f'{number} of {len(captions)} ' if len(captions) > 1 else ''}"
        f"has {counts[caption]} tokens, and UMT5 reads {MAX_TEXT_TOKENS} here: the rest is cut off; shorten it"
        for path, captions in files
        for number, caption in enumerate(captions, start=1)
        if counts[caption] > MAX_TEXT_TOKENS
    ]
    _say_some(too_long, say)


def _say_some(lines: Sequence[str], say: Say, where_all_are: str = "") -> None:
    for line in lines[:_MAX_LINES_SHOWN]:
        say(line)
    if len(lines) > _MAX_LINES_SHOWN:
        say(f"  ... and {len(lines) - _MAX_LINES_SHOWN} more{where_all_are}")
