"""What the logit probe finds out, per head and per block, and how it is judged. No torch."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean
from typing import Literal

from utils.report_summary import Verdict

AttentionKind = Literal["cross_attn", "self_attn"]
MIN_RATIO, MAX_RATIO = 0.9, 1.1
# A ratio that is on an end of the band but for rounding is inside.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class HeadLogits:
    """One head at one noise level (None: random inputs): mean over queries and samples, before and after."""

    attention: AttentionKind
    block: int
    sigma: float | None
    head: int
    base_std: float
    std: float
    base_entropy: float
    entropy: float

    @property
    def std_ratio(self) -> float:
        """Adapted to base."""
        return ratio_of(self.std, self.base_std)

    @property
    def entropy_ratio(self) -> float:
        """Adapted to base."""
        return ratio_of(self.entropy, self.base_entropy)


@dataclass(frozen=True)
class StateNorms:
    """Mean L2 norm of a block's keys before `norm_k` ("k") or values ("v") over tokens, before and after."""

    attention: AttentionKind
    block: int
    what: Literal["k", "v"]
    base_norm: float
    norm: float

    @property
    def ratio(self) -> float:
        """Adapted to base."""
        return ratio_of(self.norm, self.base_norm)


@dataclass(frozen=True)
class LogitResult:
    """Everything that was measured; `is_synthetic` where inputs were random."""

    heads: tuple[HeadLogits, ...]
    norms: tuple[StateNorms, ...]
    is_synthetic: bool
    num_inputs: int


@dataclass(frozen=True)
class BlockRatio:
    """One block: means over heads and noise levels, the heads that are farthest, and how many are outside the band."""

    attention: AttentionKind
    block: int
    std_ratio: float
    min_head_ratio: float
    max_head_ratio: float
    heads_outside: int
    entropy_ratio: float

    @property
    def name(self) -> str:
        """Such as `blocks.3.cross_attn`."""
        return f"blocks.{self.block}.{self.attention}"


@dataclass(frozen=True)
class Band:
    """The ratios that pass."""

    low: float = MIN_RATIO
    high: float = MAX_RATIO

    def has(self, ratio: float) -> bool:
        """Whether a ratio is inside; what is no number is not."""
        return self.low * (1 - _TOLERANCE) <= ratio <= self.high * (1 + _TOLERANCE)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


def ratio_of(after: float, before: float) -> float:
    """After to before; 1 where both are the same, so also where both are 0."""
    if after == before:
        return 1.0
    return after / before if before else math.inf


def mean_over_levels(heads: Iterable[HeadLogits]) -> dict[tuple[AttentionKind, int, int], float]:
    """Ratio of the standard deviations by (attention, block, head): the mean over noise levels."""
    ordered = sorted(heads, key=lambda head: (head.attention, head.block, head.head))
    groups = groupby(ordered, key=lambda head: (head.attention, head.block, head.head))
    return {place: fmean(head.std_ratio for head in group) for place, group in groups}


def block_ratios(heads: Sequence[HeadLogits], band: Band) -> list[BlockRatio]:
    """One record for each attention of each block, cross-attention first, by block."""
    by_head: dict[tuple[AttentionKind, int], list[float]] = {}
    for (attention, block, _), ratio in mean_over_levels(heads).items():
        by_head.setdefault((attention, block), []).append(ratio)
    return [
        BlockRatio(
            attention,
            block,
            fmean(ratios),
            min(ratios),
            max(ratios),
            sum(not band.has(ratio) for ratio in ratios),
            fmean(
                head.entropy_ratio for head in heads if head.attention == attention and head.block == block
            ),
        )
        for (attention, block), ratios in sorted(by_head.items())
    ]


def judge_logits(result: LogitResult, band: Band) -> tuple[Verdict, str]:
    """The verdict and the sentence that explains it: every block's mean ratio has to lie in the band."""
    blocks = block_ratios(result.heads, band)
    worst = max(blocks, key=_distance)
    outside = [block for block in blocks if not band.has(block.std_ratio)]
    where = f"{worst.name} with {worst.std_ratio:.4f}"
    if outside:
        return (
            "fail",
            f"{len(outside)} of {len(blocks)} blocks have a logit ratio outside {band}; the farthest is {where}.",
        )
    heads = sum(block.heads_outside for block in blocks)
    aside = (
        f"; {heads} of {len(mean_over_levels(result.heads))} heads are outside by themselves" if heads else ""
    )
    return (
        "pass",
        f"The logit ratios of all {len(blocks)} blocks are within {band}; the farthest from 1 is {where}{aside}.",
    )


def _distance(block: BlockRatio) -> float:
    """How far a ratio is from 1; half is as far as double, and what is no number is farthest."""
    ratio = block.std_ratio
    return abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf
