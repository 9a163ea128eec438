"""Plots of logit ratios. Imported where a report is drawn, since matplotlib is."""

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from models.wan.probes.logit_report import BlockRow, HeadRow

# Colours reach at least so far from 1, so that rounding is not shown as if it were something.
_LEAST_REACH = 0.1
_MOST_TICKS = 20


def draw_blocks(blocks: Sequence[BlockRow], min_ratio: float, max_ratio: float) -> Figure:
    """Mean ratio over blocks with the range of the heads, and the band."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhspan(min_ratio, max_ratio, color="0.92", label="pass band")
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    for attention in sorted({row.attention for row in blocks}):
        rows = [row for row in blocks if row.attention == attention]
        numbers = [row.block for row in rows]
        low = [row.mean_std_ratio - row.min_std_ratio for row in rows]
        high = [row.max_std_ratio - row.mean_std_ratio for row in rows]
        means = [row.mean_std_ratio for row in rows]
        axes.errorbar(
            numbers,
            means,
            yerr=(low, high),
            marker="o",
            markersize=4,
            linewidth=1.2,
            capsize=2,
            label=attention,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block (bars: from the lowest to the highest head)")
    axes.set_ylabel("std of logits, adapted / base")
    axes.grid(True, linewidth=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def draw_heads(heads: Sequence[HeadRow]) -> Figure:
    """Block by head, the mean ratio over noise levels as a colour; what is no number stays blank."""
    blocks = sorted({row.block for row in heads})
    found: dict[tuple[int, int], list[float]] = {}
    for row in heads:
        found.setdefault((row.head, row.block), []).append(row.std_ratio)
    num_heads = 1 + max(head for head, _ in found)
    grid = np.array([[fmean(found[head, block]) for block in blocks] for head in range(num_heads)])
    reach = max(_LEAST_REACH, float(np.abs(grid[np.isfinite(grid)] - 1).max(initial=0)))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    norm = TwoSlopeNorm(1, 1 - reach, 1 + reach)
    image = axes.imshow(grid, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    shown = range(0, len(blocks), math.ceil(len(blocks) / _MOST_TICKS))
    axes.set_xticks(shown, [str(blocks[place]) for place in shown])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block")
    axes.set_ylabel("head")
    figure.colorbar(image, ax=axes, label="std of logits, adapted / base")
    return figure
