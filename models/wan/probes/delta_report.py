"""An adapter's delta as a report shows it: numbers, tables and the plot, the same in every probe that measures it."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.wan.probes.delta import DeltaCaps, DeltaResult
from models.wan.probes.subject import Subject
from utils.config.schema import Expert
from utils.report import Report
from utils.tensor_source import TensorSource

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from utils.delta_budget import GroupDelta, ModuleDelta

_LOG_SPREAD = 30


def add_adapter_inputs(report: Report, adapter: Path) -> None:
    """Name an adapter's file, and what says its scale."""
    report.add_input("adapter", adapter)
    peft_config = adapter.with_name("adapter_config.json")
    if peft_config.is_file():
        report.add_input("adapter_config", peft_config)


def add_delta_inputs(report: Report, subject: Subject, source: TensorSource) -> None:
    """Name every file that the numbers come from."""
    add_adapter_inputs(report, subject.adapter)
    if subject.config_path is not None:
        report.add_input("config", subject.config_path)
    for path in source.files:
        report.add_input("base", path)


def add_delta_results(report: Report, result: DeltaResult, caps: DeltaCaps, expert: Expert | None) -> None:
    """Numbers, tables and the plot."""
    from utils.delta_budget import over_cap, summarise

    deltas, cap = result.deltas, caps.max_ratio
    summary = summarise(deltas)
    _add_caps(report, caps)
    report.metric("max_ratio", summary.overall.max_ratio, "largest ratio of all modules")
    report.metric("worst_module", summary.overall.worst_module, "where that is")
    report.metric("mean_ratio", summary.overall.mean_ratio, "mean over all modules")
    report.metric("num_modules", len(deltas), "adapted modules")
    report.metric("num_over_cap", len(over_cap(deltas, cap.value)), "modules over the cap")
    num_weak = sum(delta.ratio < caps.weak_ratio for delta in deltas)
    report.metric("num_weak", num_weak, f"modules that do hardly anything: below {caps.weak_ratio:g}")
    report.metric("ranks", sorted({delta.rank for delta in deltas}))
    mean_rank = sum(delta.effective_rank for delta in deltas) / len(deltas)
    report.metric("mean_effective_rank", mean_rank, "directions that an adapter really uses, on average")
    if result.spectral:
        worst = max(result.spectral, key=lambda delta: delta.ratio)
        report.metric("max_spectral_ratio", worst.ratio, "largest ratio of spectral norms")
        report.metric("worst_spectral_module", worst.module, "where that is")
        mean = sum(delta.ratio for delta in result.spectral) / len(result.spectral)
        report.metric("mean_spectral_ratio", mean, "mean over all modules")
        error = max(delta.error for delta in result.spectral)
        report.metric("max_spectral_error", error, "no ratio of spectral norms is smaller by more than this")
    if expert is not None:
        report.metric("expert", expert, "which of the two of an A14B model")
    report.metric("cap_source", cap.source)
    sources = sorted({pair.scale_source for pair in result.adapter.modules.values()})
    report.metric("scale_source", ", ".join(sources), "where alpha was found; none means that the scale is 1")
    report.metric(
        "num_base_tensors_read", result.num_read, "the others' norms were known from an earlier time"
    )
    types = _group_rows("type", summary.types, result, caps)
    report.metric(
        "types", {row["type"]: {name: row[name] for name in row if name != "type"} for row in types}
    )
    report.table("types", types, "Per type")
    report.table("blocks", _group_rows("block", summary.blocks, result, caps), "Per block", inline_rows=48)
    report.table("modules", _module_rows(result, caps), "Per module, largest ratio first", inline_rows=10)
    if any(delta.block is not None for delta in deltas):
        report.plot("ratio_per_block", draw(deltas, caps), "Ratio per block")


def _add_caps(report: Report, caps: DeltaCaps) -> None:
    report.cap(
        "max_delta_ratio", caps.max_ratio.value, f"a module above it fails; from {caps.max_ratio.source}"
    )
    if caps.max_mean_ratio is not None:
        mean = caps.max_mean_ratio
        report.cap("max_mean_delta_ratio", mean.value, f"a mean above it fails; from {mean.source}")
    report.cap("weak_ratio", caps.weak_ratio, "an adapter below it everywhere is inconclusive")


def _module_rows(result: DeltaResult, caps: DeltaCaps) -> list[dict[str, Any]]:
    """The lines of modules.csv, largest ratio first."""
    spectral = {delta.module: delta for delta in result.spectral}
    rows = []
    for delta in sorted(result.deltas, key=lambda delta: -delta.ratio):
        row = {"module": delta.module, "block": delta.block, "type": delta.type} | asdict(delta)
        row |= {
            "is_over_cap": delta.is_over(caps.max_ratio.value),
            "is_weak": delta.ratio < caps.weak_ratio,
        }
        if spectral:
            row |= {
                "spectral_delta_norm": spectral[delta.module].delta_norm,
                "spectral_weight_norm": spectral[delta.module].weight_norm,
                "spectral_ratio": spectral[delta.module].ratio,
            }
        rows.append(row)
    return rows


def _group_rows(
    kind: Literal["block", "type"], groups: "Sequence[GroupDelta]", result: DeltaResult, caps: DeltaCaps
) -> list[dict[str, Any]]:
    """The lines of blocks.csv or types.csv; `other` is what lies in no block."""
    spectral = {delta.module: delta.ratio for delta in result.spectral}
    rows = []
    for group in groups:
        members = [delta for delta in result.deltas if group.group == _group_of(kind, delta)]
        row = {kind: group.group} | {name: value for name, value in asdict(group).items() if name != "group"}
        row["mean_effective_rank"] = sum(delta.effective_rank for delta in members) / len(members)
        row["num_weak"] = sum(delta.ratio < caps.weak_ratio for delta in members)
        if spectral:
            ratios = [spectral[delta.module] for delta in members]
            row |= {"mean_spectral_ratio": sum(ratios) / len(ratios), "max_spectral_ratio": max(ratios)}
        rows.append(row)
    return rows


def _group_of(kind: Literal["block", "type"], delta: "ModuleDelta") -> str:
    if kind == "type":
        return delta.type
    return "other" if delta.block is None else str(delta.block)


def draw(deltas: "Sequence[ModuleDelta]", caps: DeltaCaps) -> "Figure":
    """Ratio over block, one line per kind of module, with the caps; logarithmic where the values lie far apart.

    The mean is drawn where it has a cap.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines: dict[str, list[tuple[int, float]]] = {}
    for delta in deltas:
        if delta.block is not None:
            lines.setdefault(delta.module.split(".", 2)[2], []).append((delta.block, delta.ratio))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for kind, points in sorted(lines.items()):
        blocks, ratios = zip(*sorted(points), strict=True)
        axes.plot(blocks, ratios, marker="o", markersize=4, linewidth=1.2, label=kind)
    levels = [(caps.max_ratio.value, "--", "cap")]
    if caps.max_mean_ratio is not None:
        mean = sum(delta.ratio for delta in deltas) / len(deltas)
        levels += [(caps.max_mean_ratio.value, ":", "cap on mean"), (mean, "-", "mean")]
    for level, style, name in levels:
        if level < math.inf:
            axes.axhline(level, color="black", linestyle=style, linewidth=1, label=f"{name} {level:.3g}")
    shown = [*(level for level, _, _ in levels), *(ratio for points in lines.values() for _, ratio in points)]
    if min(shown) > 0 and max(shown) > _LOG_SPREAD * min(shown) and max(shown) < math.inf:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block")
    axes.set_ylabel("||dW|| / ||W||")
    axes.grid(True, linewidth=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
