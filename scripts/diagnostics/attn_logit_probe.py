"""Probe: do attention logits keep their scale?

Ratio, adapted to base, of the standard deviation and of the entropy of QK^T / sqrt(d), per block and head, from the same
inputs: cached samples at several noise levels, or random ones. Blocks are read one at a time.
See docs/diagnostics/attn_logit_probe.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from models.wan.probes.comparison import choose_comparison
from models.wan.probes.logit_probe import add_logit_flags, band_of, measure_logits, plan_logits
from models.wan.probes.logit_report import HOW_TO_READ, add_logit_inputs, add_logit_results
from models.wan.probes.logit_result import judge_logits
from models.wan.probes.subject import OUTPUT_ROOT
from utils.probe_cli import add_flags, probe_parser, run_probe
from utils.report import Report, Verdict

TOOL = "attn_logit_probe"
QUESTION = "Do the attention logits of the DiT keep their scale?"
NEXT_STEPS: dict[Verdict, str] = {
    "pass": "- Look at samples with a frozen seed, adapter off and on.",
    "fail": (
        "- Look at the blocks outside: one alone is a hot spot, all of them mean that the adapter is too strong.\n"
        "- Lower the learning rate or the number of steps, use an earlier save, or leave `cross_attn.k` of those blocks out.\n"
        "- Compare with `lora_delta_budget`: a large ratio at a small delta means a sensitive place."
    ),
    "inconclusive": "",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser(
        TOOL,
        "Do attention logits keep their scale? Reports the ratio, adapted to base, of the standard deviation and of the\n"
        "entropy of QK^T/sqrt(d) per block and head, and of the norms of keys and values, from the same inputs: cached\n"
        "samples at several noise levels, or random ones (--synthetic). One block is in memory at a time.\n"
        f"Without arguments: the newest run below {OUTPUT_ROOT}/.",
    )
    add_flags(parser, "config", "base", "expert", "adapter", "device", "seed")
    parser.add_argument(
        "--against",
        metavar="CKPT",
        type=Path,
        help="instead of an adapter: another checkpoint of the same model, held against the base",
    )
    add_logit_flags(parser)
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Measure, write the report, and return the verdict."""
    band = band_of(args)
    comparison = choose_comparison(args)
    plan = plan_logits(args, comparison)
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag, seed=args.seed)
    result, remarks = measure_logits(args, comparison, plan)
    for remark in (*comparison.remarks, *plan.remarks, *remarks):
        print(remark)
        report.note(remark)
    verdict, explanation = judge_logits(result, band)
    add_logit_inputs(report, comparison)
    add_logit_results(report, result, plan, band, args.seed)
    if comparison.expert is not None:
        report.metric("expert", comparison.expert, "which of the two of an A14B model")
    directory = report.write(verdict, explanation, HOW_TO_READ, NEXT_STEPS[verdict])
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def main(argv: Sequence[str] | None = None) -> int:
    """Run the probe and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
