"""From a checked configuration to data that is ready to train on, and the facts that go into every output file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import xxhash

from models.wan.arch import VariantInfo, load_arch
from models.wan.caching import OnProgress, WanCache, WeightHashes, all_captions, hash_weights, media_rules
from models.wan.checkpoint import CheckpointPaths, find_checkpoint, open_sharded
from models.wan.model import WanModel
from models.wan.text_encoder import MAX_TEXT_TOKENS, WanTokenizer
from utils.config.dump import config_hash
from utils.config.schema import DatasetConfig, LoadedConfig, ModelConfig
from utils.data.cache import CacheStore
from utils.data.fill import FillStats
from utils.data.manifest import Manifest, SkippedFile, build_manifest, default_cache_dir
from utils.data.memo import HashMemo
from utils.data.sampler import BatchPlan
from utils.distributed import Processes, gather_objects, on_every_rank, on_main
from utils.errors import UserError
from utils.evaluate import EvalSet
from utils.files import atomic_write_text, combined_fingerprint
from utils.nodes import check_same_inputs, check_shared
from utils.progress import Progress

Say = Callable[[str], None]
THE_DIT = "the DiT"
TARGETS_FILE = "targets.json"
BASE_KEYS_FILE = "base_keys.csv"
MEMO_FILE = "content_hashes.jsonl"
_MAX_LINES_SHOWN = 10
_ACCIDENTS = ("unreadable", "caption_conflict", "absent")


@dataclass(frozen=True)
class PreparedData:
    """Data ready to train on."""

    manifest: Manifest
    plan: BatchPlan
    hashes: WeightHashes
    store_root: Path
    fingerprints: dict[str, str]


def prepare_data(
    config: LoadedConfig,
    model: WanModel,
    paths: CheckpointPaths,
    processes: Processes,
    *,
    regenerate: bool,
    say: Say,
) -> PreparedData:
    """Scan the dataset, fill the cache with what is missing (each rank a share), and attach both to the model.

    Raises:
        UserError: the dataset is empty or unreadable, on every rank.
    """
    dataset = config.dataset
    assert dataset is not None, "load_config with check_files has read it"
    root = default_cache_dir(dataset)
    cached = _cache_dataset(
        dataset, "dataset", config.train.model, model, paths, processes, regenerate=regenerate, say=say
    )
    manifest, hashes = cached.manifest, cached.hashes
    on_every_rank(lambda: model.attach_data(manifest.samples, cached.cache))
    for line in model.describe():
        say(line)
    plan = BatchPlan(manifest.samples, config.train.micro_batch_size_per_gpu, config.train.seed)
    base = on_main(lambda: combined_fingerprint(model.base.files))
    fingerprints = {
        "the dataset": data_fingerprint(manifest),
        THE_DIT: base,
        "the VAE": hashes.vae,
        "the text encoder": hashes.text_encoder,
        "the tokenizer": hashes.tokenizer,
    }
    if model.batches.caption_aug is not None:
        fingerprints["the keywords"] = model.batches.caption_aug.keywords_digest
    return PreparedData(manifest, plan, hashes, root, fingerprints)


def check_nodes(config: LoadedConfig, model: WanModel, paths: CheckpointPaths, processes: Processes) -> None:
    """Processes on several machines must have the same configuration and weights, and share the caches.

    Raises:
        UserError: on every rank: they do not.
    """
    if processes.world_size == 1:
        return
    assert config.dataset is not None, "load_config with check_files has read it"
    datasets = (config.dataset, *config.eval_datasets)
    facts = {
        "the configuration": config_hash(config.train),
        "the dataset TOML": "-".join(config_hash(dataset) for dataset in datasets),
        "the project's version": version("ai-model-sandbox"),
    }
    weights = {THE_DIT: model.base.files, "the VAE": [paths.vae], "the text encoder": [paths.text_encoder]}
    # Names and sizes: reading 100 GB on every machine only to compare would cost minutes.
    for what, files in weights.items():
        facts[what] = ", ".join(f"{Path(file).name} {Path(file).stat().st_size}" for file in files)
    check_same_inputs(facts, processes)
    roots = dict.fromkeys(default_cache_dir(dataset) for dataset in datasets)
    check_shared({f"the cache {root}": root for root in roots}, processes)


@dataclass(frozen=True)
class _CachedDataset:
    """A dataset all of whose items are in its cache."""

    manifest: Manifest
    cache: WanCache
    hashes: WeightHashes


def _cache_dataset(
    dataset: DatasetConfig,
    label: str,
    config: ModelConfig,
    model: WanModel,
    paths: CheckpointPaths,
    processes: Processes,
    *,
    regenerate: bool,
    say: Say,
) -> _CachedDataset:
    """Scan a dataset and fill its cache with what is missing. `label` is what messages call it."""
    root = default_cache_dir(dataset)
    variant = model.arch.variant
    memo = HashMemo(root / MEMO_FILE)
    manifest, hashes = on_main(lambda: _scan(dataset, variant, paths, memo))
    _say_manifest(manifest, label, say)
    store = on_every_rank(lambda: CacheStore(root))
    cache = WanCache(manifest, store, hashes, config, variant)
    tokenizer = on_every_rank(lambda: WanTokenizer(paths.tokenizer_dir))
    if processes.is_main:
        _say_long_captions(manifest, tokenizer, say)
    texts = tokenizer if config.cache_text_embeddings else None
    _fill(cache, paths, processes, texts, regenerate=regenerate, say=say)
    return _CachedDataset(manifest, cache, hashes)


def prepare_eval_data(
    config: LoadedConfig,
    model: WanModel,
    paths: CheckpointPaths,
    processes: Processes,
    *,
    regenerate: bool,
    say: Say,
) -> list[EvalSet]:
    """The same for the datasets that are evaluated.

    Raises:
        UserError: one of them is empty or unreadable, on every rank.
    """
    train, sets = config.train, []
    for named, dataset in zip(train.eval_datasets, config.eval_datasets, strict=True):
        label = f"eval dataset {named.label}"
        cached = _cache_dataset(
            dataset, label, train.model, model, paths, processes, regenerate=regenerate, say=say
        )
        manifest = cached.manifest
        batches = model.eval_batches(manifest.samples, cached.cache, train.eval_quantiles)
        levels = ", ".join(f"{sigma:.3g}" for sigma in batches.sigmas)
        say(f"{label}: each sample at {len(batches.sigmas)} noise level(s): {levels}")
        facts = json.dumps([data_fingerprint(manifest), train.seed, batches.sigmas])
        identity = xxhash.xxh3_128_hexdigest(facts.encode())
        sets.append(EvalSet(named.label, manifest.samples, train.eval_quantiles, identity, batches))
    return sets


def needed_items(config: LoadedConfig, root: Path) -> tuple[set[str], list[SkippedFile]] | None:
    """Keys of all items of the cache at `root` that training and evaluation by this configuration read.

    And the files of their datasets that are left out. None where no dataset has its cache there. Reads the files of the
    datasets and the weights that are new or changed since the cache last saw them.

    Raises:
        UserError: the checkpoint or the dataset is not right.
    """
    model = config.train.model
    assert config.dataset is not None, "load_config with check_files has read it"
    datasets = [
        dataset
        for dataset in (config.dataset, *config.eval_datasets)
        if default_cache_dir(dataset).resolve() == root.resolve()
    ]
    if not datasets:
        return None
    paths = find_checkpoint(model)
    variant = load_arch(paths.config_json, open_sharded(paths.transformer_dir).shapes).variant
    keys: set[str] = set()
    skipped: list[SkippedFile] = []
    for dataset in datasets:
        manifest, hashes = _scan(dataset, variant, paths, HashMemo(root / MEMO_FILE))
        keys |= WanCache(manifest, CacheStore(root), hashes, model, variant).keys()
        skipped += manifest.skipped
    return keys, skipped


def _scan(
    dataset: DatasetConfig, variant: VariantInfo, paths: CheckpointPaths, memo: HashMemo
) -> tuple[Manifest, WeightHashes]:
    """The samples that this variant trains on, and hashes of what encodes them."""
    manifest = build_manifest(dataset, media_rules(variant), memo)
    if variant.model_type == "i2v":
        manifest = without_images(manifest)
    hashes = hash_weights(paths, memo)
    memo.save()
    return manifest, hashes


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
    return Manifest(videos, manifest.skipped + images)


def _fill(
    cache: WanCache,
    paths: CheckpointPaths,
    processes: Processes,
    tokenizer: WanTokenizer | None,
    *,
    regenerate: bool,
    say: Say,
) -> None:
    """Encode what is missing; captions only with a tokenizer."""

    def fill(what: str, work: Callable[[OnProgress], FillStats]) -> None:
        bars: list[Progress] = []

        def on_progress(done: int, total: int) -> None:
            if processes.is_main and total:
                if not bars:
                    bars.append(Progress(f"caching {what}", total))
                bars[0].advance(1 if done else 0)

        stats = on_every_rank(lambda: work(on_progress))
        for bar in bars:
            bar.close()
        everything = gather_objects((stats.num_items, stats.num_encoded))
        total, encoded = (sum(column) for column in zip(*everything, strict=True))
        say(f"cache of {what}: {total} items, {encoded} encoded now, {total - encoded} there already")

    fill("latents", lambda on_progress: cache.fill_latents(paths, processes, regenerate, on_progress))
    if tokenizer is not None:
        fill(
            "captions",
            lambda on_progress: cache.fill_text(paths, tokenizer, processes, regenerate, on_progress),
        )


def _say_manifest(manifest: Manifest, label: str, say: Say) -> None:
    counts: dict[str, int] = {}
    for sample in manifest.samples:
        counts[str(sample.bucket)] = counts.get(str(sample.bucket), 0) + 1
    buckets = ", ".join(f"{bucket}: {count}" for bucket, count in sorted(counts.items()))
    say(f"{label}: {len(manifest.samples)} samples ({buckets}); {len(manifest.skipped)} files skipped")
    # What is left out by accident comes first, before what is left out by rule.
    by_urgency = sorted(manifest.skipped, key=lambda skipped: skipped.code not in _ACCIDENTS)
    _say_some([f"  skipped {skipped.path}: {skipped.reason}" for skipped in by_urgency], say)


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


def _say_some(lines: Sequence[str], say: Say) -> None:
    for line in lines[:_MAX_LINES_SHOWN]:
        say(line)
    if len(lines) > _MAX_LINES_SHOWN:
        say(f"  ... and {len(lines) - _MAX_LINES_SHOWN} more")


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
        )
        for sample in manifest.samples
    )
    return xxhash.xxh3_128_hexdigest(json.dumps(rows).encode())


def write_base_description(model: WanModel, run_dir: Path) -> None:
    """Save the base checkpoint's header as `base_keys.csv` and the resolved target list as `targets.json`."""
    rows = [
        {"key": name, "shape": "x".join(map(str, shape)), "dtype": model.base.dtypes[name]}
        for name, shape in model.base.shapes.items()
    ]
    atomic_write_text(run_dir / BASE_KEYS_FILE, pd.DataFrame(rows).to_csv(index=False))
    if model.targets:
        atomic_write_text(run_dir / TARGETS_FILE, json.dumps(model.targets, indent=1) + "\n")


def run_metadata(config: LoadedConfig, model: WanModel, data: PreparedData) -> dict[str, str]:
    """Facts that every exported file carries in its header."""
    variant = model.arch.variant
    metadata = {
        "format": "pt",
        "project_version": version("ai-model-sandbox"),
        "variant": variant.name,
        "expert": config.train.model.expert or "none",
        "boundary": "none" if variant.boundary is None else str(variant.boundary),
        "base_hash": data.fingerprints[THE_DIT],
        "encoder_hash": data.hashes.text_encoder,
        "config_hash": config_hash(config.train),
        "seed": str(config.train.seed),
    }
    if config.train.adapter is not None:
        metadata |= {"rank": str(config.train.adapter.rank), "num_targets": str(len(model.targets))}
    return metadata
