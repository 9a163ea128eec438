"""Samples of a run as its cache has them, read and never made: for probes, which change nothing in a run or its cache."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from models.wan.arch import VariantInfo
from models.wan.caching import WanCache
from models.wan.checkpoint import CheckpointPaths, find_checkpoint
from models.wan.datasets import MEMO_FILE, scan_dataset
from models.wan.evaluation import WanEvalBatches
from models.wan.stages import TextWire
from utils.config.experts import first_side
from utils.config.schema import DatasetConfig, TrainConfig
from utils.data.cache import FORMAT_FILE, CacheStore
from utils.data.cache_keys import LATENTS, TEXT
from utils.data.manifest import SampleRecord, default_cache_dir
from utils.data.memo import HashMemo
from utils.data.reasons import caption_identity
from utils.data.sampler import MicroBatch, Visit
from utils.errors import UserError
from utils.layers import PreparedBatch


@dataclass(frozen=True)
class CachedBatches:
    """What `open_cached` found.

    Attributes:
        config: that the micro-batches are made by.
        paths: of the checkpoint.
        batches: the maker of micro-batches.
        samples: those whose latents (and caption, where text states are cached) are in the cache.
        sigmas: the noise levels.
        num_left_out: samples of the dataset that are not in the cache, such as clips that could not be decoded.
    """

    config: TrainConfig
    paths: CheckpointPaths
    batches: WanEvalBatches
    samples: tuple[SampleRecord, ...]
    sigmas: tuple[float, ...]
    num_left_out: int
    _keys: tuple[tuple[str, ...], ...]
    _store: CacheStore
    _instead: str

    def in_order(self) -> list[int]:
        """Indices of the samples, by sample id."""
        return sorted(range(len(self.samples)), key=lambda index: self.samples[index].sample_id)

    def prepare(self, index: int, levels: Sequence[int], *, need_labels: bool) -> PreparedBatch:
        """A micro-batch of one sample at some of the noise levels.

        Raises:
            UserError: an item is damaged. It is left where it is, for the training to make it anew.
        """
        for key in self._keys[index]:
            # Before it is read: reading a damaged item marks it as removed, and a probe writes nothing here.
            damage = self._store.damage(key)
            if damage is not None:
                raise UserError(
                    f"{self._store.root}: the item {key} {damage}; fill the cache with train.py --config ... --cache_only, "
                    f"or {self._instead}"
                )
        visits = tuple(Visit(index, level) for level in levels)
        batch = MicroBatch(visits, self.samples[index].bucket, epoch=0)
        return self.batches.prepare(batch, 1.0, need_inputs=True, need_labels=need_labels)

    def wires(self, num_samples: int) -> list[tuple[str, float, TextWire]]:
        """(sample, sigma, wire) of the first `num_samples` samples, by sample id, at every noise level.

        Raises:
            UserError: as `prepare`.
        """
        found = []
        for index in self.in_order()[:num_samples]:
            for level, sigma in enumerate(self.sigmas):
                prepared = self.prepare(index, (level,), need_labels=False)
                assert prepared.inputs is not None
                found.append((self.batches.describe_sample(index), sigma, TextWire(*prepared.inputs)))
        return found


def open_cached(
    config: TrainConfig,
    dataset: DatasetConfig,
    variant: VariantInfo,
    quantiles: Sequence[float],
    *,
    with_text: bool,
    instead: str,
) -> CachedBatches:
    """Open the cache that a run trains from. Nothing is written there, not even what is found out about files.

    Args:
        config: of the run.
        dataset: of the run.
        variant: of its checkpoint.
        quantiles: of the noise law, one for each noise level.
        with_text: whether micro-batches hold the captions' cached states; else the captions are tokenized.
        instead: what messages offer where the cache does not serve, such as "use --synthetic".

    Raises:
        UserError: there is no cache, or it holds none of this run's samples; or the run caches no text states.
    """
    if with_text and not config.model.cache_text_embeddings:
        raise UserError(
            "model.cache_text_embeddings = false: this run has no cached text states; give the config of a dit_lora run, or "
            f"{instead}"
        )
    # One DiT is looked at: of two experts the first, where the caller has not said which.
    config = replace(config, model=first_side(config.model))
    if not with_text:
        model = replace(config.model, cache_text_embeddings=False, train_text_encoder=True)
        config = replace(config, model=model)
    paths = find_checkpoint(config.model)
    root = default_cache_dir(dataset)
    if not (root / FORMAT_FILE).is_file():
        raise UserError(
            f"{root}: no cache there; fill it with train.py --config ... --cache_only, or {instead}"
        )
    memo = HashMemo(root / MEMO_FILE, read_only=True)
    manifest, hashes = scan_dataset(dataset, variant, paths, memo)
    store = CacheStore(root)
    cache = WanCache(manifest, store, hashes, config.model, variant)
    missing = cache.missing(LATENTS) | (cache.missing(TEXT) if with_text else set())
    # A clip that could not be decoded is never there, and a training goes on without it.
    needed = [
        (sample, keys)
        for sample, keys in zip(
            manifest.samples, _needed_keys(cache, manifest.samples, with_text), strict=True
        )
        if missing.isdisjoint(keys)
    ]
    kept = tuple(sample for sample, _ in needed)
    if not kept:
        raise UserError(
            f"{root}: {len(missing)} item(s) of this run are missing in the cache, or were made with other files, so none of "
            f"its {len(manifest.samples)} samples is whole; fill it with train.py --config ... --cache_only, or {instead}"
        )
    num_left_out = len(manifest.samples) - len(kept)
    if num_left_out:
        cache = cache.of(replace(manifest, samples=kept))
    batches = WanEvalBatches(config, variant, kept, cache, paths.tokenizer_dir, quantiles)
    keys = tuple(keys for _, keys in needed)
    return CachedBatches(config, paths, batches, kept, batches.sigmas, num_left_out, keys, store, instead)


def _needed_keys(cache: WanCache, samples: Sequence[SampleRecord], with_text: bool) -> list[tuple[str, ...]]:
    """Keys of the items that an evaluation reads of each sample: its latents, and the states of its first caption."""
    latents = [want.key for want in cache.wants(LATENTS)]
    if not with_text:
        return [(key,) for key in latents]
    captions = {want.identity: want.key for want in cache.wants(TEXT)}
    return [
        (key, captions[caption_identity(sample.captions[0])])
        for key, sample in zip(latents, samples, strict=True)
    ]
