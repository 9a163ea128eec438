"""What tuning changed in UMT5's states: per prompt, per layer, behind the DiT's text embedding, and among neighbours.

The measure of one prompt is `utils.text_drift.compare_states`; all else here is that measure over groups and layers, or
a statement about neighbours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor
from torch.nn import functional

from models.wan.probes.base import open_official
from models.wan.probes.encoder_prompts import GROUPS, Entry, Group, PromptPlan
from models.wan.probes.encoder_stream import LayerStates
from utils.errors import UserError
from utils.text_drift import StateDrift, compare_states

_TEXT_EMBEDDING = ("text_embedding.0", "text_embedding.2")


@dataclass(frozen=True)
class LayerDrift:
    """A layer: how far its weights moved, and by group how far the states behind it did.

    Attributes:
        layer: its name.
        weight_change: see `LayerStates`.
        drift: 1 - mean over prompts of the cosine, by group.
        distance: mean over prompts of ||tuned - base||_F / ||base||_F, by group.
    """

    layer: str
    weight_change: float
    drift: dict[Group, float]
    distance: dict[Group, float]


@dataclass(frozen=True)
class PromptDrift:
    """One prompt, behind the final norm; `dit` behind the DiT's text embedding, where a DiT was given.

    `neighbours_kept` is the Jaccard index of its nearest landmarks before and after.
    """

    entry: Entry
    num_tokens: int
    states: StateDrift
    dit: StateDrift | None
    neighbours_kept: float


@dataclass(frozen=True)
class GroupDrift:
    """Means and medians over the prompts of a group."""

    num_prompts: int
    mean_cosine: float
    median_cosine: float
    min_cosine: float
    mean_pooled_cosine: float
    mean_norm_ratio: float
    median_norm_ratio: float
    mean_distance: float
    dit_mean_cosine: float | None
    dit_median_cosine: float | None
    neighbours_kept: float

    @property
    def drift(self) -> float:
        """1 - mean cosine: the same as `utils.text_drift.mean_drift`."""
        return 1.0 - self.mean_cosine


class LayerRecorder:
    """Called behind every layer by `stream_states`; keeps numbers, not states."""

    def __init__(self, plan: PromptPlan, place: dict[str, int]) -> None:
        self._members: dict[Group, list[int]] = {
            group: [place[entry.text] for entry in plan.of(group)] for group in GROUPS
        }
        self.layers: list[LayerDrift] = []

    def __call__(self, seen: LayerStates) -> None:
        """Measure one layer."""
        drift: dict[Group, float] = {}
        distance: dict[Group, float] = {}
        for group, members in self._members.items():
            if members:
                found = [compare_states(seen.base[index], seen.tuned[index]) for index in members]
                drift[group] = 1.0 - fmean(one.cosine for one in found)
                distance[group] = fmean(one.distance for one in found)
        self.layers.append(LayerDrift(seen.layer, seen.weight_change, drift, distance))


def measure_prompts(
    plan: PromptPlan,
    place: dict[str, int],
    base: Sequence[Tensor],
    tuned: Sequence[Tensor],
    embed: Callable[[Tensor], Tensor] | None,
    num_neighbours: int,
) -> list[PromptDrift]:
    """One record per entry of the plan.

    Args:
        plan: the entries.
        place: where a text's states are.
        base, tuned: states behind the final norm, [L, D].
        embed: the DiT's text embedding, None without a DiT.
        num_neighbours: k of the nearest neighbours; landmarks are the neutral prompts.
    """
    pooled = [
        torch.stack([side[place[entry.text]].double().mean(0) for entry in plan.entries])
        for side in (base, tuned)
    ]
    landmarks = [index for index, entry in enumerate(plan.entries) if entry.group == "neutral"]
    kept = neighbours_kept(pooled[0], pooled[1], landmarks, num_neighbours)
    records = []
    for number, entry in enumerate(plan.entries):
        index = place[entry.text]
        states = compare_states(base[index], tuned[index])
        dit = compare_states(embed(base[index]), embed(tuned[index])) if embed is not None else None
        records.append(PromptDrift(entry, len(base[index]), states, dit, kept[number]))
    return records


def neighbours_kept(base_ND: Tensor, tuned_ND: Tensor, landmarks: Sequence[int], count: int) -> list[float]:
    """Jaccard index of each row's `count` nearest landmarks before and after, by cosine; a row is not its own neighbour.

    Both sets of vectors are taken relative to their landmarks' mean: text states share a large common part, which makes
    all cosines alike (Mu and Viswanath 2018, "All-but-the-Top"). 1: the same neighbours, 0: none in common.
    """
    similar = []
    for vectors in (base_ND, tuned_ND):
        centred = functional.normalize(vectors - vectors[list(landmarks)].mean(0), dim=1)
        similar.append(centred @ centred[list(landmarks)].T)
    kept = []
    for row in range(len(base_ND)):
        nearest = []
        for scores in similar:
            others = [place for place, landmark in enumerate(landmarks) if landmark != row]
            others.sort(key=lambda place: (-float(scores[row, place]), place))
            nearest.append(set(others[:count]))
        union = nearest[0] | nearest[1]
        kept.append(len(nearest[0] & nearest[1]) / len(union) if union else 1.0)
    return kept


def summarise_group(records: Sequence[PromptDrift], group: Group) -> GroupDrift | None:
    """Means and medians of one group; None where it has no prompt."""
    found = [record for record in records if record.entry.group == group]
    if not found:
        return None
    cosines = [record.states.cosine for record in found]
    ratios = [record.states.norm_ratio for record in found]
    behind_dit = [record.dit.cosine for record in found if record.dit is not None]
    return GroupDrift(
        num_prompts=len(found),
        mean_cosine=fmean(cosines),
        median_cosine=median(cosines),
        min_cosine=min(cosines),
        mean_pooled_cosine=fmean(record.states.pooled_cosine for record in found),
        mean_norm_ratio=fmean(ratios),
        median_norm_ratio=median(ratios),
        mean_distance=fmean(record.states.distance for record in found),
        dit_mean_cosine=fmean(behind_dit) if behind_dit else None,
        dit_median_cosine=median(behind_dit) if behind_dit else None,
        neighbours_kept=fmean(record.neighbours_kept for record in found),
    )


def load_text_embedding(
    transformer: Path, text_dim: int, device: torch.device | None = None
) -> Callable[[Tensor], Tensor]:
    """The DiT's two-layer `text_embedding` in float32, as a function [L, text_dim] -> [L, dim]; reads its four tensors only.

    On `device`, by default the CPU.

    Raises:
        UserError: the file holds no DiT, or one that takes text states of another width.
    """
    source = open_official(transformer)
    names = _TEXT_EMBEDDING
    missing = [
        f"{name}.{leaf}"
        for name in names
        for leaf in ("weight", "bias")
        if f"{name}.{leaf}" not in source.shapes
    ]
    if missing:
        raise UserError(f"{transformer}: has no {missing[0]}, so it is no whole DiT; check --base")
    width = source.shapes[f"{names[0]}.weight"][-1]
    if width != text_dim:
        raise UserError(
            f"{transformer}: takes text states of width {width}, but the encoders give {text_dim}; give the DiT of the "
            "same checkpoint with --base"
        )
    first, last = (
        tuple(
            source.get(f"{name}.{leaf}").to(device=device, dtype=torch.float32, copy=True)
            for leaf in ("weight", "bias")
        )
        for name in names
    )
    source.release()

    def embed(states_LD: Tensor) -> Tensor:
        hidden = functional.gelu(functional.linear(states_LD.float(), *first), approximate="tanh")
        return functional.linear(hidden, *last)

    return embed
