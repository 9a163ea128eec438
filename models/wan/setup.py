"""From a checked configuration to data that is ready to train on, and the facts that go into every output file."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import xxhash

from models.wan.arch import VariantInfo, load_arch
from models.wan.caching import WanCache, WeightHashes
from models.wan.checkpoint import CheckpointPaths, find_checkpoint, open_transformer
from models.wan.datasets import (
    CachedDataset,
    CacheUse,
    Say,
    cache_dataset,
    data_fingerprint,
    scan_dataset,
)
from models.wan.evaluation import WanEvalBatches
from models.wan.kernels import attention_in_use, check_device
from models.wan.layouts import weight_files
from models.wan.media import MEMO_FILE
from models.wan.model import WanModel
from models.wan.prompts import neutral_prompts
from models.wan.text_encoder import MAX_TEXT_TOKENS
from utils.config.dump import config_hash
from utils.config.schema import LoadedConfig, TrainConfig
from utils.data.cache import CacheStore
from utils.data.inspect import file_rows
from utils.data.manifest import Manifest, SkippedFile, default_cache_dir
from utils.data.memo import HashMemo
from utils.data.sampler import BatchPlan
from utils.distributed import Processes, on_every_rank, on_main
from utils.evaluate import EvalSet
from utils.files import atomic_write_text, combined_fingerprint
from utils.lora_targets import describe_targets
from utils.nodes import check_same_inputs, check_shared

THE_DIT = "the DiT"
TARGETS_FILE = "targets.json"
BASE_KEYS_FILE = "base_keys.csv"
DATASET_FILE = "dataset.csv"


@dataclass(frozen=True)
class PreparedData:
    """Data ready to train on; `fingerprints` and `descriptions` say by what names and contents a run is known again.

    `cached` is what a model with the same data and the same encoders needs of it.
    """

    manifest: Manifest
    plan: BatchPlan
    hashes: WeightHashes
    store_root: Path
    fingerprints: dict[str, str]
    descriptions: dict[str, str]
    cached: CachedDataset


@dataclass(frozen=True)
class Prepared:
    """A model with its data, ready to be built; `eval_cached` as `PreparedData.cached`."""

    config: LoadedConfig
    model: WanModel
    data: PreparedData
    evals: list[EvalSet]
    eval_cached: list[CachedDataset]


def prepare(
    config: LoadedConfig,
    processes: Processes,
    use: CacheUse,
    say: Say,
    like: Prepared | None = None,
) -> Prepared:
    """Open the checkpoint, fill the caches, attach the data. Every rank must call it.

    Args:
        config: of one run.
        processes: this one among all.
        use: what the command line says about the cache.
        say: speaks for all.
        like: a run of the other expert with the same data, which is then not scanned again.

    Raises:
        UserError: on every rank: weights, targets or data are not right.
    """
    on_every_rank(lambda: check_device(config.train, processes.device))
    attention = attention_in_use(config.train, processes.device)
    if attention != "torch":
        say(f"attention of the DiT: {attention}")
    paths = on_every_rank(lambda: find_checkpoint(config.train.model))
    model = on_every_rank(lambda: WanModel(config.train, paths))
    check_nodes(config, model, paths, processes)
    data = prepare_data(config, model, paths, processes, use, say, like.data.cached if like else None)
    cached = like.eval_cached if like else cache_eval_datasets(config, model, paths, processes, use, say)
    return Prepared(config, model, data, build_eval_sets(config, model, cached, say), cached)


def prepare_data(
    config: LoadedConfig,
    model: WanModel,
    paths: CheckpointPaths,
    processes: Processes,
    use: CacheUse,
    say: Say,
    cached: CachedDataset | None = None,
) -> PreparedData:
    """Scan the dataset, fill the cache with what is missing (each rank a share), and attach both to the model.

    With `cached` the first two have been done, for a model with the same encoders.

    Raises:
        UserError: the dataset is empty or unreadable, on every rank.
    """
    if cached is None:
        assert config.dataset is not None, "load_config with check_files has read it"
        cached = cache_dataset(
            config.dataset, "dataset", config.train, model.arch.variant, paths, processes, use, say
        )
    manifest, hashes = cached.manifest, cached.hashes
    on_every_rank(lambda: model.attach_data(manifest.samples, cached.cache))
    for line in model.describe():
        say(line)
    plan = BatchPlan(manifest.samples, config.train.micro_batch_size_per_gpu, config.train.seed)
    fingerprints = {
        "the dataset": data_fingerprint(manifest),
        THE_DIT: on_main(lambda: combined_fingerprint(model.base_files)),
        "the VAE": hashes.vae,
        "the text encoder": hashes.text_encoder,
        "the tokenizer": hashes.tokenizer,
    }
    num_files = len({sample.path for sample in manifest.samples})
    descriptions = {
        "the dataset": f"{len(manifest.samples)} samples of {num_files} files",
        THE_DIT: (
            " and ".join(dict.fromkeys(str(file.parent) for file in model.base_files))
            if model.second is not None
            else str(paths.transformer_dir)
        ),
        "the VAE": str(paths.vae),
        "the text encoder": str(paths.text_encoder),
        "the tokenizer": str(paths.tokenizer_dir),
    }
    if model.batches.caption_aug is not None:
        fingerprints["the keywords"] = model.batches.caption_aug.keywords_digest
        descriptions["the keywords"] = "a list of keywords"
    budget = config.train.budget
    if budget is not None and budget.max_neutral_drift is not None:
        prompts = on_main(lambda: neutral_prompts(budget.neutral_prompts))
        fingerprints["the neutral prompts"] = xxhash.xxh3_128_hexdigest(json.dumps(prompts).encode())
        descriptions["the neutral prompts"] = f"{len(prompts)} prompts"
    return PreparedData(manifest, plan, hashes, cached.root, fingerprints, descriptions, cached)


def cache_eval_datasets(
    config: LoadedConfig,
    model: WanModel,
    paths: CheckpointPaths,
    processes: Processes,
    use: CacheUse,
    say: Say,
) -> list[CachedDataset]:
    """Scan the datasets that are evaluated, and fill their caches.

    Raises:
        UserError: one of them is empty or unreadable, on every rank.
    """
    train, variant = config.train, model.arch.variant
    return [
        cache_dataset(dataset, f"eval dataset {named.label}", train, variant, paths, processes, use, say)
        for named, dataset in zip(train.eval_datasets, config.eval_datasets, strict=True)
    ]


def build_eval_sets(
    config: LoadedConfig, model: WanModel, cached: Sequence[CachedDataset], say: Say
) -> list[EvalSet]:
    """What is evaluated of these datasets with this model."""
    train, sets = config.train, []
    for named, one in zip(train.eval_datasets, cached, strict=True):
        label = f"eval dataset {named.label}"
        batches = model.eval_batches(one.manifest.samples, one.cache, train.eval_quantiles)
        levels = ", ".join(f"{sigma:.3g}" for sigma in batches.sigmas)
        say(f"{label}: each sample at {len(batches.sigmas)} noise level(s): {levels}")
        sets.append(_eval_set(named.label, one, batches, train))
        videos = one.videos(model.arch.variant) if train.model.first_frame_prob > 0 else None
        if videos is not None:
            samples, name = videos.manifest.samples, named.first_frame_label
            clean = model.eval_batches(samples, videos.cache, train.eval_quantiles, first_frame=True)
            sets.append(_eval_set(name, videos, clean, train))
            say(f"{label}: its {len(samples)} video sample(s) again with a clean first frame, as {name}")
    return sets


def _eval_set(name: str, cached: CachedDataset, batches: WanEvalBatches, train: TrainConfig) -> EvalSet:
    facts = [data_fingerprint(cached.manifest), train.seed, batches.sigmas]
    # Nothing more of the usual evaluation, so that it keeps its identity.
    facts += ["first frame"] if batches.first_frame else []
    identity = xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())
    return EvalSet(name, cached.manifest.samples, train.eval_quantiles, identity, batches)


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
    weights = {
        THE_DIT: model.base_files,
        "the VAE": weight_files(paths.vae),
        "the text encoder": weight_files(paths.text_encoder),
    }
    # Names and sizes: reading 100 GB on every machine only to compare would cost minutes.
    for what, files in weights.items():
        facts[what] = ", ".join(f"{Path(file).name} {Path(file).stat().st_size}" for file in files)
    check_same_inputs(facts, processes)
    roots = dict.fromkeys(default_cache_dir(dataset) for dataset in datasets)
    check_shared({f"the cache {root}": root for root in roots}, processes)


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
    variant = load_arch(paths.config_json, open_transformer(paths.transformer_dir).shapes).variant
    keys: set[str] = set()
    skipped: list[SkippedFile] = []
    for dataset in datasets:
        manifest, hashes = scan_dataset(dataset, variant, paths, HashMemo(root / MEMO_FILE))
        keys |= WanCache(manifest, CacheStore(root), hashes, model, variant).keys()
        skipped += manifest.skipped
    return keys, skipped


def write_inputs(model: WanModel, data: PreparedData, run_dir: Path) -> None:
    """Save what the run rests on: the base checkpoint's header, the resolved targets, what became of each media file."""
    rows = [
        {"key": name, "shape": "x".join(map(str, shape)), "dtype": model.base.dtypes[name]}
        for name, shape in model.base.shapes.items()
    ]
    atomic_write_text(run_dir / BASE_KEYS_FILE, pd.DataFrame(rows).to_csv(index=False))
    files = [asdict(row) for row in file_rows(data.manifest, model.arch.variant.fps, None, MAX_TEXT_TOKENS)]
    atomic_write_text(run_dir / DATASET_FILE, pd.DataFrame(files).to_csv(index=False))
    if model.targets:
        atomic_write_text(run_dir / TARGETS_FILE, json.dumps(model.targets, indent=1) + "\n")


def run_metadata(config: LoadedConfig, model: WanModel, data: PreparedData) -> dict[str, str]:
    """Facts that every exported file carries in its header."""
    return file_metadata(
        config.train, model.arch.variant, data.fingerprints[THE_DIT], data.hashes.text_encoder, model.targets
    )


def file_metadata(
    config: TrainConfig, variant: VariantInfo, base_hash: str, encoder_hash: str, targets: Sequence[str]
) -> dict[str, str]:
    """The same from its parts: `base_hash` of the DiT's files, `encoder_hash` of the text encoder that it is for."""
    metadata = {
        "format": "pt",
        "project_version": version("ai-model-sandbox"),
        "variant": variant.name,
        "expert": config.model.expert or "none",
        "boundary": "none" if variant.boundary is None else str(variant.boundary),
        "base_hash": base_hash,
        "encoder_hash": encoder_hash,
        "config_hash": config_hash(config),
        "seed": str(config.seed),
    }
    if config.adapter is not None:
        metadata |= {"rank": str(config.adapter.rank), "num_targets": str(len(targets))}
        metadata["targets"] = "; ".join(describe_targets(targets))
    return metadata
