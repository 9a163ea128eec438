"""Attention logits measured over blocks, heads and noise levels, judged, and as a report shows them."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from utils.errors import UserError
from utils.report import Report
from utils.report_summary import Verdict

if TYPE_CHECKING:
    import torch

    from models.wan.arch import WanArch
    from models.wan.probes.activations_stream import Stream
    from models.wan.probes.logits import Inputs
    from models.wan.stages import TextWire
    from utils.lora_names import AdapterPair
    from utils.tensor_source import TensorSource

Kind = Literal["cross_attn", "self_attn"]
KINDS: dict[str, tuple[Kind, ...]] = {
    "cross": ("cross_attn",),
    "self": ("self_attn",),
    "both": ("cross_attn", "self_attn"),
}
MIN_RATIO, MAX_RATIO = 0.9, 1.1
# Ratios closer to 1 than this differ by rounding in float32.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class HeadRow:
    """One head of one attention at one noise level (NaN for random inputs), averaged over samples and queries."""

    block: int
    attention: str
    sigma: float
    head: int
    std_base: float
    std_adapted: float
    std_ratio: float
    entropy_base: float
    entropy_adapted: float
    entropy_ratio: float


@dataclass(frozen=True)
class LengthRow:
    """Mean lengths of keys before `norm_k` and of values in one attention, and what became of them."""

    block: int
    attention: str
    key_base: float
    key_ratio: float
    value_base: float
    value_ratio: float


@dataclass(frozen=True)
class BlockRow:
    """One attention over all heads and noise levels."""

    block: int
    attention: str
    mean_std_ratio: float
    min_std_ratio: float
    max_std_ratio: float
    mean_entropy_ratio: float
    key_ratio: float
    value_ratio: float


@dataclass(frozen=True)
class LogitResult:
    """All that was measured."""

    heads: tuple[HeadRow, ...]
    lengths: tuple[LengthRow, ...]
    blocks: tuple[BlockRow, ...]


@dataclass(frozen=True)
class Pair:
    """The two models that are held against each other: a base, and with an adapter or another checkpoint."""

    base: "TensorSource"
    other: "TensorSource"
    adapter: "Mapping[str, AdapterPair]"
    arch: "WanArch"
    device: "torch.device"


class _Collector:
    """Sums over samples: one entry per (block, attention, sigma)."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._spreads: dict[tuple[int, str, float], list[Any]] = defaultdict(list)
        self._lengths: dict[tuple[int, str], list[Any]] = defaultdict(list)
        self._loaded: tuple[int, dict[str, Any]] = (-1, {})

    def look(self, block: int, sigma: float, kind: Kind, inputs: "Inputs") -> None:
        """Measure both models on the same inputs.

        Raises:
            UserError: logits are not finite.
        """
        from models.wan.probes.logits import lengths_of, spread_of

        base, other = self._attentions(block, kind)
        spreads = spread_of(base, inputs), spread_of(other, inputs)
        for spread, whose in zip(spreads, ("the base's", "the changed model's"), strict=True):
            if not (spread.std_N.isfinite().all() and spread.entropy_N.isfinite().all()):
                raise UserError(
                    f"blocks.{block}.{kind}: {whose} logits are not finite: its weights, or the cached samples, hold NaN or "
                    "infinite values; use other files"
                )
        self._spreads[block, kind, sigma].append(spreads)
        self._lengths[block, kind].append((lengths_of(base, inputs), lengths_of(other, inputs)))

    def result(self) -> LogitResult:
        """Rows in the order of blocks, attentions, noise levels and heads."""
        from models.wan.probes.logits import Spread, head_ratios

        heads = []
        for (block, kind, sigma), found in sorted(self._spreads.items()):
            base, other = (
                Spread(
                    sum(spreads[side].std_N for spreads in found) / len(found),
                    sum(spreads[side].entropy_N for spreads in found) / len(found),
                )
                for side in (0, 1)
            )
            for head, std_ratio, entropy_ratio in head_ratios(base, other):
                heads.append(
                    HeadRow(
                        block,
                        kind,
                        sigma,
                        head,
                        float(base.std_N[head]),
                        float(other.std_N[head]),
                        std_ratio,
                        float(base.entropy_N[head]),
                        float(other.entropy_N[head]),
                        entropy_ratio,
                    )
                )
        lengths = []
        for (block, kind), found in sorted(self._lengths.items()):
            key, value = (fmean(getattr(one, name) for one, _ in found) for name in ("key", "value"))
            key_after, value_after = (
                fmean(getattr(two, name) for _, two in found) for name in ("key", "value")
            )
            lengths.append(
                LengthRow(block, kind, key, _over(key_after, key), value, _over(value_after, value))
            )
        return LogitResult(tuple(heads), tuple(lengths), _block_rows(heads, lengths))

    def _attentions(self, block: int, kind: Kind) -> Any:
        from models.wan.probes.logits import load_attention

        if self._loaded[0] != block:
            self._loaded = (block, {})
        if kind not in self._loaded[1]:
            pair = self._pair
            self._loaded[1][kind] = (
                load_attention(pair.base, pair.arch, block, kind, pair.device),
                load_attention(pair.other, pair.arch, block, kind, pair.device, pair.adapter),
            )
        return self._loaded[1][kind]


def measure_cached(
    pair: Pair,
    wires: "Sequence[tuple[str, float, TextWire]]",
    blocks: Sequence[int],
    kinds: Sequence[Kind],
    dtype: "torch.dtype",
    on_block: Callable[[int], None],
) -> LogitResult:
    """Measure on samples: both models see what the base computes up to each block.

    Args:
        pair: the two models.
        wires: (sample, sigma, input of the DiT), one sample each.
        blocks: which to measure.
        kinds: which attentions.
        dtype: in which the base computes its activations.
        on_block: hears of each block that is done.
    """
    from models.wan.probes.activations_stream import BaseForward, walk

    collector = _Collector(pair)

    def look(block: int, stream: "Stream", kind: Kind, inputs: "Inputs") -> None:
        collector.look(block, stream.sigma, kind, inputs)

    forward = BaseForward(pair.base, pair.arch, dtype, pair.device)
    for block in walk(forward, forward.begin(wires), blocks, kinds, look):
        on_block(block)
    return collector.result()


def measure_synthetic(
    pair: Pair, blocks: Sequence[int], kinds: Sequence[Kind], seed: int, num_tokens: int
) -> LogitResult:
    """Measure on random inputs: of the checkpoint only the attentions that are measured are read."""
    from models.wan.probes.logits import synthetic_inputs

    collector = _Collector(pair)
    for block in blocks:
        for kind in kinds:
            inputs = synthetic_inputs(pair.arch, block, kind, seed, num_tokens)
            collector.look(block, math.nan, kind, inputs.to(pair.device))
    return collector.result()


def judge_logits(result: LogitResult, min_ratio: float, max_ratio: float) -> tuple[Verdict, str]:
    """The verdict and the sentence that explains it: by each attention's mean over heads and noise levels."""
    outside = [row for row in result.blocks if not min_ratio <= row.mean_std_ratio <= max_ratio]
    worst = max(result.blocks, key=lambda row: _distance(row.mean_std_ratio))
    where = f"block {worst.block} ({worst.attention}) with {worst.mean_std_ratio:.4f}"
    if outside:
        return (
            "fail",
            f"{len(outside)} of {len(result.blocks)} attentions have logits whose spread left {min_ratio:g} to {max_ratio:g}; "
            f"the farthest is {where}.",
        )
    moved = [row.mean_std_ratio for row in result.blocks]
    moved += [row.key_ratio for row in result.blocks] + [row.value_ratio for row in result.blocks]
    if all(_distance(ratio) < math.log1p(_ROUNDING) for ratio in moved):
        return "inconclusive", "Nothing changes: logits, keys and values are those of the base."
    return (
        "pass",
        f"The logits keep their spread in all {len(result.blocks)} attentions; the farthest from 1 is {where}.",
    )


def add_logit_results(report: Report, result: LogitResult, min_ratio: float, max_ratio: float) -> None:
    """Numbers, tables and plots."""
    from models.wan.probes.logit_plot import draw_blocks, draw_heads

    report.cap("min_logit_ratio", min_ratio, "an attention whose mean ratio is below it fails")
    report.cap("max_logit_ratio", max_ratio, "an attention whose mean ratio is above it fails")
    ratios = [row.mean_std_ratio for row in result.blocks]
    worst = max(result.blocks, key=lambda row: _distance(row.mean_std_ratio))
    report.metric(
        "mean_std_ratio", fmean(ratios), "spread of the logits, adapted over base, mean over attentions"
    )
    report.metric("min_std_ratio", min(ratios), "smallest of the attentions' means")
    report.metric("max_std_ratio", max(ratios), "largest of the attentions' means")
    report.metric("worst_block", worst.block, "the block farthest from 1")
    report.metric(
        "mean_entropy_ratio", fmean(row.mean_entropy_ratio for row in result.blocks), "the same of entropy"
    )
    outside = sum(not min_ratio <= row.std_ratio <= max_ratio for row in result.heads)
    report.metric(
        "num_heads_outside",
        outside,
        "heads (at a noise level) outside the band; they do not fail by themselves",
    )
    report.metric("num_heads", len(result.heads), "heads and noise levels measured")
    report.metric(
        "max_key_ratio", max(row.key_ratio for row in result.blocks), "length of keys before norm_k, largest"
    )
    report.metric(
        "max_value_ratio", max(row.value_ratio for row in result.blocks), "length of values, largest"
    )
    report.table("logit_blocks", [vars(row) for row in result.blocks], "Logits per block", inline_rows=48)
    rows = sorted(result.heads, key=lambda row: -_distance(row.std_ratio))
    report.table(
        "logit_heads", [vars(row) for row in rows], "Logits per head, farthest from 1 first", inline_rows=10
    )
    report.table(
        "lengths", [vars(row) for row in result.lengths], "Lengths of keys and values", inline_rows=10
    )
    report.plot(
        "logit_ratio_per_block",
        draw_blocks(result.blocks, min_ratio, max_ratio),
        "Spread of the logits, adapted over base",
    )
    for kind in sorted({row.attention for row in result.blocks}):
        heads = [row for row in result.heads if row.attention == kind]
        report.plot(f"logit_ratio_per_head_{kind}", draw_heads(heads), f"The same for each head, {kind}")


def _block_rows(heads: Sequence[HeadRow], lengths: Sequence[LengthRow]) -> tuple[BlockRow, ...]:
    grouped: dict[tuple[int, str], list[HeadRow]] = defaultdict(list)
    for row in heads:
        grouped[row.block, row.attention].append(row)
    length_of = {(row.block, row.attention): row for row in lengths}
    return tuple(
        BlockRow(
            block,
            attention,
            fmean(row.std_ratio for row in rows),
            min(row.std_ratio for row in rows),
            max(row.std_ratio for row in rows),
            fmean(row.entropy_ratio for row in rows),
            length_of[block, attention].key_ratio,
            length_of[block, attention].value_ratio,
        )
        for (block, attention), rows in sorted(grouped.items())
    )


def _over(one: float, other: float) -> float:
    return one / other if other else math.nan


def _distance(ratio: float) -> float:
    """How far from 1, up and down alike; what is not a number is farthest."""
    return abs(math.log(ratio)) if ratio > 0 and math.isfinite(ratio) else math.inf
