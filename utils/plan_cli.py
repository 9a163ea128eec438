"""The flags of `--plan` and `--verify`, which look and write nothing, and printing what a plan found."""

import argparse
import json
import sys
from typing import Any

from utils.argument_types import positive_float, positive_int
from utils.plan_text import plan_text

# bfloat16 on an H100 in training: 40 % of the 989 that its data sheet promises.
DEFAULT_TFLOPS = 400.0
# What does something else, or nothing, together with --plan or --verify.
_OTHERS = ("cache_only", "dry_run", "regenerate_cache", "trust_cache")


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """`--plan`, and what belongs to it; `--verify`."""
    group = parser.add_argument_group("planning")
    group.add_argument(
        "--verify",
        action="store_true",
        help="read every tensor of every part of the checkpoint, compare shards with the index, find NaN; write nothing; exit",
    )
    group.add_argument(
        "--plan",
        action="store_true",
        help="from headers alone, without a GPU: parameters, stages, memory, what fits 24 / 48 / 80 / 141 GB, time, disk",
    )
    group.add_argument("--json", action="store_true", help="with --plan: print JSON (docs/plan.md)")
    group.add_argument(
        "--gpus",
        type=positive_int,
        default=None,
        metavar="N",
        help="with --plan: how many GPUs there are (default: pipeline_stages)",
    )
    group.add_argument(
        "--tflops",
        type=positive_float,
        default=None,
        metavar="X",
        help=f"with --plan: TFLOP/s that a GPU reaches, not its peak (default: {DEFAULT_TFLOPS:g}, an H100 in bfloat16)",
    )


def check_plan_flags(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse flags that would be ignored, and put the default in."""
    if arguments.plan and arguments.verify:
        parser.error("--plan reads headers and --verify everything; give one of the two")
    if arguments.plan or arguments.verify:
        why = "--plan only reads headers" if arguments.plan else "--verify only reads the weights"
        for name in _OTHERS:
            if getattr(arguments, name):
                parser.error(f"--{name} would be ignored: {why}")
        if arguments.resume_from_checkpoint is not None:
            parser.error(f"--resume_from_checkpoint would be ignored: {why}")
    if not arguments.plan:
        for name in ("json", "gpus", "tflops"):
            if getattr(arguments, name):
                parser.error(f"--{name} would be ignored: it belongs to --plan")
    if arguments.tflops is None:
        arguments.tflops = DEFAULT_TFLOPS


def print_plan(document: dict[str, Any], *, as_json: bool) -> None:
    """Print it to standard output."""
    text = json.dumps(document, indent=1) if as_json else plan_text(document)
    # File names may hold what is no UTF-8.
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")
