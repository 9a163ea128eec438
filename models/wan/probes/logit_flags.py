"""Flags of the logit probe that other probes have too, and their values checked. No torch."""

import argparse

from models.wan.probes.logit_report import MAX_RATIO, MIN_RATIO
from models.wan.probes.target_list import parse_blocks
from utils.argument_types import positive_float
from utils.errors import UserError

DEFAULT_QUANTILES = "0.1,0.5,0.9"


def add_logit_flags(parser: argparse.ArgumentParser) -> None:
    """--synthetic, --blocks, --samples, --quantiles, --tokens, --min_ratio, --max_ratio."""
    parser.add_argument(
        "--synthetic",
        action="store_true",
        help="logits on random inputs instead of cached samples; reads only the attentions measured",
    )
    parser.add_argument(
        "--blocks",
        metavar="LIST",
        help="such as 0,10,20-29 (default: those that the adapter touches, else all)",
    )
    parser.add_argument(
        "--samples", metavar="N", type=int, default=2, help="samples of the cache (default: %(default)s)"
    )
    parser.add_argument(
        "--quantiles",
        metavar="LIST",
        default=DEFAULT_QUANTILES,
        help="noise levels, as quantiles of the law that the run trains on (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=int,
        default=256,
        help="--synthetic: number of queries (default: %(default)s)",
    )
    for name, end, default in (("min", "lower", MIN_RATIO), ("max", "upper", MAX_RATIO)):
        parser.add_argument(
            f"--{name}_ratio",
            metavar="X",
            type=positive_float,
            default=default,
            help=f"{end} end of the band of logit ratios that pass (default: %(default)s)",
        )


def check_logit_flags(args: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing.

    Raises:
        UserError: the first of them.
    """
    for name in ("samples", "tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.min_ratio > args.max_ratio:
        raise UserError(f"--min_ratio {args.min_ratio:g} is above --max_ratio {args.max_ratio:g}; swap them")
    parse_quantiles(args.quantiles)
    if args.blocks is not None:
        parse_blocks(args.blocks)


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


def blocks_asked_for(args: argparse.Namespace, num_layers: int) -> tuple[int, ...] | None:
    """The numbers that --blocks names, ascending; None where it does not stand.

    Raises:
        UserError: it is no such list, or names a block that the model does not have.
    """
    if args.blocks is None:
        return None
    blocks = parse_blocks(args.blocks)
    if blocks[-1] >= num_layers:
        raise UserError(
            f"--blocks {args.blocks}: there is no block {blocks[-1]}; the model has blocks 0 to {num_layers - 1}"
        )
    return tuple(blocks)
