"""Probe: how far does a LoRA move the weights of the DiT?

Reports ||scale * B A||_F / ||W||_F and the effective rank of every adapted module, per block and per type, against a
cap. Base tensors are read one at a time, only those that are adapted; no product B A and no model is ever built.
See docs/diagnostics/lora_delta_budget.md.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from models.wan.checkpoint import EXPERT_DIRS, open_transformer
from models.wan.names import dit_to_diffusers
from utils.adapter_runs import find_adapter_file, last_save, newest_adapter_run, run_of_adapter
from utils.config.load import load_config
from utils.config.schema import BudgetConfig, Expert, TrainConfig
from utils.errors import UserError
from utils.files import combined_fingerprint
from utils.lora_names import AdapterFile, kohya_aliases, read_adapter
from utils.probe_cli import positive_float, probe_parser, run_probe
from utils.report import Report, Verdict
from utils.tensor_source import TensorSource, open_safetensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from utils.delta_budget import GroupDelta, ModuleDelta

TOOL = "lora_delta_budget"
QUESTION = "How far does the adapter move the weights of the DiT, and does every module stay within its cap?"
OUTPUT_ROOT = Path("output")
DEFAULT_CAP: float = BudgetConfig().max_delta_ratio
# An adapter below this everywhere is weaker than rounding the weights to bfloat16, which moves them by about 1.6e-3.
WEAK_RATIO = 1e-4
_FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
_LOG_SPREAD = 30
_BASE_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
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


@dataclass(frozen=True)
class Subject:
    """What is measured against what; `remarks` say how it was chosen where no flag said it."""

    adapter: Path
    transformer: Path
    config: Path | None
    expert: Expert | None
    cap: float
    cap_source: str
    remarks: tuple[str, ...]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser(
        TOOL,
        "How far does a LoRA move the weights of the DiT? Reports ||scale * B A|| / ||W|| and the effective rank per\n"
        f"module, block and type, against a cap. Without arguments: the newest run below {OUTPUT_ROOT}/.",
    )
    parser.add_argument(
        "--adapter", metavar="FILE_OR_DIR", type=Path, help="LoRA file, the directory it is in, or a run"
    )
    parser.add_argument(
        "--base",
        metavar="CKPT",
        type=Path,
        help="base checkpoint: directory or .safetensors (default: the run's)",
    )
    parser.add_argument(
        "--expert", choices=get_args(Expert), help="A14B: the adapter's expert (default: the run's)"
    )
    parser.add_argument(
        "--max_delta_ratio",
        metavar="X",
        type=positive_float,
        help=f"cap on the ratio of every module (default: the run's [budget], else {DEFAULT_CAP})",
    )
    parser.add_argument(
        "--config",
        metavar="TOML",
        type=Path,
        help="config that names base, expert and cap (default: the run's)",
    )
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Measure, write the report, and return the verdict."""
    subject = choose_subject(args)
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag)
    source = open_transformer(subject.transformer)
    for remark in (*subject.remarks, *base_remarks(subject.adapter, source)):
        print(remark)
        report.note(remark)
    adapter, base_keys = read_fitting_adapter(subject, source)
    deltas = measure(adapter, source, base_keys)
    verdict, explanation = judge(deltas, subject.cap)
    add_inputs(report, subject, source)
    add_results(report, subject, adapter, deltas)
    directory = report.write(verdict, explanation, HOW_TO_READ, NEXT_STEPS[verdict])
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def choose_subject(args: argparse.Namespace) -> Subject:
    """Fill in what no flag says: from --config, else from the run that the adapter lies in.

    Raises:
        UserError: an adapter or its base is missing, or which expert is meant is open.
    """
    remarks: list[str] = []
    adapter = choose_adapter(args, remarks)
    run = run_of_adapter(adapter)
    config_path = args.config or (run.config if run else None)
    config = load_config(config_path).train if config_path else None
    base = args.base
    if base is None:
        if config is None:
            raise UserError(
                f"{adapter}: lies in no run that names its base; name it with --base, or --config"
            )
        base = Path(config.model.transformer_path or config.model.ckpt_path)
        remarks.append(f"base: {base} (from {config_path})")
    saved_for = expert_of_adapter(adapter)
    expert = args.expert or (config.model.expert if config else None) or saved_for
    if saved_for not in (None, expert):
        remarks.append(
            f"{adapter} says that it is for the expert {saved_for}, but it is held against {expert}"
        )
    transformer = choose_transformer(base, expert, is_asked_for=args.expert is not None)
    cap, cap_source = choose_cap(args.max_delta_ratio, config, config_path)
    return Subject(adapter, transformer, config_path, expert, cap, cap_source, tuple(remarks))


def base_remarks(adapter: Path, source: TensorSource) -> list[str]:
    """A warning where the file says that it was trained on other weights than these."""
    trained_on = open_safetensors([adapter]).metadata().get("base_hash")
    if trained_on in (None, combined_fingerprint(source.files)):
        return []
    return [
        f"warning: {adapter} was trained on other base weights than those in {source.files[0].parent} "
        "(fingerprints differ); the ratios below are against the latter"
    ]


def choose_adapter(args: argparse.Namespace, remarks: list[str]) -> Path:
    """The adapter's file: the one named, else that of the config's run, else the one that was saved last."""
    if args.adapter is not None:
        adapter = find_adapter_file(args.adapter)
        if adapter != args.adapter:
            remarks.append(f"adapter: {adapter} (found in {args.adapter})")
        return adapter
    if args.config is not None:
        own = last_save(args.config.parent)
        if own is not None:
            remarks.append(f"adapter: {own} (the last save of {args.config.parent})")
            return own
    root = Path(load_config(args.config).train.output_dir) if args.config is not None else OUTPUT_ROOT
    adapter = newest_adapter_run(root).adapter
    remarks.append(f"adapter: {adapter} (of the newest run below {root})")
    return adapter


def expert_of_adapter(adapter: Path) -> Expert | None:
    """The expert that the file's metadata name, if they do: this project writes them, others may not."""
    value = open_safetensors([adapter]).metadata().get("expert")
    return next((expert for expert in get_args(Expert) if expert == value), None)


def choose_transformer(base: Path, expert: Expert | None, *, is_asked_for: bool) -> Path:
    """The directory or file of the DiT itself: in an A14B checkpoint, that of one expert.

    Raises:
        UserError: there is no such checkpoint, it has two experts and none was chosen, or one was asked for in vain.
    """
    if not base.exists():
        raise UserError(f"{base}: no such checkpoint; check --base or the config's ckpt_path")
    if any((base / folder).is_dir() for folder in EXPERT_DIRS.values()):
        if expert is None:
            raise UserError(f"{base}: is an A14B checkpoint with two experts; say which with --expert")
        return base / EXPERT_DIRS[expert]
    if is_asked_for and expert is not None and base.is_dir() and base.name != EXPERT_DIRS[expert]:
        raise UserError(
            f"{base}: holds no {EXPERT_DIRS[expert]}/, which --expert {expert} asks for; check both"
        )
    return base


def choose_cap(flag: float | None, config: TrainConfig | None, config_path: Path | None) -> tuple[float, str]:
    """The cap and where it comes from: the flag, else the config's [budget], else the default."""
    if flag is not None:
        return flag, "--max_delta_ratio"
    if config is not None and config.budget is not None:
        return config.budget.max_delta_ratio, f"[budget] of {config_path}"
    return DEFAULT_CAP, "default"


def read_fitting_adapter(subject: Subject, source: TensorSource) -> tuple[AdapterFile, dict[str, str]]:
    """The adapter, and the name in the base's files of each weight that it adapts.

    Raises:
        UserError: the base is no DiT or is quantised, or the adapter was made for another one; up to ten mismatches
            are named.
    """
    base_keys = linear_weights(source)
    try:
        diffusers_aliases = {dit_to_diffusers(module): module for module in base_keys}
    except UserError as error:
        raise UserError(f"{subject.transformer}: is no Wan DiT ({error}); check --base") from None
    adapter = read_adapter(subject.adapter, diffusers_aliases | kohya_aliases(base_keys))
    mismatches = []
    for module, pair in adapter.modules.items():
        adapted = (pair.up.shape[0], math.prod(pair.down.shape[1:]))
        if module not in base_keys:
            mismatches.append(f"the base has no {module}")
            continue
        shape = source.shapes[base_keys[module]]
        if adapted != (shape[0], math.prod(shape[1:])):
            mismatches.append(f"{module} adapts {list(adapted)}, the base has {list(shape)}")
    if mismatches:
        more = "; ..." if len(mismatches) > 10 else ""
        raise UserError(
            f"{adapter.path}: {len(mismatches)} of {len(adapter.modules)} modules do not fit {subject.transformer}: "
            f"{'; '.join(mismatches[:10])}{more}; give the base that the adapter was trained on"
        )
    dtypes = {module: source.dtypes[base_keys[module]] for module in adapter.modules}
    quantised = next((module for module in dtypes if dtypes[module] not in _FLOAT_DTYPES), None)
    if quantised is not None:
        raise UserError(
            f"{subject.transformer}: {quantised} is stored as {dtypes[quantised]}, whose scale is kept elsewhere; give the "
            "unquantised checkpoint"
        )
    return adapter, {module: base_keys[module] for module in adapter.modules}


def linear_weights(source: TensorSource) -> dict[str, str]:
    """Official module paths of all weights that a LoRA can adapt, and their names in the files."""
    keys = {}
    for key, shape in source.shapes.items():
        prefix = next((prefix for prefix in _BASE_PREFIXES if key.startswith(prefix)), "")
        if key.endswith(".weight") and len(shape) >= 2:
            keys[key.removeprefix(prefix).removesuffix(".weight")] = key
    return keys


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
    if subject.config is not None:
        report.add_input("config", subject.config)
    for path in source.files:
        report.add_input("base", path)


def add_results(
    report: Report, subject: Subject, adapter: AdapterFile, deltas: "Sequence[ModuleDelta]"
) -> None:
    """Numbers, tables and the plot."""
    from utils.delta_budget import over_cap, summarise

    summary = summarise(deltas)
    report.cap("max_delta_ratio", subject.cap, f"a module above it fails; from {subject.cap_source}")
    report.cap("weak_ratio", WEAK_RATIO, "an adapter below it everywhere is inconclusive")
    report.metric("max_ratio", summary.overall.max_ratio, "largest ratio of all modules")
    report.metric("worst_module", summary.overall.worst_module, "where that is")
    report.metric("mean_ratio", summary.overall.mean_ratio, "mean over all modules")
    report.metric("num_modules", len(deltas), "adapted modules")
    report.metric("num_over_cap", len(over_cap(deltas, subject.cap)), "modules over the cap")
    report.metric("ranks", sorted({delta.rank for delta in deltas}))
    mean_rank = sum(delta.effective_rank for delta in deltas) / len(deltas)
    report.metric("mean_effective_rank", mean_rank, "directions that an adapter really uses, on average")
    if subject.expert is not None:
        report.metric("expert", subject.expert, "which of the two of an A14B model")
    report.metric("cap_source", subject.cap_source)
    sources = sorted({pair.scale_source for pair in adapter.modules.values()})
    report.metric("scale_source", ", ".join(sources), "where alpha was found; none means that the scale is 1")
    report.metric("types", {group.group: group_numbers(group) for group in summary.types})
    rows = [module_row(delta, subject.cap) for delta in sorted(deltas, key=lambda delta: -delta.ratio)]
    report.table("types", [group_row("type", group) for group in summary.types], "Per type")
    report.table(
        "blocks", [group_row("block", group) for group in summary.blocks], "Per block", inline_rows=48
    )
    report.table("modules", rows, "Per module, largest ratio first", inline_rows=10)
    if any(delta.block is not None for delta in deltas):
        report.plot("ratio_per_block", draw(deltas, subject.cap), "Ratio per block")


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
