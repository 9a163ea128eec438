"""A closed-form adapter as its report shows it: key numbers, tables and the frontiers."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING, Any

from models.wan.closed_form.fit_moments import FitMoments, Group
from models.wan.closed_form.fit_search import Fitted
from models.wan.closed_form.fit_subject import FitSide
from utils.lora_targets import split_block_path
from utils.report import Report
from utils.report_summary import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOW_TO_READ = """\
- **residual** is how far keys (before `norm_k`) and values of the frozen DiT are from what the base encoder made them, relative
  to that: `before` without the adapter, `after` with it, a mean over targets. **recovery** is 1 - after / before.
- **held-out** prompts were not fitted on: they judge. A fitted residual far below the held-out one asks for more prompts or a
  larger ridge.
- **domain shift** is how far keys and values of domain prompts are moved, relative to their size; they should stay, so 0 is
  best. More `--keep_weight` lowers it, at the price of recovery.
- **delta ratio** is |dW| / |W| of each module. The first frontier shows what a smaller one costs, the second what the rank does.
- Numbers of the frontiers are means over the targets of two blocks; those of the chosen point in the table of groups are
  over all targets.
- Nothing here says how pictures look. Draw known and new words with a frozen seed, without and with the adapter."""
NEXT_STEPS: dict[Verdict, str] = {
    "pass": (
        "- Hold it against its caps: `lora_delta_budget`, `attn_logit_probe`.\n"
        "- Draw with a frozen seed: `prompt_grid`.\n"
        "- To refine it by training: `[adapter] init_from_existing` with the same rank and targets."
    ),
    "fail": (
        "- Give more, and more varied, neutral prompts; or a larger `--ridge`.\n"
        "- Do not use the adapter: on held-out prompts it makes the DiT hear worse than without it."
    ),
    "inconclusive": (
        "- Give prompts of the domain with --domain_prompts, so that new words are kept and their shift is measured.\n"
        "- Give at least four neutral prompts, so that some can be held out."
    ),
}
_NAMES: dict[Group, str] = {
    ("neutral", False): "neutral, fitted",
    ("neutral", True): "neutral, held out",
    ("domain", False): "domain, fitted",
    ("domain", True): "domain, held out",
    ("anchor", False): "empty and negative prompt",
}


def judge(fitted: Sequence[Fitted]) -> tuple[Verdict, str]:
    """The verdict over all sides, and the sentence that explains it."""
    recovery = min(one.chosen.recovery for one in fitted)
    shifts = [one.chosen.shift for one in fitted if one.chosen.shift is not None]
    ratio = max(one.chosen.max_ratio for one in fitted)
    judged = "held-out" if all(one.is_held_out for one in fitted) else "fitted"
    said = (
        f"{recovery:.1%} of what {judged} neutral prompts lost is restored; largest delta ratio {ratio:.3g}"
    )
    if recovery <= 0:
        return (
            "fail",
            f"On {judged} neutral prompts keys and values are no nearer to the base's than without the adapter "
            f"(recovery {recovery:.1%}).",
        )
    if not shifts:
        return "inconclusive", f"{said}; without domain prompts nobody knows what new words lost."
    if judged == "fitted":
        return "inconclusive", f"{said}; nothing was held out."
    return "pass", f"{said}; keys and values of domain prompts moved by {max(shifts):.1%}."


def add_results(
    report: Report, sides: Sequence[FitSide], fitted: Sequence[Fitted], moments: FitMoments
) -> None:
    """Numbers, tables and plots; of two experts under their names."""
    report.metric("num_neutral_prompts", moments.part_prompts[-1], "fitted on")
    for (role, is_held), tokens in moments.measured.items():
        name = f"measured_{role}_{'held_out' if is_held else 'fitted'}"
        report.metric(
            f"{name}_prompts",
            tokens.num_prompts,
            f"{len(tokens.tuned_ND)} tokens that residuals are measured on",
        )
    tables: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for side, found in zip(sides, fitted, strict=True):
        prefix = "" if side.expert is None or len(sides) == 1 else f"{side.expert}_"
        _add_metrics(report, prefix, found)
        own = {} if not prefix else {"expert": side.expert}
        for name, rows in _tables(found).items():
            tables[name] += [own | row for row in rows]
        report.plot(
            f"{prefix}frontier", draw_frontiers(found), f"{prefix.replace('_', ' ')}frontiers".capitalize()
        )
    titles = {
        "groups": "Residuals, means over all targets",
        "blocks": "Per block",
        "modules": "Per module",
        "ridges": "Ridges that were tried (two blocks)",
        "ranks": "Ranks at the chosen ridge (two blocks)",
        "prompts": "Fewer prompts (two blocks)",
    }
    for name, title in titles.items():
        report.table(name, tables[name], title, inline_rows=0 if name == "modules" else 80)


def _add_metrics(report: Report, prefix: str, found: Fitted) -> None:
    chosen = found.chosen
    report.metric(f"{prefix}recovery", chosen.recovery, "share of the lost that is restored, all targets")
    report.metric(f"{prefix}neutral_residual", chosen.residual, "what is still missing, relative")
    report.metric(f"{prefix}domain_shift", chosen.shift, "how far keys and values of domain prompts move")
    report.metric(f"{prefix}mean_delta_ratio", chosen.mean_ratio)
    report.metric(f"{prefix}max_delta_ratio", chosen.max_ratio)
    report.metric(f"{prefix}rank", chosen.rank)
    report.metric(f"{prefix}ridge", found.ridge, "in units of the tokens' mean second moment")
    report.metric(
        f"{prefix}ridge_without_caps",
        found.best_ridge,
        "the one asked for, or the largest within a standard error of the least held-out error",
    )
    cost = found.unbounded.recovery - found.bounded.recovery
    report.metric(f"{prefix}recovery_lost_to_caps", cost, "two blocks; 0 where no cap was in the way")
    report.metric(f"{prefix}full_rank_recovery", found.full_recovery, "two blocks; what no rank exceeds")
    report.metric(
        f"{prefix}enough_prompts", found.enough, "they restore 98 % of what all do; null: all are needed"
    )
    report.metric(f"{prefix}padding_shift", max(one.padding for one in found.solved), "rounding; 0 is exact")
    report.metric(
        f"{prefix}svd_error",
        max(one.error for one in found.solved),
        "last rise of what the rank holds, largest",
    )


def _tables(found: Fitted) -> dict[str, list[dict[str, Any]]]:
    groups = [
        {"group": name} | _mean_row(found, group)
        for group, name in _NAMES.items()
        if group in found.solved[0].residuals
    ]
    blocks: dict[int, list[int]] = defaultdict(list)
    for place, one in enumerate(found.solved):
        blocks[split_block_path(one.module)[0]].append(place)
    return {
        "groups": groups,
        "blocks": [{"block": block} | _target_row(found, places) for block, places in blocks.items()],
        "modules": [
            {"module": one.module} | _target_row(found, [place]) for place, one in enumerate(found.solved)
        ],
        "ridges": [asdict(point) | {"is_chosen": point.ridge == found.ridge} for point in found.ridges],
        "ranks": [asdict(point) | {"is_chosen": point.rank == found.chosen.rank} for point in found.ranks],
        "prompts": [asdict(point) for point in found.counts],
    }


def _mean_row(found: Fitted, group: Group) -> dict[str, Any]:
    own = [one.residuals[group] for one in found.solved]
    row: dict[str, Any] = {
        "before": fmean(one.before for one in own),
        "after": fmean(one.after for one in own),
    }
    return row | {"recovery": None if group[0] == "domain" else fmean(one.recovery for one in own)}


def _target_row(found: Fitted, places: Sequence[int]) -> dict[str, Any]:
    solved = [found.solved[place] for place in places]
    neutral = [one.residuals["neutral", found.is_held_out] for one in solved]
    domain = ("domain", found.is_held_out)
    kept = [one.residuals[domain] for one in solved if domain in one.residuals]
    return {
        "before": fmean(one.before for one in neutral),
        "after": fmean(one.after for one in neutral),
        "recovery": fmean(one.recovery for one in neutral),
        "domain_shift": fmean(one.after for one in kept) if kept else None,
        "mean_delta_ratio": fmean(one.delta.ratio for one in solved),
        "max_delta_ratio": max(one.delta.ratio for one in solved),
        "effective_rank": fmean(one.delta.effective_rank for one in solved),
    }


def draw_frontiers(found: Fitted) -> "Figure":
    """Recovery over delta ratio (ridges), over rank, and residual over the number of prompts; the chosen point starred."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    ratio, rank, count = figure.subplots(1, 3)
    points = sorted(found.ridges, key=lambda point: point.mean_ratio)
    ratio.plot([one.mean_ratio for one in points], [one.recovery for one in points], marker="o", markersize=4)
    ratio.plot(
        found.bounded.mean_ratio, found.bounded.recovery, "*", color="tab:red", markersize=14, label="chosen"
    )
    ratio.set_xscale("log")
    ratio.set_xlabel("mean delta ratio (one point a ridge)")
    ratio.set_ylabel("recovery on held-out prompts" if found.is_held_out else "recovery on fitted prompts")
    rank.plot(
        [one.rank for one in found.ranks], [one.recovery for one in found.ranks], marker="o", markersize=4
    )
    rank.plot(found.bounded.rank, found.bounded.recovery, "*", color="tab:red", markersize=14, label="chosen")
    rank.axhline(found.full_recovery, color="black", linestyle="--", linewidth=1, label="full rank")
    rank.set_xscale("log", base=2)
    rank.set_xlabel("rank at the chosen ridge")
    count.plot(
        [one.num_prompts for one in found.counts],
        [one.residual for one in found.counts],
        marker="o",
        markersize=4,
    )
    count.set_xlabel("neutral prompts")
    count.set_ylabel("residual")
    # From 0: differences of a thousandth are to look like that.
    count.set_ylim(0.0, 1.1 * max(one.residual for one in found.counts))
    for axes in (ratio, rank, count):
        axes.grid(True, linewidth=0.3)
    for axes in (ratio, rank):
        low = min(point.recovery for point in (*found.ridges, *found.ranks))
        axes.set_ylim(max(low - 0.05, -0.5), 1.02)
        axes.legend(fontsize="small")
    return figure
