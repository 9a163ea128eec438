"""Numbers, tables and plots of te_eval. Texts appear by their labels alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from models.wan.probes.encoder_prompts import GROUPS, Group
from utils.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from models.wan.probes.encoder_drift import GroupDrift, LayerDrift, PromptDrift
    from models.wan.probes.encoder_keywords import KeywordSignal, TableDrift
    from models.wan.probes.keyword_loss import KeywordLoss
    from utils.trend import Trend

_COLOURS: dict[Group, str] = {"neutral": "tab:blue", "domain": "tab:orange", "keyword": "tab:green"}
_MAX_LABEL = 80


@dataclass(frozen=True)
class EncoderResults:
    """All that was measured. `losses` and `trend` are None where they were not looked at."""

    layers: "Sequence[LayerDrift]"
    prompts: "Sequence[PromptDrift]"
    groups: "Mapping[Group, GroupDrift]"
    signals: "Sequence[KeywordSignal]"
    table: "TableDrift"
    losses: "Sequence[KeywordLoss] | None"
    trend: "Trend | None"


def add_encoder_results(report: Report, results: EncoderResults) -> None:
    """Everything but caps, inputs and verdict."""
    _add_metrics(report, results)
    _add_tables(report, results)
    report.plot("drift_per_layer", draw_layers(results.layers), "Drift per layer")
    report.plot("cosines", draw_cosines(results.prompts), "Cosine of each prompt, by group")


def _add_metrics(report: Report, results: EncoderResults) -> None:
    for group, numbers in results.groups.items():
        said = "keywords alone" if group == "keyword" else f"{group} prompts"
        report.metric(f"{group}_drift", numbers.drift, f"{said}: 1 - mean cosine against the base encoder")
        report.metric(f"{group}_mean_cosine", numbers.mean_cosine)
        report.metric(f"{group}_median_cosine", numbers.median_cosine)
        report.metric(f"{group}_mean_norm_ratio", numbers.mean_norm_ratio, "||tuned|| / ||base|| per token")
        report.metric(f"{group}_median_norm_ratio", numbers.median_norm_ratio)
        if numbers.dit_mean_cosine is not None:
            report.metric(
                f"{group}_dit_mean_cosine", numbers.dit_mean_cosine, "behind the DiT's text embedding"
            )
            report.metric(f"{group}_dit_median_cosine", numbers.dit_median_cosine)
        report.metric(
            f"{group}_neighbours_kept", numbers.neighbours_kept, "Jaccard index of nearest neutral prompts"
        )
    changed = [layer.layer for layer in results.layers if layer.weight_change > 0]
    report.metric("layers_changed", ", ".join(changed) or "none", "layers whose weights differ")
    table = results.table
    report.metric("token_rows_changed", table.num_changed, f"of the {table.num_rows} rows of the token table")
    if table.num_keyword_rows:
        report.metric(
            "keyword_rows_changed", table.num_keyword_rows_changed, f"of {table.num_keyword_rows} of keywords"
        )
        report.metric(
            "token_neighbours_kept", table.neighbours_kept, "Jaccard index of keywords' nearest rows"
        )
    if results.signals:
        for name in ("context_gain", "pooled_gain"):
            gains = [gain for one in results.signals if (gain := getattr(one, name)) is not None]
            if gains:
                what = (
                    "the sentence's other tokens" if name == "context_gain" else "the sentence's mean state"
                )
                report.metric(f"mean_{name}", fmean(gains), f"tuned / base of a keyword's effect on {what}")
                report.metric(f"median_{name}", median(gains))
    _add_loss_metrics(report, results)


def _add_loss_metrics(report: Report, results: EncoderResults) -> None:
    if results.losses:
        report.metric(
            "keyword_loss_change",
            fmean(one.change.mean for one in results.losses),
            "denoising loss with the keyword alone as caption, tuned - base, mean over keywords",
        )
        better = sum(one.change.high is not None and one.change.high < 0 for one in results.losses)
        report.metric(
            "keywords_with_lower_loss", better, f"of {len(results.losses)}, beyond their 95 % interval"
        )
    if results.trend is not None:
        report.metric("training_loss", results.trend.direction, "by the slope's 95 % interval (Theil-Sen)")
        report.metric("training_loss_first_fifth", results.trend.first_median, "median")
        report.metric("training_loss_last_fifth", results.trend.last_median, "median")
        report.metric("training_loss_slope", results.trend.slope, "per 1,000 steps")
        report.metric("training_loss_slope_low", results.trend.low, "lower end of its interval")
        report.metric("training_loss_slope_high", results.trend.high, "upper end of its interval")


def _add_tables(report: Report, results: EncoderResults) -> None:
    groups = [{"group": group} | asdict(numbers) for group, numbers in results.groups.items()]
    report.table("groups", groups, "Per group")
    report.table("layers", [layer_row(layer) for layer in results.layers], "Per layer", inline_rows=30)
    rows = [prompt_row(record) for record in sorted(results.prompts, key=lambda one: one.states.cosine)]
    report.table("prompts", rows, "Per prompt, the most moved first", inline_rows=12)
    if results.signals:
        report.table("keywords", [signal_row(signal) for signal in results.signals], "Per keyword")
    if results.losses:
        report.table(
            "keyword_losses", [loss_row(loss) for loss in results.losses], "Loss with the keyword alone"
        )


def layer_row(layer: "LayerDrift") -> dict[str, Any]:
    """One line of layers.csv."""
    row: dict[str, Any] = {"layer": layer.layer, "weight_change": layer.weight_change}
    for group in layer.drift:
        row |= {f"{group}_drift": layer.drift[group], f"{group}_distance": layer.distance[group]}
    return row


def prompt_row(record: "PromptDrift") -> dict[str, Any]:
    """One line of prompts.csv."""
    row: dict[str, Any] = {
        "group": record.entry.group,
        "number": record.entry.number,
        "prompt": shorten(record.entry.label),
        "tokens": record.num_tokens,
    } | asdict(record.states)
    if record.dit is not None:
        row |= {"dit_cosine": record.dit.cosine, "dit_norm_ratio": record.dit.norm_ratio}
    return row | {"neighbours_kept": record.neighbours_kept}


def signal_row(signal: "KeywordSignal") -> dict[str, Any]:
    """One line of keywords.csv."""
    return {
        "number": signal.entry.number,
        "keyword": shorten(signal.entry.label),
        "base_context": signal.base_context,
        "tuned_context": signal.tuned_context,
        "context_gain": signal.context_gain,
        "base_pooled": signal.base_pooled,
        "tuned_pooled": signal.tuned_pooled,
        "pooled_gain": signal.pooled_gain,
    }


def loss_row(loss: "KeywordLoss") -> dict[str, Any]:
    """One line of keyword_losses.csv."""
    return {
        "number": loss.entry.number,
        "keyword": shorten(loss.entry.label),
        "samples": loss.num_samples,
        "base_loss": loss.base,
        "tuned_loss": loss.tuned,
        "change": loss.change.mean,
        "low": loss.change.low,
        "high": loss.change.high,
    }


def shorten(text: str) -> str:
    """A text that fits into a table's cell."""
    return text if len(text) <= _MAX_LABEL else text[: _MAX_LABEL - 3] + "..."


def draw_layers(layers: "Sequence[LayerDrift]") -> "Figure":
    """Drift over layers, one line per group, and below it how far the layer's weights moved."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    drift, weights = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    places = range(len(layers))
    shown = []
    for group in GROUPS:
        if group in layers[0].drift:
            values = [layer.drift[group] for layer in layers]
            shown += values
            drift.plot(
                places, values, marker="o", markersize=4, linewidth=1.2, label=group, color=_COLOURS[group]
            )
    if any(shown):
        drift.set_yscale("symlog", linthresh=max(1e-7, min(value for value in shown if value > 0)))
        drift.set_ylim(bottom=0)
    drift.set_ylabel("1 - mean cosine")
    drift.grid(True, linewidth=0.3)
    drift.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    changes = [layer.weight_change if math.isfinite(layer.weight_change) else 0.0 for layer in layers]
    weights.bar(places, changes, color="tab:gray")
    weights.set_ylabel("||dW|| / ||W||")
    weights.grid(True, axis="y", linewidth=0.3)
    names = [layer.layer.removeprefix("block ") for layer in layers]
    weights.set_xticks(list(places), names, rotation=90 if len(layers) > 12 else 0)
    weights.set_xlabel("layer (tokens: the table; numbers: blocks; norm: the final norm)")
    return figure


def draw_cosines(prompts: "Sequence[PromptDrift]") -> "Figure":
    """One point per prompt, by group, and each group's median."""
    from matplotlib.figure import Figure

    groups = [group for group in GROUPS if any(one.entry.group == group for one in prompts)]
    figure = Figure(figsize=(8, 1.2 + 0.9 * len(groups)), layout="constrained")
    axes = figure.subplots()
    for height, group in enumerate(groups):
        values = [one.states.cosine for one in prompts if one.entry.group == group]
        # Spread in a fixed pattern, so that equal values do not hide each other and no drawing differs from the next.
        offsets = [height + 0.25 * ((7 * index) % 11 - 5) / 5 for index in range(len(values))]
        axes.scatter(values, offsets, s=16, alpha=0.7, linewidths=0, color=_COLOURS[group])
        axes.vlines(median(values), height - 0.4, height + 0.4, color="black", linewidth=1.2)
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.set_xlabel("cosine against the base encoder (line: median)")
    axes.grid(True, axis="x", linewidth=0.3)
    return figure
