"""Write a LoRA under the names that another program reads; the scale is folded into B, what the adapter does stays.

See docs/lora_files.md.
"""

import argparse
import sys
from collections.abc import Sequence

from models.wan.lora_convert import convert_lora
from models.wan.lora_dialects import DIALECTS
from utils.argument_types import path_of
from utils.cli import run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="convert_lora.py",
        description="Write a LoRA under the names that another program reads. What it does to the model stays the same.",
        epilog="Exit status: 0, or 2 for what the user can mend.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", type=path_of, help="LoRA file, the directory it is in, or a training run")
    parser.add_argument(
        "--to",
        required=True,
        choices=DIALECTS,
        help="comfyui: ComfyUI and diffusers; diffusers: diffusers and PEFT on its models; kohya: musubi-tuner; "
        "peft: PEFT on the official model",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=path_of,
        metavar="PATH",
        help="the file to write (.safetensors); for peft the directory",
    )
    parser.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Convert, and return the exit status."""
    args = build_parser().parse_args(argv)

    def body() -> int:
        for line in convert_lora(args.adapter, args.to, args.out):
            print(line)
        return 0

    return run_command(body, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
