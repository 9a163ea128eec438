"""Probe: how far does a LoRA move the weights of the DiT?

Reports ||scale * B A||_F / ||W||_F and the effective rank of every adapted module, per block and per type, against a
cap. Base tensors are read one at a time, only those that are adapted; no product B A and no model is ever built.
See docs/diagnostics/lora_delta_budget.md.
"""

import argparse
import sys
from collections.abc import Sequence

from models.wan.checkpoint import open_transformer
from models.wan.probes.delta import WEAK_RATIO, choose_caps, judge_delta, measure_delta
from models.wan.probes.delta_report import add_delta_inputs, add_delta_results
from models.wan.probes.subject import OUTPUT_ROOT, choose_subject
from utils.argument_types import positive_float
from utils.config.schema import BudgetConfig
from utils.probe_cli import add_flags, probe_parser, run_probe
from utils.report import Report, Verdict

TOOL = "lora_delta_budget"
QUESTION = "How far does the adapter move the weights of the DiT, and does every module stay within its cap?"
DEFAULT_CAP: float = BudgetConfig().max_delta_ratio
HOW_TO_READ = """\
- **ratio** is the Frobenius norm of what the adapter adds, relative to that of the weight it adds to: at 0.05 the weight
  moves by 5 % of its own size.
- **effective rank** is how many directions the adapter really uses. Far below the rank, a smaller rank would do.
- **spectral ratio** (with `--spectral`) compares the largest singular values instead: how much the direction that is
  moved most is moved, relative to the largest that the base has.
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
    parser.add_argument(
        "--max_mean_delta_ratio",
        metavar="X",
        type=positive_float,
        help="cap on the mean over all modules (default: the run's [budget], else none)",
    )
    parser.add_argument(
        "--min_delta_ratio",
        metavar="X",
        type=positive_float,
        default=WEAK_RATIO,
        help="a module below it does hardly anything; where all are, the verdict is inconclusive (default: %(default)s)",
    )
    parser.add_argument(
        "--spectral",
        action="store_true",
        help="also report the ratio of spectral norms; the first time for a base this takes a second or two a module at the size of A14B",
    )
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Measure, write the report, and return the verdict."""
    subject = choose_subject(args)
    caps = choose_caps(subject, args.max_delta_ratio, args.max_mean_delta_ratio, args.min_delta_ratio)
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag)
    source = open_transformer(subject.transformer)
    result = measure_delta(subject, source, spectral=args.spectral)
    for remark in (*subject.remarks, *result.remarks):
        print(remark)
        report.note(remark)
    verdict, explanation = judge_delta(result.deltas, caps)
    add_delta_inputs(report, subject, source)
    add_delta_results(report, result, caps, subject.expert)
    directory = report.write(verdict, explanation, HOW_TO_READ, NEXT_STEPS[verdict])
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def main(argv: Sequence[str] | None = None) -> int:
    """Run the probe and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
