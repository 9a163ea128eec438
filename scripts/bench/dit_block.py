"""Bench: one DiT block, and a DiT of some blocks, against diffusers' with the same weights.

    python -m scripts.bench.dit_block
    python -m scripts.bench.dit_block --device cuda --compile      # both sides compiled block by block
    python -m scripts.bench.dit_block --device cuda --float8       # ours in 8 bits against theirs in bfloat16

Timed in turns: forward, and forward + backward as a translator is trained (frozen weights, LoRA on cross_attn.{k,v}), in float32
and in bfloat16, at several numbers of tokens; outputs and gradients are compared first. Counted without timing, one frozen
block of TI2V-5B in bfloat16 at 4,096 tokens: kernels, bytes that they move, bytes that autograd keeps, with
`model.lean_kernels` (ours) and without (ours_plain).

Writes reports/bench_dit_block/<run_tag>/.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from models.wan.arch import PUBLISHED, WanArch
from scripts.bench import peers
from scripts.bench.dit_count import CPU, GRID, OURS, PEER, PLAIN, RMS, TOKENS, count_adapters, count_block
from scripts.bench.dit_sides import Case, Precision, build_pair
from utils.argument_types import positive_int
from utils.bench import Comparison, compare, finish, note_machine, print_rows
from utils.devices import choose_device
from utils.probe_cli import add_flags, probe_parser, run_probe
from utils.report import Report, Verdict

TOOL = "bench_dit_block"
QUESTION = "Does a DiT block cost what its arithmetic costs, and no more than diffusers' does?"
NEXT_STEPS = "Over a target: profile that row on an idle machine, or look at what the block keeps and moves."
# Not slower than diffusers on a CPU; 1.2 times as fast on a GPU with both compiled.
MAX_CPU_RATIO, MAX_COMPILED_RATIO = 1.0, 1 / 1.2
# Largest relative errors (L2) of outputs and gradients. float32: all of it is diffusers' float32 sinusoid (docs/numerics.md), and
# nothing in a block, which gets no timestep. bfloat16: each side errs by about 1e-2 against float32, in its own direction.
FLOAT32 = Precision("float32", torch.float32, torch.float32, 2e-5)
BFLOAT16 = Precision("bfloat16", torch.bfloat16, torch.bfloat16, 3e-2)
MIXED = Precision("bfloat16, float32 residual", torch.bfloat16, torch.float32, 3e-2)
# Units and KiB of the issue; each is the limit for one precision of the residual stream.
MAX_TRAFFIC = {"bfloat16": 323.0, "bfloat16, float32 residual": 400.0}
MAX_SAVED_KIB = {"bfloat16": 131.0, "bfloat16, float32 residual": 149.0}

_SIZES = PUBLISHED["ti2v-5b"]
# Of 4,096 tokens, and of 1280 x 704 px and 121 frames.
ADAPTER_GRIDS = (GRID, (31, 22, 40))
_KEYS_AND_VALUES = ("cross_attn.k", "cross_attn.v")
ADAPTED = (_KEYS_AND_VALUES, (*_KEYS_AND_VALUES, "cross_attn.q", "cross_attn.o"))
HEAD_WIDTH = _SIZES.head_dim  # kept at the published one
# Mid-size: what a CPU steps in about a second.
BLOCK = replace(_SIZES, dim=1024, ffn_dim=4096, num_heads=8, num_layers=1)
MODEL = replace(_SIZES, dim=512, ffn_dim=2048, num_heads=4, num_layers=8, text_dim=512)
SIZES: dict[str, dict[str, WanArch]] = {
    "cpu": {"block": BLOCK, "model": MODEL},
    "cuda": {"block": replace(_SIZES, num_layers=1), "model": replace(_SIZES, num_layers=10)},
}
GRIDS = {"cpu": "2x8x16,4x16x16", "cuda": "13x15x26,31x22x40"}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser(TOOL, __doc__ or "")
    add_flags(parser, "device")
    parser.add_argument(
        "--rounds", type=positive_int, default=9, help="counted rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--grids",
        type=grids,
        help=f"frames x rows x columns of tokens, e.g. {GRIDS['cpu']} (default: by device)",
    )
    parser.add_argument("--dim", type=width, help="width, a multiple of 128 (default: by device)")
    parser.add_argument(
        "--plain", action="store_true", help="our side by the plain formulas (model.lean_kernels = false)"
    )
    parser.add_argument("--compile", action="store_true", help="compile the blocks of both sides")
    parser.add_argument(
        "--float8",
        action="store_true",
        help="bfloat16 only: our side stores and multiplies its frozen weights in 8 bits; its error against the other's bfloat16 is "
        "told",
    )
    parser.add_argument("--only", choices=("counts", "block", "model"), help="this part alone (default: all)")
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Count, compare, time, write the report, print its lines."""
    device = choose_device(args.device)
    torch.set_num_threads(1)
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag, seed=0)
    note_machine(report, device)
    reason = peers.why_not("diffusers")
    if reason is not None:
        report.note(reason)
        print(reason)
    missed: list[str] = []
    refused: list[str] = []
    if args.only in (None, "counts"):
        missed += bench_counts(report, with_peer=reason is None)
    if reason is None and args.only != "counts":
        comparisons = time_all(args, report, device)
        rows = [comparison.row() for comparison in comparisons]
        report.table("timed", rows, "Seconds of ours over those of diffusers", inline_rows=40)
        print_rows(rows)
        limit = MAX_COMPILED_RATIO if args.compile and device.type == "cuda" else MAX_CPU_RATIO
        report.cap("max_ratio", limit, "ratio of each timed row; met where its lower quartile is not above")
        refused += [comparison.name for comparison in comparisons if comparison.is_noisy]
        missed += [one.name for one in comparisons if not one.is_noisy and one.ratio.quartiles[0] > limit]
    return finish(report, missed, refused, NEXT_STEPS)


def bench_counts(report: Report, with_peer: bool) -> list[str]:
    """The counted part: what it finds over its target, by the count as on a CPU, which is how the targets were made."""
    rows = [
        count_block(side, _SIZES, precision, rms)
        for side in (OURS, PLAIN)
        for precision in (BFLOAT16, MIXED)
        for rms in RMS
    ]
    if with_peer:
        rows += [count_block(PEER, _SIZES, BFLOAT16, rms) for rms in RMS]
    table = [row.shown() for row in rows]
    report.table("counted", table, f"One block of TI2V-5B, bfloat16, {TOKENS:,} tokens, frozen, counted")
    print_rows(table)
    adapted = adapter_rows()
    report.table(
        "adapters", adapted, "The same with adapters of rank 16 on its cross-attention, and what they add", 40
    )
    print_rows(adapted)
    missed = []
    for row in rows:
        name = "_".join(
            (row.side, "bf16" if row.precision == BFLOAT16.name else "fp32_residual", row.rms[-3:].lower())
        )
        report.metric(f"traffic_{name}", row.traffic, "units of one [L, D] bfloat16 tensor, both passes")
        report.metric(f"saved_kib_{name}", row.saved_kib, "KiB that autograd keeps of a token")
        if row.side == OURS and row.rms == CPU:
            for what, value, limits in (
                ("traffic", row.traffic, MAX_TRAFFIC),
                ("saved_kib", row.saved_kib, MAX_SAVED_KIB),
            ):
                report.cap(f"max_{what}_{name}", limits[row.precision])
                missed += [f"{what}_{name}"] if value > limits[row.precision] else []
    return missed


def adapter_rows() -> list[dict[str, Any]]:
    """Our block with adapters on keys and values, and on all of cross-attention, at a short and a long clip."""
    rows = []
    for grid in ADAPTER_GRIDS:
        bare = count_adapters((), _SIZES, BFLOAT16, grid, lean=True)
        found = [("nothing", bare)]
        for paths in ADAPTED:
            named = " ".join(path.removeprefix("cross_attn.") for path in paths)
            found += [
                (named, count_adapters(paths, _SIZES, BFLOAT16, grid, lean=lean)) for lean in (False, True)
            ]
        tokens = grid[0] * grid[1] * grid[2]
        for named, one in found:
            shown = one.shown()
            shown["computed_by"] = shown.pop("side")
            del shown["precision"], shown["rms_norm"]
            added = round(one.traffic - bare.traffic, 1)
            rows.append({"tokens": tokens, "adapters_on": named, "added": added} | shown)
    return rows


def time_all(args: argparse.Namespace, report: Report, device: torch.device) -> list[Comparison]:
    """Every case, forward alone and with backward; outputs and gradients agree, or nothing is told.

    Raises:
        UserError: they do not.
    """
    no_float32 = device.type == "cuda" or args.float8
    precisions = (BFLOAT16, MIXED) if no_float32 else (FLOAT32, BFLOAT16, MIXED)
    comparisons, errors = [], []
    for subject, arch in SIZES[device.type].items():
        if args.only not in (None, subject):
            continue
        if args.dim is not None:
            arch = replace(arch, dim=args.dim, ffn_dim=4 * args.dim, num_heads=args.dim // HEAD_WIDTH)
        for precision in precisions:
            for grid in args.grids or grids(GRIDS[device.type]):
                case = Case(subject, arch, precision, grid, device, args.compile, args.float8, not args.plain)
                pair = build_pair(case)
                errors += pair.check()
                comparisons += [
                    compare(f"{case}: forward", pair.ours.forward, pair.peer.forward, args.rounds, device),
                    compare(f"{case}: both", pair.ours.both, pair.peer.both, args.rounds, device),
                ]
    report.table("agreement", errors, "Relative errors before timing", inline_rows=60)
    return comparisons


def width(text: str) -> int:
    """The width of a DiT, whose heads are 128 wide."""
    value = positive_int(text)
    if value % HEAD_WIDTH:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of {HEAD_WIDTH}, the width of a head")
    return value


def grids(text: str) -> list[tuple[int, int, int]]:
    """`2x8x16,4x16x16` as frames, rows and columns of tokens."""
    found = []
    for word in text.split(","):
        parts = word.split("x")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise argparse.ArgumentTypeError(f"{word!r} is not frames x rows x columns, such as 4x16x16")
        frames, rows, columns = map(int, parts)
        found.append((frames, rows, columns))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
