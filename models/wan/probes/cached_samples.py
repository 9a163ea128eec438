"""Samples of a run as its cache has them, read and never made: for probes, which change nothing in a run or its cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.wan.arch import VariantInfo
from models.wan.caching import WanCache, hash_weights, media_rules
from models.wan.checkpoint import find_checkpoint
from models.wan.datasets import MEMO_FILE, without_images
from models.wan.evaluation import WanEvalBatches
from models.wan.stages import TextWire
from utils.config.schema import DatasetConfig, TrainConfig
from utils.data.cache import CacheStore
from utils.data.cache_keys import LATENTS, TEXT
from utils.data.manifest import SampleRecord, build_manifest, default_cache_dir
from utils.data.memo import HashMemo
from utils.data.sampler import MicroBatch, Visit
from utils.errors import UserError


@dataclass(frozen=True)
class CachedBatches:
    """What `open_cached` found: the maker of micro-batches, the samples, and the noise levels."""

    batches: WanEvalBatches
    samples: tuple[SampleRecord, ...]
    sigmas: tuple[float, ...]

    def wires(self, num_samples: int) -> list[tuple[str, float, TextWire]]:
        """(sample, sigma, wire) of the first `num_samples` samples, by sample id, at every noise level."""
        order = sorted(range(len(self.samples)), key=lambda index: self.samples[index].sample_id)
        found = []
        for index in order[:num_samples]:
            for number, sigma in enumerate(self.sigmas):
                batch = MicroBatch((Visit(index, number),), self.samples[index].bucket, epoch=0)
                prepared = self.batches.prepare(batch, 1.0, need_inputs=True, need_labels=False)
                assert prepared.inputs is not None
                found.append((self.batches.describe_sample(index), sigma, TextWire(*prepared.inputs)))
        return found


def open_cached(
    config: TrainConfig, dataset: DatasetConfig, variant: VariantInfo, quantiles: Sequence[float]
) -> CachedBatches:
    """Open the cache that a run trains from, and check that it is complete.

    Raises:
        UserError: there is no cache, or items of this run are missing in it; or the run caches no text states.
    """
    if not config.model.cache_text_embeddings:
        raise UserError(
            "model.cache_text_embeddings = false: this run has no cached text states; give the config of a dit_lora run, or "
            "--synthetic"
        )
    paths = find_checkpoint(config.model)
    root = default_cache_dir(dataset)
    if not (root / MEMO_FILE).is_file():
        raise UserError(
            f"{root}: no cache there; fill it with train.py --config ... --cache_only, or use --synthetic"
        )
    memo = HashMemo(root / MEMO_FILE)
    manifest = build_manifest(dataset, media_rules(variant), memo)
    if variant.model_type == "i2v":
        manifest = without_images(manifest)
    cache = WanCache(manifest, CacheStore(root), hash_weights(paths, memo), config.model, variant)
    missing = len(cache.missing(LATENTS)) + len(cache.missing(TEXT))
    if missing:
        raise UserError(
            f"{root}: {missing} item(s) of this run are missing in the cache, or were made with other files; fill it with "
            "train.py --config ... --cache_only, or use --synthetic"
        )
    batches = WanEvalBatches(config, variant, manifest.samples, cache, Path(paths.tokenizer_dir), quantiles)
    return CachedBatches(batches, manifest.samples, batches.sigmas)
