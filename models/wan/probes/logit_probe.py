"""The logit probe from its command line's flags to a result, for every script that measures logits."""

import argparse
import math
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.wan.probes.comparison import Comparison
from models.wan.probes.logit_result import MAX_RATIO, MIN_RATIO, AttentionKind, Band, LogitResult
from models.wan.probes.target_list import parse_blocks
from utils.errors import UserError
from utils.lora_targets import split_block_path
from utils.probe_cli import positive_float

if TYPE_CHECKING:
    import torch

NUM_SAMPLES = 2
_ATTENTIONS: dict[str, tuple[AttentionKind, ...]] = {
    "cross": ("cross_attn",),
    "self": ("self_attn",),
    "both": ("cross_attn", "self_attn"),
}


@dataclass(frozen=True)
class LogitPlan:
    """What is looked at: which attentions, of which blocks (ascending); remarks on what is left out."""

    attentions: tuple[AttentionKind, ...]
    blocks: tuple[int, ...]
    remarks: tuple[str, ...]


def add_logit_flags(parser: argparse.ArgumentParser) -> None:
    """--attention, --blocks, --sigmas, --samples, --synthetic, --min_ratio, --max_ratio."""
    parser.add_argument(
        "--attention",
        choices=tuple(_ATTENTIONS),
        default="cross",
        help="which attention (default: %(default)s)",
    )
    parser.add_argument(
        "--blocks",
        metavar="LIST",
        help="only these blocks, such as 0,10,20-29 (default: those that the adapter touches; without one, all)",
    )
    parser.add_argument(
        "--sigmas",
        metavar="LIST",
        type=_sigmas,
        help="noise levels, such as 0.2,0.5,0.9 (default: those of the run's eval_quantiles)",
    )
    parser.add_argument(
        "--samples",
        metavar="N",
        type=_count,
        default=NUM_SAMPLES,
        help="cached samples, or random draws with --synthetic (default: %(default)s)",
    )
    parser.add_argument(
        "--synthetic",
        action="store_true",
        help="random inputs instead of cached samples: needs no cache, and reads only the probed attentions",
    )
    parser.add_argument(
        "--min_ratio",
        metavar="X",
        type=positive_float,
        default=MIN_RATIO,
        help="lower end of the band that passes (default: %(default)s)",
    )
    parser.add_argument(
        "--max_ratio",
        metavar="X",
        type=positive_float,
        default=MAX_RATIO,
        help="its upper end (default: %(default)s)",
    )


def band_of(args: argparse.Namespace) -> Band:
    """The band that --min_ratio and --max_ratio name.

    Raises:
        UserError: it is empty, or flags exclude each other.
    """
    if args.min_ratio >= args.max_ratio:
        raise UserError(
            f"--min_ratio {args.min_ratio:g} is not below --max_ratio {args.max_ratio:g}; mend one of them"
        )
    if args.synthetic and args.sigmas is not None:
        raise UserError("--sigmas: random inputs (--synthetic) have no noise level; leave one of the two out")
    return Band(args.min_ratio, args.max_ratio)


def plan_logits(args: argparse.Namespace, comparison: Comparison) -> LogitPlan:
    """Which attentions of which blocks are measured.

    Raises:
        UserError: there is no such block, or the adapter touches none of these attentions.
    """
    attentions, num_blocks = _ATTENTIONS[args.attention], comparison.arch.num_layers
    remarks: tuple[str, ...] = ()
    blocks = list(range(num_blocks))
    if comparison.adapter is not None:
        touched = _touched(comparison)
        blocks = sorted({block for block, kind in touched if kind in attentions})
        aside = sorted({f"blocks.{block}.{kind}" for block, kind in touched if kind not in attentions})
        if not blocks:
            raise UserError(_nothing_to_probe(comparison, args.attention, aside))
        if aside:
            remarks = (
                f"the adapter also touches {len(aside)} attentions that --attention {args.attention} leaves out "
                f"({aside[0]}); --attention both looks at them too",
            )
    if args.blocks is not None:
        blocks = parse_blocks(args.blocks)
        if blocks[-1] >= num_blocks:
            raise UserError(
                f"--blocks: there is no block {blocks[-1]}; {comparison.transformer} has the blocks 0 to {num_blocks - 1}"
            )
    return LogitPlan(attentions, tuple(blocks), remarks)


def measure_logits(
    args: argparse.Namespace, comparison: Comparison, plan: LogitPlan
) -> tuple[LogitResult, list[str]]:
    """Measure, with a progress line; and remarks on the inputs.

    Raises:
        UserError: no cached sample, no such device, or weights that are not finite.
    """
    from models.wan.probes import logits
    from utils.progress import Progress

    device = _device(args.device)
    if args.synthetic:
        with closing(Progress("blocks", len(plan.blocks))) as progress:
            result = logits.measure_synthetic(
                comparison, args.samples, plan.attentions, plan.blocks, args.seed, device, progress.reach
            )
        return result, []
    if comparison.config_path is None:
        raise UserError(
            "cached samples need the config of a run: give --config, or probe random inputs with --synthetic"
        )
    from models.wan.probes.cached_samples import cached_inputs

    inputs, remarks = cached_inputs(
        comparison.config_path, comparison.arch.variant, args.sigmas, args.samples, args.seed
    )
    with closing(Progress("blocks", plan.blocks[-1] + 1)) as progress:
        result = logits.measure_streamed(
            comparison, inputs, plan.attentions, plan.blocks, device, progress.reach
        )
    return result, remarks


def _touched(comparison: Comparison) -> set[tuple[int, str]]:
    """Blocks and kinds of attention that the adapter has modules in."""
    assert comparison.adapter is not None
    places: set[tuple[int, str]] = set()
    for module in comparison.adapter.modules:
        if module.startswith("blocks."):
            block, path = split_block_path(module)
            kind = path.partition(".")[0]
            if kind in _ATTENTIONS["both"]:
                places.add((block, kind))
    return places


def _nothing_to_probe(comparison: Comparison, asked: str, aside: list[str]) -> str:
    assert comparison.adapter is not None
    path = comparison.adapter.path
    if aside:
        return f"{path}: touches no {asked}-attention, only {aside[0]} and the like; give --attention both"
    module = next(iter(comparison.adapter.modules))
    return f"{path}: touches no attention (only {module} and the like), so it changes no logits; use lora_delta_budget.py"


def _device(name: str) -> "torch.device":
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: cannot be used ({reason}); give cpu, cuda or cuda:N") from None
    return device


def _sigmas(text: str) -> tuple[float, ...]:
    """An argparse `type`: noise levels above 0, up to 1, ascending, each once."""
    try:
        values = sorted({float(piece) for piece in text.split(",")})
    except ValueError:
        values = [math.nan]
    if not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of noise levels; write 0.2,0.5,0.9")
    return tuple(values)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= 10_000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 10000")
    return int(text)
