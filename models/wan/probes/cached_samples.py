"""Samples of a run as its cache has them, read and never made: for probes, which change nothing in a run or its cache."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from models.wan.arch import VariantInfo
from models.wan.caching import WanCache
from models.wan.checkpoint import find_checkpoint
from models.wan.datasets import MEMO_FILE, scan_dataset
from models.wan.evaluation import WanEvalBatches
from models.wan.stages import TextWire
from utils.config.schema import DatasetConfig, TrainConfig
from utils.data.cache import FORMAT_FILE, CacheStore
from utils.data.cache_keys import LATENTS, TEXT
from utils.data.manifest import SampleRecord, default_cache_dir
from utils.data.memo import HashMemo
from utils.data.reasons import caption_identity
from utils.data.sampler import MicroBatch, Visit
from utils.errors import UserError


@dataclass(frozen=True)
class CachedBatches:
    """What `open_cached` found.

    Attributes:
        batches: the maker of micro-batches.
        samples: those whose latents and caption are in the cache.
        sigmas: the noise levels.
        num_left_out: samples of the dataset that are not in the cache, such as clips that could not be decoded.
    """

    batches: WanEvalBatches
    samples: tuple[SampleRecord, ...]
    sigmas: tuple[float, ...]
    num_left_out: int
    _cache: WanCache
    _store: CacheStore

    def wires(self, num_samples: int) -> list[tuple[str, float, TextWire]]:
        """(sample, sigma, wire) of the first `num_samples` samples, by sample id, at every noise level.

        Raises:
            UserError: an item is damaged. It is left where it is, for the training to make it anew.
        """
        order = sorted(range(len(self.samples)), key=lambda index: self.samples[index].sample_id)
        latents = [want.key for want in self._cache.wants(LATENTS)]
        captions = _keys_of_captions(self._cache)
        found = []
        for index in order[:num_samples]:
            for key in (latents[index], captions[caption_identity(self.samples[index].captions[0])]):
                # Before it is read: reading a damaged item marks it as removed, and a probe writes nothing here.
                damage = self._store.damage(key)
                if damage is not None:
                    raise UserError(
                        f"{self._store.root}: the item {key} {damage}; fill the cache with train.py --config ... --cache_only, "
                        "or use --synthetic"
                    )
            for number, sigma in enumerate(self.sigmas):
                batch = MicroBatch((Visit(index, number),), self.samples[index].bucket, epoch=0)
                prepared = self.batches.prepare(batch, 1.0, need_inputs=True, need_labels=False)
                assert prepared.inputs is not None
                found.append((self.batches.describe_sample(index), sigma, TextWire(*prepared.inputs)))
        return found


def open_cached(
    config: TrainConfig, dataset: DatasetConfig, variant: VariantInfo, quantiles: Sequence[float]
) -> CachedBatches:
    """Open the cache that a run trains from. Nothing is written there, not even what is found out about files.

    Raises:
        UserError: there is no cache, or it holds none of this run's samples; or the run caches no text states.
    """
    if not config.model.cache_text_embeddings:
        raise UserError(
            "model.cache_text_embeddings = false: this run has no cached text states; give the config of a dit_lora run, or "
            "--synthetic"
        )
    paths = find_checkpoint(config.model)
    root = default_cache_dir(dataset)
    if not (root / FORMAT_FILE).is_file():
        raise UserError(
            f"{root}: no cache there; fill it with train.py --config ... --cache_only, or use --synthetic"
        )
    memo = HashMemo(root / MEMO_FILE, read_only=True)
    manifest, hashes = scan_dataset(dataset, variant, paths, memo)
    store = CacheStore(root)
    cache = WanCache(manifest, store, hashes, config.model, variant)
    missing = cache.missing(LATENTS) | cache.missing(TEXT)
    captions = _keys_of_captions(cache)
    # A clip that could not be decoded is never there, and a training goes on without it.
    kept = tuple(
        sample
        for sample, want in zip(manifest.samples, cache.wants(LATENTS), strict=True)
        if want.key not in missing and captions[caption_identity(sample.captions[0])] not in missing
    )
    if not kept:
        raise UserError(
            f"{root}: {len(missing)} item(s) of this run are missing in the cache, or were made with other files, so none of "
            f"its {len(manifest.samples)} samples is whole; fill it with train.py --config ... --cache_only, or use --synthetic"
        )
    num_left_out = len(manifest.samples) - len(kept)
    if num_left_out:
        cache = cache.of(replace(manifest, samples=kept))
    batches = WanEvalBatches(config, variant, kept, cache, paths.tokenizer_dir, quantiles)
    return CachedBatches(batches, kept, batches.sigmas, num_left_out, cache, store)


def _keys_of_captions(cache: WanCache) -> dict[str, str]:
    """Keys by `caption_identity`."""
    return {want.identity: want.key for want in cache.wants(TEXT)}
