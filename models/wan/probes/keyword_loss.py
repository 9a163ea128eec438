"""The denoising loss when the caption is a keyword alone, with the base's states of it and with the tuned encoder's.

On cached samples of the run whose captions hold the keyword, with the noise and noise levels of an evaluation, so that
the two sides differ by the text states alone. The DiT runs layer by layer: each is read, takes all micro-batches of
both sides through, and is dropped.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from models.wan.arch import load_arch
from models.wan.caching import WanCache
from models.wan.checkpoint import CheckpointPaths, find_checkpoint, open_transformer
from models.wan.datasets import MEMO_FILE, scan_dataset
from models.wan.evaluation import WanEvalBatches
from models.wan.layers import Workload, dit_layers
from models.wan.probes.encoder_prompts import Entry
from models.wan.stages import TextWire
from utils.config.load import load_config
from utils.config.schema import TrainConfig
from utils.data.cache import CacheStore
from utils.data.cache_keys import LATENTS
from utils.data.manifest import SampleRecord, default_cache_dir
from utils.data.memo import HashMemo
from utils.data.sampler import MicroBatch, Visit
from utils.errors import UserError
from utils.flow_matching import per_sample_loss
from utils.layers import PreparedBatch
from utils.paired import Paired, paired_difference


@dataclass(frozen=True)
class KeywordLoss:
    """A keyword's losses, means over samples and noise levels, and tuned - base with its 95 % interval over samples."""

    entry: Entry
    num_samples: int
    base: float
    tuned: float
    change: Paired


@dataclass(frozen=True)
class CachedSamples:
    """Samples of a run, those of them whose latents are in the cache, and what makes micro-batches of them."""

    config: TrainConfig
    samples: Sequence[SampleRecord]
    cached: frozenset[int]
    batches: WanEvalBatches
    paths: CheckpointPaths

    def holding(self, keyword: str, count: int) -> list[int]:
        """Indices of the first `count` cached samples, by id, whose first caption holds the keyword as whole words."""
        words = r"\s+".join(map(re.escape, keyword.split()))
        pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)
        found = [index for index in self.cached if pattern.search(self.samples[index].captions[0])]
        return sorted(found, key=lambda index: self.samples[index].sample_id)[:count]


def open_samples(config_path: Path, seed: int) -> CachedSamples:
    """The run's dataset as an evaluation sees it. Reads only: nothing is encoded or written.

    Args:
        config_path: of the run.
        seed: of the noise.

    Raises:
        UserError: the dataset, the checkpoint or the cache is not there, or no sample is in the cache.
    """
    loaded = load_config(config_path, check_files=True)
    config, dataset = replace(loaded.train, seed=seed), loaded.dataset
    assert dataset is not None, "load_config with check_files has read it"
    root = default_cache_dir(dataset)
    if not root.is_dir():
        raise UserError(
            f"{root}: holds no cache of the run's dataset; train first, or leave --denoise_samples out"
        )
    paths = find_checkpoint(config.model)
    variant = load_arch(paths.config_json, open_transformer(paths.transformer_dir).shapes).variant
    manifest, hashes = scan_dataset(dataset, variant, paths, HashMemo(root / MEMO_FILE, read_only=True))
    cache = WanCache(manifest, CacheStore(root), hashes, config.model, variant)
    missing = cache.missing(LATENTS)
    cached = frozenset(index for index, want in enumerate(cache.wants(LATENTS)) if want.key not in missing)
    if not cached:
        raise UserError(
            f"{root}: holds no latents of the run's dataset; train first, or leave --denoise_samples out"
        )
    batches = WanEvalBatches(
        config, variant, manifest.samples, cache, paths.tokenizer_dir, config.eval_quantiles
    )
    return CachedSamples(config, manifest.samples, cached, batches, paths)


def keyword_losses(
    data: CachedSamples,
    keywords: Sequence[Entry],
    place: dict[str, int],
    base: Sequence[Tensor],
    tuned: Sequence[Tensor],
    samples_per_keyword: int,
    device: torch.device,
) -> list[KeywordLoss]:
    """One record per keyword that a cached sample's caption holds.

    Args:
        data: the samples.
        keywords: the entries.
        place: where a keyword's states are.
        base, tuned: states behind the final norm, [L, D].
        samples_per_keyword: at most.
        device: where the DiT runs, one layer at a time.
    """
    chosen = [(entry, data.holding(entry.text, samples_per_keyword)) for entry in keywords]
    chosen = [(entry, indices) for entry, indices in chosen if indices]
    wires: list[Any] = []
    labels: list[tuple[Tensor, ...]] = []
    for entry, indices in chosen:
        for index in indices:
            prepared = _prepare(data, index)
            for side in (base, tuned):
                wires.append(_with_text(prepared, side[place[entry.text]]))
                assert prepared.labels is not None, "asked for"
                labels.append(prepared.labels)
    losses = iter(_losses(data, wires, labels, device))
    records = []
    for entry, indices in chosen:
        pairs = [(next(losses), next(losses)) for _ in indices]
        before, after = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        records.append(
            KeywordLoss(entry, len(indices), fmean(before), fmean(after), paired_difference(after, before))
        )
    return records


def _prepare(data: CachedSamples, index: int) -> PreparedBatch:
    """One sample at every noise level of an evaluation."""
    visits = tuple(Visit(index, quantile) for quantile in range(len(data.config.eval_quantiles)))
    batch = MicroBatch(visits, data.samples[index].bucket, epoch=0)
    return data.batches.prepare(batch, 1.0, need_inputs=True, need_labels=True)


def _with_text(prepared: PreparedBatch, states_LD: Tensor) -> TextWire:
    assert prepared.inputs is not None, "asked for"
    wire = TextWire(*prepared.inputs)
    count = len(wire.lens_B)
    text = states_LD.float().expand(count, *states_LD.shape)
    return wire._replace(text=text, lens_B=torch.full((count,), len(states_LD), dtype=torch.int64))


@torch.no_grad()
def _losses(
    data: CachedSamples, wires: list[Any], labels: Sequence[tuple[Tensor, ...]], device: torch.device
) -> list[float]:
    """The mean loss of each micro-batch. One layer of the DiT is in memory at a time."""
    config = replace(data.config, blocks_to_swap=0, activation_checkpointing=False)
    source = open_transformer(data.paths.transformer_dir)
    arch = load_arch(data.paths.config_json, source.shapes)
    for spec in dit_layers(config, source, arch, (), {}, Workload(1.0, 1.0)):
        layer = spec.build(device)
        for number, wire in enumerate(wires):
            wires[number] = layer(tuple(tensor.to(device) for tensor in wire))
    found = []
    for velocity_BCFHW, (target_BCFHW, _, _, _, *mask_BFHW) in zip(wires, labels, strict=True):
        found.append(float(per_sample_loss(velocity_BCFHW.cpu(), target_BCFHW, *mask_BFHW).mean()))
    return found
