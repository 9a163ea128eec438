"""Probe: do attention logits keep their scale?

Ratio of the standard deviation and of the entropy of Q K^T / sqrt(d), with the adapter (or in another checkpoint) over the
base, per block and head, on samples of the run's cache at several noise levels, or on random inputs (--synthetic). Blocks are
fed what the base computes; one block's weights are in memory at a time. See docs/diagnostics/attn_logit_probe.md.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from models.wan.probes.base import arch_of, open_official
from models.wan.probes.logit_report import KINDS, MAX_RATIO, MIN_RATIO, add_logit_results, judge_logits
from models.wan.probes.logit_subject import LogitSubject, choose_logit_subject, measure_logits
from utils.errors import UserError
from utils.probe_cli import add_flags, positive_float, probe_parser, run_probe
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
        type=Path,
        help="hold this checkpoint against the base, instead of an adapter",
    )
    parser.add_argument(
        "--synthetic",
        action="store_true",
        help="random inputs instead of cached samples; reads only the blocks measured",
    )
    parser.add_argument(
        "--blocks",
        metavar="LIST",
        help="such as 0,10,20-29 (default: those that the adapter touches, else all)",
    )
    parser.add_argument(
        "--attention", choices=tuple(KINDS), default="cross", help="which (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", metavar="N", type=int, default=2, help="samples of the cache (default: %(default)s)"
    )
    parser.add_argument(
        "--quantiles",
        metavar="LIST",
        default="0.1,0.5,0.9",
        help="noise levels, as quantiles of the law that the run trains on (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=int,
        default=256,
        help="--synthetic: number of queries (default: %(default)s)",
    )
    parser.add_argument(
        "--min_ratio",
        metavar="X",
        type=positive_float,
        default=MIN_RATIO,
        help="pass band (default: %(default)s)",
    )
    parser.add_argument(
        "--max_ratio",
        metavar="X",
        type=positive_float,
        default=MAX_RATIO,
        help="pass band (default: %(default)s)",
    )
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Measure, write the report, and return the verdict."""
    check_numbers(args)
    quantiles = parse_quantiles(args.quantiles)
    subject = choose_logit_subject(args)
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag, args.seed)
    base = open_official(subject.base)
    arch = arch_of(subject.base, base)
    blocks = parse_blocks(args.blocks, arch.num_layers)
    result, remarks = measure_logits(
        subject, base, arch, blocks, KINDS[args.attention], args, quantiles, say=print
    )
    for remark in (*subject.remarks, *remarks):
        print(remark)
        report.note(remark)
    verdict, explanation = judge_logits(result, args.min_ratio, args.max_ratio)
    add_inputs(report, subject)
    report.metric(
        "inputs", "random" if args.synthetic else f"{args.samples} cached sample(s) at {args.quantiles}"
    )
    report.metric("attention", args.attention)
    add_logit_results(report, result, args.min_ratio, args.max_ratio)
    directory = report.write(verdict, explanation, HOW_TO_READ, NEXT_STEPS[verdict])
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing.

    Raises:
        UserError: the first of them.
    """
    for name in ("samples", "tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.min_ratio > args.max_ratio:
        raise UserError(f"--min_ratio {args.min_ratio:g} is above --max_ratio {args.max_ratio:g}; swap them")


def parse_quantiles(text: str) -> tuple[float, ...]:
    """`0.1,0.5` as numbers.

    Raises:
        UserError: not numbers between 0 and 1, each once.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value < 1 for value in values) or len(set(values)) < len(values):
        raise UserError(
            f"--quantiles {text}: must be numbers between 0 and 1, each once, such as 0.1,0.5,0.9"
        )
    return values


def parse_blocks(text: str | None, num_layers: int) -> tuple[int, ...] | None:
    """`0,10,20-29` as numbers in order; None where nothing was said.

    Raises:
        UserError: it is no such list, or names a block that the model does not have.
    """
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:\s*-\s*(\d{1,5}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UserError(
                f"--blocks {text}: {part!r} is no block or range of blocks; write e.g. 0,10,20-29"
            )
        if last >= num_layers:
            raise UserError(
                f"--blocks {text}: there is no block {last}; the model has blocks 0 to {num_layers - 1}"
            )
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def add_inputs(report: Report, subject: LogitSubject) -> None:
    """Name every file that the numbers come from."""
    if subject.adapter is not None:
        report.add_input("adapter", subject.adapter)
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
