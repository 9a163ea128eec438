"""Logit ratios as a report shows them: inputs, numbers, tables and plots, the same in every probe that measures them."""

from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from models.wan.probes.comparison import Comparison
from models.wan.probes.logit_probe import LogitPlan
from models.wan.probes.logit_result import (
    AttentionKind,
    Band,
    BlockRatio,
    HeadLogits,
    LogitResult,
    block_ratios,
    mean_over_levels,
)
from utils.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOW_TO_READ = """\
- **std ratio**: per query, the standard deviation of its logits over all keys; averaged over queries and samples; adapted
  to base. The softmax does not feel a shift of all logits, only this spread. Above 1, attention becomes sharper, below 1
  flatter. What is judged is the mean over heads and noise levels of each block.
- **entropy ratio** of the attention itself, in the same way. It falls where attention becomes sharper.
- **heads outside** the band do not fail a block whose mean is inside, but a block with many of them listens otherwise.
- Cross-attention sees the caption and, up to 512 rows, the padding, as in the official model.
- **norm ratio** of k is taken before `norm_k`, over the rows of captions: a pure change of its length is undone by
  `norm_k` and moves no logit. That of v says how much louder or softer the text speaks."""
_SIDES = {"cross_attn": "cross-attention", "self_attn": "self-attention"}


def add_logit_inputs(report: Report, comparison: Comparison) -> None:
    """Name every file that the numbers come from."""
    files: list[tuple[str, Path]] = []
    if comparison.adapter is not None:
        files.append(("adapter", comparison.adapter.path))
        files.append(("adapter_config", comparison.adapter.path.with_name("adapter_config.json")))
    if comparison.config_path is not None:
        files.append(("config", comparison.config_path))
    files += [("base", path) for path in comparison.base.files]
    if comparison.other is not None:
        files += [("against", path) for path in comparison.other.files]
    for role, path in files:
        if role != "adapter_config" or path.is_file():
            report.add_input(role, path)


def add_logit_results(report: Report, result: LogitResult, plan: LogitPlan, band: Band, seed: int) -> None:
    """Numbers, tables and plots."""
    blocks = block_ratios(result.heads, band)
    sigmas = sorted({head.sigma for head in result.heads if head.sigma is not None})
    report.cap("min_logit_ratio", band.low, "a block's mean std ratio below it fails")
    report.cap("max_logit_ratio", band.high, "a block's mean std ratio above it fails")
    ratios = [block.std_ratio for block in blocks]
    report.metric("mean_std_ratio", fmean(ratios), "spread of the logits, adapted to base: mean over blocks")
    report.metric("min_std_ratio", min(ratios), "the smallest of a block")
    report.metric("max_std_ratio", max(ratios), "the largest of a block")
    report.metric("mean_entropy_ratio", fmean(block.entropy_ratio for block in blocks), "mean over blocks")
    report.metric("num_probed_blocks", len(blocks), "attentions that were looked at")
    outside = [block.name for block in blocks if not band.has(block.std_ratio)]
    report.metric("blocks_outside", outside, "whose mean std ratio is outside the band")
    report.metric("num_heads_outside", sum(block.heads_outside for block in blocks), "each by itself")
    for what in ("k", "v"):
        values = [norm.ratio for norm in result.norms if norm.what == what]
        report.metric(f"mean_{what}_norm_ratio", fmean(values), _norm_meaning(what))
    report.metric("logit_inputs", "synthetic" if result.is_synthetic else "cached samples")
    report.metric("num_logit_inputs", result.num_inputs, "samples times noise levels, or random draws")
    report.metric("probed_sigmas", sigmas, "noise levels; none for random inputs")
    report.metric("probed_blocks", list(plan.blocks))
    report.metric("probed_attentions", list(plan.attentions))
    report.metric("logit_seed", seed, "of samples and noise")
    if all(head.std == head.base_std for head in result.heads):
        report.note("no logit changes at all: every ratio is exactly 1")
    report.table("logit_blocks", [_block_row(block, result) for block in blocks], "Logits per block", 48)
    report.table("logit_levels", _level_rows(result), "Logits per noise level")
    report.table("logit_heads", _head_rows(result, band), "Logits per head", inline_rows=0)
    for attention in plan.attentions:
        title = f"Spread of the logits in {_SIDES[attention]}, adapted to base"
        report.plot(f"logit_ratio_{attention}", draw(result, attention, band), title)


def _norm_meaning(what: str) -> str:
    return (
        "norm of the keys before norm_k, adapted to base" if what == "k" else "norm of the values, likewise"
    )


def _block_row(block: BlockRatio, result: LogitResult) -> dict[str, Any]:
    """One line of logit_blocks.csv."""
    row = {"attention": block.attention, "block": block.block, "std_ratio": block.std_ratio}
    row |= {name: value for name, value in asdict(block).items() if name not in row}
    for norm in result.norms:
        if (norm.attention, norm.block) == (block.attention, block.block):
            row[f"base_{norm.what}_norm"] = norm.base_norm
            row[f"{norm.what}_norm"] = norm.norm
            row[f"{norm.what}_norm_ratio"] = norm.ratio
    return row


def _level_rows(result: LogitResult) -> list[dict[str, Any]]:
    """Lines of logit_levels.csv: means over blocks and heads."""
    groups: dict[tuple[str, float | None], list[HeadLogits]] = {}
    for head in result.heads:
        groups.setdefault((head.attention, head.sigma), []).append(head)
    return [
        {
            "attention": attention,
            "sigma": sigma,
            "std_ratio": fmean(head.std_ratio for head in heads),
            "entropy_ratio": fmean(head.entropy_ratio for head in heads),
            "base_std": fmean(head.base_std for head in heads),
            "base_entropy": fmean(head.base_entropy for head in heads),
        }
        for (attention, sigma), heads in groups.items()
    ]


def _head_rows(result: LogitResult, band: Band) -> list[dict[str, Any]]:
    """Lines of logit_heads.csv."""
    return [
        asdict(head)
        | {
            "std_ratio": head.std_ratio,
            "entropy_ratio": head.entropy_ratio,
            "is_outside": not band.has(head.std_ratio),
        }
        for head in result.heads
    ]


def draw(result: LogitResult, attention: AttentionKind, band: Band) -> "Figure":
    """Above: each block's mean ratio with the band and the range of its heads. Below: block by head."""
    import numpy as np
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    blocks = [one for one in block_ratios(result.heads, band) if one.attention == attention]
    numbers = [block.block for block in blocks]
    means = [block.std_ratio for block in blocks]
    by_place = {
        (block, head): ratio
        for (kind, block, head), ratio in mean_over_levels(result.heads).items()
        if kind == attention
    }
    num_heads = 1 + max(head for _, head in by_place)
    grid = np.array([[by_place[block, head] for block in numbers] for head in range(num_heads)])
    places = range(len(numbers))
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    above.axhspan(band.low, band.high, color="tab:green", alpha=0.12, label=f"band {band}")
    above.axhline(1, color="black", linewidth=0.8)
    low, high = grid.min(0), grid.max(0)
    above.vlines(places, low, high, color="tab:blue", alpha=0.5, linewidth=2, label="range of heads")
    above.plot(places, means, "o-", markersize=4, linewidth=1, label="mean of heads")
    wrong = [place for place in places if not band.has(means[place])]
    if wrong:
        above.plot(wrong, [means[place] for place in wrong], "o", color="tab:red", label="outside")
    above.set_ylabel("std ratio")
    above.grid(True, linewidth=0.3)
    above.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4)
    reach = max(band.high - 1, 1 - band.low, float(np.abs(grid[np.isfinite(grid)] - 1).max(initial=0)))
    image = below.imshow(grid, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(1, 1 - reach, 1 + reach))
    below.set_ylabel("head")
    below.set_xlabel("block")
    shown = places[:: max(1, len(numbers) // 20)]
    below.set_xticks(shown, [str(numbers[place]) for place in shown])
    below.set_yticks(range(0, num_heads, max(1, num_heads // 6)))
    figure.colorbar(image, ax=below, label="std ratio")
    return figure
