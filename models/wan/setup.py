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
from models.wan.checkpoint import CheckpointPaths, find_checkpoint, open_transformer
from models.wan.model import WanModel
from models.wan.text_encoder import MAX_TEXT_TOKENS, WanTokenizer
from utils.config.dump import config_hash
from utils.config.schema import DatasetConfig, LoadedConfig
from utils.data.cache import CacheStore
from utils.data.fill import FillStats
from utils.data.manifest import Manifest, SkippedFile, build_manifest, default_cache_dir
from utils.data.memo import HashMemo
from utils.data.sampler import BatchPlan
from utils.distributed import Processes, gather_objects, on_every_rank, on_main
from utils.errors import UserError
from utils.files import atomic_write_text, combined_fingerprint
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
    variant = model.arch.variant
    memo = HashMemo(root / MEMO_FILE)

    manifest, hashes = on_main(lambda: _scan(dataset, variant, paths, memo))
    _say_manifest(manifest, say)
    store = on_every_rank(lambda: CacheStore(root))
    cache = WanCache(manifest, store, hashes, config.train.model, variant)
    tokenizer = on_every_rank(lambda: WanTokenizer(paths.tokenizer_dir))
    if processes.is_main:
        _say_long_captions(manifest, tokenizer, say)
    texts = tokenizer if config.train.model.cache_text_embeddings else None
    _fill(cache, paths, processes, texts, regenerate=regenerate, say=say)
    on_every_rank(lambda: model.attach_data(manifest.samples, cache))
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


def needed_items(config: LoadedConfig) -> tuple[set[str], Manifest]:
    """Keys of all items of the cache that training by this configuration reads, and the dataset they come from.

    Reads the files of the dataset and the weights that are new or changed since the cache last saw them.

    Raises:
        UserError: the checkpoint or the dataset is not right.
    """
    dataset, model = config.dataset, config.train.model
    assert dataset is not None, "load_config with check_files has read it"
    root = default_cache_dir(dataset)
    paths = find_checkpoint(model)
    variant = load_arch(paths.config_json, open_transformer(paths.transformer_dir).shapes).variant
    manifest, hashes = _scan(dataset, variant, paths, HashMemo(root / MEMO_FILE))
    return WanCache(manifest, CacheStore(root), hashes, model, variant).keys(), manifest


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


def _say_manifest(manifest: Manifest, say: Say) -> None:
    counts: dict[str, int] = {}
    for sample in manifest.samples:
        counts[str(sample.bucket)] = counts.get(str(sample.bucket), 0) + 1
    buckets = ", ".join(f"{bucket}: {count}" for bucket, count in sorted(counts.items()))
    say(f"dataset: {len(manifest.samples)} samples ({buckets}); {len(manifest.skipped)} files skipped")
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
