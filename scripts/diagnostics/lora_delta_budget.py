"""Probe: how far does a LoRA move the weights of the DiT?

Reports ||scale * B A||_F / ||W||_F and the effective rank of every adapted module, per block and per type, against a
cap. Base tensors are read one at a time, only those that are adapted; no product B A and no model is ever built.
See docs/diagnostics/lora_delta_budget.md.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from models.wan.checkpoint import open_transformer
from models.wan.probes.subject import (
    OUTPUT_ROOT,
    Cap,
    Subject,
    base_remarks,
    choose_cap,
    choose_subject,
    read_fitting_adapter,
)
from utils.config.schema import BudgetConfig
from utils.errors import UserError
from utils.lora_names import AdapterFile
from utils.probe_cli import add_flags, positive_float, probe_parser, run_probe
from utils.report import Report, Verdict
from utils.tensor_source import TensorSource

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from utils.delta_budget import GroupDelta, ModuleDelta

TOOL = "lora_delta_budget"
QUESTION = "How far does the adapter move the weights of the DiT, and does every module stay within its cap?"
DEFAULT_CAP: float = BudgetConfig().max_delta_ratio
# An adapter below this everywhere is weaker than rounding the weights to bfloat16, which moves them by about 1.6e-3.
WEAK_RATIO = 1e-4
_LOG_SPREAD = 30
HOW_TO_READ = """\
- **ratio** is the Frobenius norm of what the adapter adds, relative to that of the weight it adds to: at 0.05 the weight
  moves by 5 % of its own size.
- **effective rank** is how many directions the adapter really uses. Far below the rank, a smaller rank would do.
- One block far above the others, or a maximum far above the mean, is a hot spot: look there first.
- The ratio says how far, not whether in a good direction: only samples with a frozen seed show that."""
NEXT_STEPS: dict[Verdict, str] = {
    "pass": "- Look at samples with a frozen seed, adapter off and on.\n- Keep the cap in the config of the next run.",
    "fail": (
        "- Lower the learning rate or the number of steps, or use an earlier save.\n"
        "- Take the modules over the cap out with `exclude` or `train_blocks_range`.\n"
        "- Raise the cap only after looking at samples with a frozen seed."
    ),
    "inconclusive": (
        "- Check that the run did train: loss, learning rate, number of steps.\n"
        "- Check that the adapter's scale (alpha) is what the trainer meant."
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser(
        TOOL,
        "How far does a LoRA move the weights of the DiT? Reports ||scale * B A|| / ||W|| and the effective rank per\n"
        f"module, block and type, against a cap. Without arguments: the newest run below {OUTPUT_ROOT}/.",
    )
    add_flags(parser, "config", "base", "expert", "adapter")
    parser.add_argument(
        "--max_delta_ratio",
        metavar="X",
        type=positive_float,
        help=f"cap on the ratio of every module (default: the run's [budget], else {DEFAULT_CAP})",
    )
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Measure, write the report, and return the verdict."""
    subject = choose_subject(args)
    cap = choose_cap("max_delta_ratio", args.max_delta_ratio, subject.config, subject.config_path)
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag)
    source = open_transformer(subject.transformer)
    for remark in (*subject.remarks, *base_remarks(subject.adapter, source)):
        print(remark)
        report.note(remark)
    adapter, base_keys = read_fitting_adapter(subject, source)
    deltas = measure(adapter, source, base_keys)
    verdict, explanation = judge(deltas, cap.value)
    add_inputs(report, subject, source)
    add_results(report, subject, cap, adapter, deltas)
    directory = report.write(verdict, explanation, HOW_TO_READ, NEXT_STEPS[verdict])
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def measure(adapter: AdapterFile, source: TensorSource, base_keys: dict[str, str]) -> "list[ModuleDelta]":
    """One record per adapted module; each base tensor is read once and let go.

    Raises:
        UserError: a base weight holds values that are not finite.
    """
    from utils.delta_budget import module_delta, weight_norm

    deltas = []
    for module, pair in adapter.modules.items():
        norm = weight_norm(source.get(base_keys[module]))
        if not math.isfinite(norm):
            raise UserError(
                f"{source.files[0]}: {base_keys[module]} holds NaN or infinite values; download it again"
            )
        deltas.append(module_delta(module, pair.down, pair.up, pair.scale, norm))
    return deltas


def judge(deltas: "Sequence[ModuleDelta]", cap: float) -> tuple[Verdict, str]:
    """The verdict and the sentence that explains it."""
    from utils.delta_budget import over_cap, summarise

    over, overall = over_cap(deltas, cap), summarise(deltas).overall
    if over:
        count = f"{len(over)} of {len(deltas)} modules"
        return (
            "fail",
            f"{count} over the cap of {cap:g}; the farthest is {over[0].module} with {over[0].ratio:.4f}.",
        )
    largest = f"the largest ratio is {overall.max_ratio:.3g} ({overall.worst_module})"
    if overall.max_ratio < WEAK_RATIO:
        return "inconclusive", f"The adapter changes hardly anything: {largest}, below {WEAK_RATIO:g}."
    return "pass", f"All {len(deltas)} modules are within the cap of {cap:g}; {largest}."


def add_inputs(report: Report, subject: Subject, source: TensorSource) -> None:
    """Name every file that the numbers come from."""
    report.add_input("adapter", subject.adapter)
    peft_config = subject.adapter.with_name("adapter_config.json")
    if peft_config.is_file():
        report.add_input("adapter_config", peft_config)
    if subject.config_path is not None:
        report.add_input("config", subject.config_path)
    for path in source.files:
        report.add_input("base", path)


def add_results(
    report: Report, subject: Subject, cap: Cap, adapter: AdapterFile, deltas: "Sequence[ModuleDelta]"
) -> None:
    """Numbers, tables and the plot."""
    from utils.delta_budget import over_cap, summarise

    summary = summarise(deltas)
    report.cap("max_delta_ratio", cap.value, f"a module above it fails; from {cap.source}")
    report.cap("weak_ratio", WEAK_RATIO, "an adapter below it everywhere is inconclusive")
    report.metric("max_ratio", summary.overall.max_ratio, "largest ratio of all modules")
    report.metric("worst_module", summary.overall.worst_module, "where that is")
    report.metric("mean_ratio", summary.overall.mean_ratio, "mean over all modules")
    report.metric("num_modules", len(deltas), "adapted modules")
    report.metric("num_over_cap", len(over_cap(deltas, cap.value)), "modules over the cap")
    report.metric("ranks", sorted({delta.rank for delta in deltas}))
    mean_rank = sum(delta.effective_rank for delta in deltas) / len(deltas)
    report.metric("mean_effective_rank", mean_rank, "directions that an adapter really uses, on average")
    if subject.expert is not None:
        report.metric("expert", subject.expert, "which of the two of an A14B model")
    report.metric("cap_source", cap.source)
    sources = sorted({pair.scale_source for pair in adapter.modules.values()})
    report.metric("scale_source", ", ".join(sources), "where alpha was found; none means that the scale is 1")
    report.metric("types", {group.group: group_numbers(group) for group in summary.types})
    rows = [module_row(delta, cap.value) for delta in sorted(deltas, key=lambda delta: -delta.ratio)]
    report.table("types", [group_row("type", group) for group in summary.types], "Per type")
    report.table(
        "blocks", [group_row("block", group) for group in summary.blocks], "Per block", inline_rows=48
    )
    report.table("modules", rows, "Per module, largest ratio first", inline_rows=10)
    if any(delta.block is not None for delta in deltas):
        report.plot("ratio_per_block", draw(deltas, cap.value), "Ratio per block")


def module_row(delta: "ModuleDelta", cap: float) -> dict[str, Any]:
    """One line of modules.csv."""
    place = {"module": delta.module, "block": delta.block, "type": delta.type}
    return place | asdict(delta) | {"is_over_cap": delta.is_over(cap)}


def group_row(kind: str, group: "GroupDelta") -> dict[str, Any]:
    """One line of blocks.csv or types.csv."""
    return {kind: group.group} | group_numbers(group)


def group_numbers(group: "GroupDelta") -> dict[str, Any]:
    """A group's numbers without its name."""
    return {name: value for name, value in asdict(group).items() if name != "group"}


def draw(deltas: "Sequence[ModuleDelta]", cap: float) -> "Figure":
    """Ratio over block, one line per kind of module, with the cap; logarithmic where the values lie far apart."""
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
    axes.axhline(cap, color="black", linestyle="--", linewidth=1, label=f"cap {cap:g}")
    shown = [cap, *(ratio for points in lines.values() for _, ratio in points)]
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the probe and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
