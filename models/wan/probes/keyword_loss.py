"""The denoising loss when the caption is a keyword alone, with the base's states of it and with the tuned encoder's.

On cached samples of the run whose captions hold the keyword, with the noise and noise levels of an evaluation, so that
the two sides differ by the text states alone. The DiT runs layer by layer: each is read, takes all micro-batches of
both sides through, and is dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from models.wan.arch import load_arch
from models.wan.checkpoint import find_checkpoint, open_transformer
from models.wan.layers import Workload, dit_layers
from models.wan.probes.cached_samples import CachedBatches, open_cached
from models.wan.probes.encoder_prompts import Entry
from models.wan.stages import TextWire
from utils.config.keywords import keyword_pattern
from utils.config.load import load_config
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


def open_samples(config_path: Path, seed: int, overrides: Sequence[str] = ()) -> CachedBatches:
    """The run's dataset as an evaluation sees it, without text. Reads only: nothing is encoded or written.

    Args:
        config_path: of the run.
        seed: of the noise.
        overrides: of the config, as `load_config` takes them.

    Raises:
        UserError: the dataset, the checkpoint or the cache is not there, or no sample is in the cache.
    """
    loaded = load_config(config_path, overrides, check_files=True)
    config, dataset = replace(loaded.train, seed=seed), loaded.dataset
    assert dataset is not None, "load_config with check_files has read it"
    paths = find_checkpoint(config.model)
    variant = load_arch(paths.config_json, open_transformer(paths.transformer_dir).shapes).variant
    instead = "leave --denoise_samples out"
    return open_cached(config, dataset, variant, config.eval_quantiles, with_text=False, instead=instead)


def samples_holding(data: CachedBatches, keyword: str, count: int) -> list[int]:
    """Indices of the first `count` samples, by id, whose first caption holds the keyword as whole words."""
    pattern = keyword_pattern([keyword], case_insensitive=True)
    found = [index for index in data.in_order() if pattern.search(data.samples[index].captions[0])]
    return found[:count]


def keyword_losses(
    data: CachedBatches,
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
    chosen = [(entry, samples_holding(data, entry.text, samples_per_keyword)) for entry in keywords]
    chosen = [(entry, indices) for entry, indices in chosen if indices]
    wires: list[Any] = []
    labels: list[tuple[Tensor, ...]] = []
    for entry, indices in chosen:
        for index in indices:
            prepared = data.prepare(index, range(len(data.sigmas)), need_labels=True)
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


def _with_text(prepared: PreparedBatch, states_LD: Tensor) -> TextWire:
    assert prepared.inputs is not None, "asked for"
    wire = TextWire(*prepared.inputs)
    count = len(wire.lens_B)
    text = states_LD.float().expand(count, *states_LD.shape)
    return wire._replace(text=text, lens_B=torch.full((count,), len(states_LD), dtype=torch.int64))


@torch.no_grad()
def _losses(
    data: CachedBatches, wires: list[Any], labels: Sequence[tuple[Tensor, ...]], device: torch.device
) -> list[float]:
    """The mean loss of each micro-batch. One layer of the DiT is in memory at a time."""
    config = replace(data.config, blocks_to_swap=0, activation_checkpointing=False, compile=False)
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
