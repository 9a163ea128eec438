"""Merge a LoRA into its base, shard by shard; the result loads wherever the base does.

See docs/lora_files.md.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

from models.wan.expert_files import expert_of_adapter, expert_of_transformer
from models.wan.lora_merge import MergeDtype, merge_lora
from models.wan.probes.subject import choose_transformer
from utils.adapter_runs import find_adapter_file
from utils.argument_types import path_of
from utils.cli import run_command
from utils.config.schema import Expert
from utils.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="merge_lora.py",
        description="Merge a LoRA into its base: weight + strength * scale * B A, rounded once. One tensor is in memory at a "
        "time; the result has the base's own names and files.",
        epilog="Exit status: 0, or 2 for what the user can mend.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", type=path_of, help="LoRA file, the directory it is in, or a training run")
    parser.add_argument(
        "--base",
        required=True,
        type=path_of,
        metavar="CKPT",
        help="checkpoint directory, or one .safetensors file",
    )
    parser.add_argument(
        "--expert", choices=get_args(Expert), help="A14B: which of the two experts (default: the adapter's)"
    )
    parser.add_argument(
        "--out", required=True, type=path_of, metavar="PATH", help="directory or file to write"
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(MergeDtype),
        default="keep",
        help="of the result (default: as the base is stored)",
    )
    parser.add_argument(
        "--strength",
        type=float,
        default=1.0,
        metavar="X",
        help="factor on what the adapter adds (default: 1)",
    )
    parser.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Merge, and return the exit status."""
    args = build_parser().parse_args(argv)

    def body() -> int:
        if not abs(args.strength) < float("inf"):
            raise UserError(f"--strength {args.strength}: is not a finite number")
        adapter = find_adapter_file(args.adapter)
        saved_for = expert_of_adapter(adapter)
        expert = args.expert or saved_for
        base = choose_transformer(args.base, expert, is_asked_for=args.expert is not None)
        into = args.expert or expert_of_transformer(base)
        if saved_for is not None and into not in (None, saved_for):
            raise UserError(
                f"{adapter}: is for the {saved_for} expert, and would be merged into the {into} one ({base}); give the other "
                "expert or the other adapter"
            )
        merge_lora(adapter, base, args.out, dtype=args.dtype, strength=args.strength, say=print)
        print(f"merged: {args.out}")
        return 0

    return run_command(body, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
