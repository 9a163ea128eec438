"""Noisy samples of a run's dataset, read from its cache. Nothing is encoded and nothing is written."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from models.wan.arch import VariantInfo
from models.wan.caching import WanCache
from models.wan.checkpoint import find_checkpoint
from models.wan.datasets import MEMO_FILE, scan_dataset
from models.wan.evaluation import WanEvalBatches
from models.wan.probes.logits import LogitInput
from models.wan.stages import TextWire
from utils.config.guardrails import mode_of
from utils.config.load import load_config
from utils.config.schema import TrainConfig
from utils.data.cache import CacheStore
from utils.data.cache_keys import LATENTS, TEXT
from utils.data.manifest import Manifest, SampleRecord, default_cache_dir
from utils.data.memo import HashMemo
from utils.data.reasons import caption_identity
from utils.data.sampler import MicroBatch, Visit
from utils.errors import UserError
from utils.rng import generator

FORMAT_FILE = "FORMAT"


class _AtLevels(WanEvalBatches):
    """As in an evaluation, but at noise levels that are named themselves, not as quantiles."""

    def __init__(
        self,
        config: TrainConfig,
        variant: VariantInfo,
        samples: Sequence[SampleRecord],
        cache: WanCache,
        tokenizer_dir: Path,
        sigmas: Sequence[float],
    ) -> None:
        super().__init__(config, variant, samples, cache, tokenizer_dir, quantiles=())
        self.sigmas = tuple(sigmas)

    def _noise_of(self, sample_id: int, visit: int) -> tuple[torch.Generator, float]:
        sigma = self.sigmas[visit]
        return generator(self._config.seed, "probe", sample_id, repr(sigma)), sigma


def cached_inputs(
    config_path: Path, variant: VariantInfo, sigmas: Sequence[float] | None, num_samples: int, seed: int
) -> tuple[list[LogitInput], list[str]]:
    """Samples of the config's dataset at several noise levels, and remarks.

    Args:
        config_path: of a translator's run (dit_lora).
        variant: of the model that they are for.
        sigmas: noise levels; None: those of the config's evaluations.
        num_samples: how many samples, at most.
        seed: chooses samples and noise.

    Raises:
        UserError: the config is for another mode or variant, or its cache has no sample that is whole.
    """
    loaded = load_config(config_path, check_files=True)
    config, dataset = replace(loaded.train, seed=seed), loaded.dataset
    assert dataset is not None, "load_config with check_files has read it"
    if mode_of(config) != "dit_lora":
        raise UserError(
            f"{config_path}: trains the text encoder, so no text states are cached; give the config of a translator's run, "
            "or probe random inputs with --synthetic"
        )
    paths = find_checkpoint(config.model)
    root = default_cache_dir(dataset)
    if not (root / FORMAT_FILE).is_file():
        raise UserError(f"{root}: there is no cache here; {_remedy(config_path)}")
    memo = HashMemo(root / MEMO_FILE, read_only=True)
    manifest, hashes = scan_dataset(dataset, variant, paths, memo)
    store = CacheStore(root)
    cache = WanCache(manifest, store, hashes, config.model, variant)
    there = _whole_samples(manifest, cache, store, num_samples, seed)
    if not there:
        lacking = len(cache.missing(LATENTS)), len(cache.missing(TEXT))
        raise UserError(
            f"{root}: holds none of the {len(manifest.samples)} samples of {config_path} with latents and caption "
            f"({lacking[0]} latents and {lacking[1]} captions are missing); {_remedy(config_path)}"
        )
    remarks = []
    if len(there) < num_samples:
        remarks.append(
            f"only {len(there)} sample(s) instead of {num_samples}: the dataset's cache has no more"
        )
    batches: WanEvalBatches
    if sigmas is None:
        batches = WanEvalBatches(
            config, variant, manifest.samples, cache, paths.tokenizer_dir, config.eval_quantiles
        )
    else:
        batches = _AtLevels(config, variant, manifest.samples, cache, paths.tokenizer_dir, sigmas)
        law = batches.sigma_law
        if not all(law.min_t <= sigma <= law.max_t for sigma in sigmas):
            remarks.append(
                f"not all of --sigmas are in {law.min_t:g} to {law.max_t:g}, which this model trains on"
            )
    visits = [(index, level) for index in there for level in range(len(batches.sigmas))]
    return [_input(batches, manifest, index, level) for index, level in visits], remarks


def _remedy(config_path: Path) -> str:
    return f"fill it with `python train.py --config {config_path} --cache_only`, or probe random inputs with --synthetic"


def _whole_samples(
    manifest: Manifest, cache: WanCache, store: CacheStore, wanted: int, seed: int
) -> list[int]:
    """Indices of up to `wanted` samples, in an order that the seed draws, whose latents and first caption are whole."""
    latents = [want.key for want in cache.wants(LATENTS)]
    text = {want.identity: want.key for want in cache.wants(TEXT)}
    order = torch.randperm(len(latents), generator=generator(seed, "probe_samples")).tolist()
    found: list[int] = []
    for index in order:
        caption = text[caption_identity(manifest.samples[index].captions[0])]
        # `damage` first: reading a damaged item would mark it as removed, and nothing is written here.
        if all(store.has(key) and store.damage(key) is None for key in (latents[index], caption)):
            found.append(index)
        if len(found) == wanted:
            break
    return found


def _input(batches: WanEvalBatches, manifest: Manifest, index: int, level: int) -> LogitInput:
    bucket = manifest.samples[index].bucket
    prepared = batches.prepare(
        MicroBatch((Visit(index, level),), bucket, epoch=0), 1.0, need_inputs=True, need_labels=False
    )
    assert prepared.inputs is not None
    wire = TextWire(*prepared.inputs)
    return LogitInput(wire.latents_BCFHW, wire.timesteps_BT, wire.text, batches.sigmas[level])
