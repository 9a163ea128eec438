"""Probe: do attention logits keep their scale?

Ratio of the standard deviation and of the entropy of Q K^T / sqrt(d), with the adapter (or in another checkpoint) over the
base, per block and head, on samples of the run's cache at several noise levels, or on random inputs (--synthetic). Blocks are
fed what the base computes; one block's weights are in memory at a time. See docs/diagnostics/attn_logit_probe.md.
"""

import argparse
import sys
from collections.abc import Sequence

from models.wan.probes.base import arch_of, open_official
from models.wan.probes.delta_report import add_adapter_inputs
from models.wan.probes.logit_flags import add_logit_flags, check_logit_flags
from models.wan.probes.logit_report import KINDS, add_logit_results, judge_logits
from models.wan.probes.logit_subject import LogitSubject, choose_logit_subject, measure_logits
from utils.argument_types import path_of
from utils.probe_cli import add_flags, probe_parser, run_probe
from utils.report import Report, Verdict

TOOL = "attn_logit_probe"
QUESTION = "Do the attention logits of the DiT keep their scale, block by block and head by head?"
HOW_TO_READ = """\
- **std ratio** compares how far a query's logits are spread over its keys, adapted over base. Above 1, attention has
  become sharper: fewer words decide. Below 1, it has become blurred. Both change how the model draws.
- **entropy ratio** says the same of the weights that follow from them; where the spread hardly changes it stays near 1.
- **key and value ratios** are lengths. A longer key before `norm_k` does not change the logits, since the norm takes its length
  away; a longer value does change what is said.
- One block far from the others is a hot spot; a single head outside the band does not fail, many do through their block's mean."""
NEXT_STEPS: dict[Verdict, str] = {
    "pass": "- Look at samples with a frozen seed, adapter off and on.",
    "fail": (
        "- Take the blocks outside the band out with `train_blocks_range` or `exclude`.\n"
        "- Lower `max_delta_ratio`, the learning rate or the number of steps, or use an earlier save.\n"
        "- If an adapter touches `self_attn.*`, switch it off first and measure again."
    ),
    "inconclusive": "- Check that the adapter is the one that was meant, and that its run did train.",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser(
        TOOL,
        "Do attention logits keep their scale? Reports the ratio of the standard deviation and of the entropy of\n"
        "Q K^T / sqrt(d), adapted over base, per block and head. Without arguments: the newest run below output/, on\n"
        "samples of its cache. A real base on a CPU takes minutes a block and sample; --synthetic takes seconds.",
    )
    add_flags(parser, "config", "base", "expert", "adapter", "device", "seed")
    parser.add_argument(
        "--against",
        metavar="CKPT",
        type=path_of,
        help="hold this checkpoint against the base, instead of an adapter",
    )
    parser.add_argument(
        "--attention", choices=tuple(KINDS), default="cross", help="which (default: %(default)s)"
    )
    add_logit_flags(parser)
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Measure, write the report, and return the verdict."""
    check_logit_flags(args)
    subject = choose_logit_subject(args)
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag, args.seed)
    base = open_official(subject.base)
    arch = arch_of(subject.base, base)
    result, inputs, remarks = measure_logits(subject, base, arch, KINDS[args.attention], args, say=print)
    for remark in (*subject.remarks, *remarks):
        print(remark)
        report.note(remark)
    verdict, explanation = judge_logits(result, args.min_ratio, args.max_ratio)
    add_inputs(report, subject)
    report.metric("inputs", inputs)
    report.metric("attention", args.attention)
    add_logit_results(report, result, args.min_ratio, args.max_ratio)
    directory = report.write(verdict, explanation, HOW_TO_READ, NEXT_STEPS[verdict])
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def add_inputs(report: Report, subject: LogitSubject) -> None:
    """Name every file that the numbers come from."""
    if subject.adapter is not None:
        add_adapter_inputs(report, subject.adapter)
    if subject.config_path is not None:
        report.add_input("config", subject.config_path)
    for role, place in (("base", subject.base), ("against", subject.against)):
        for path in () if place is None else open_official(place).files:
            report.add_input(role, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the probe and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
