"""Bench: real optimizer steps: tokens a second, memory, and on a GPU the share of the machine's measured matrix peak.

    python -m scripts.bench.train_step                            # small, on a CPU
    python -m scripts.bench.train_step --device cuda              # the target rows: TI2V-5B at 27,280 tokens
    python -m scripts.bench.train_step --device cuda --full       # modes, clip sizes, checkpointing kinds, fp8

Each row is a process of its own with random weights, nothing to download: everything trained (adapters on all blocks, or all
blocks of UMT5) and the top third of it step in turns. FLOPs are those of models/wan/costs.py: *executed* counts what is
recomputed and leaves out the backward passes that are skipped; *useful* leaves out what is recomputed as well. The gain of the band
is its measured speed-up as a share of the one that executed FLOPs predict.

Writes reports/bench_train_step/<run_tag>/.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from utils.argument_types import positive_int
from utils.bench import Comparison, finish, note_machine, print_rows
from utils.devices import choose_device
from utils.errors import UserError
from utils.probe_cli import add_flags, probe_parser, run_probe
from utils.report import Report, Verdict
from utils.timing import Timing

TOOL = "bench_train_step"
QUESTION = "What does an optimizer step cost, and how much of the machine does it use?"
NEXT_STEPS = "Below a target: profile that row, the largest kernels that are no matrix products first."
WORKER = "scripts.bench.train_step_worker"
LIMIT_SECONDS = 1800
LAST_LINES = 15
# Of the measured bfloat16 matrix peak of one H200; and of the gain that FLOPs predict for the band.
MIN_EXECUTED, MIN_USEFUL, MIN_BAND_GAIN = 0.55, 0.40, 0.9


@dataclass(frozen=True)
class Row:
    """One pair of steps."""

    size: str
    mode: str
    grid: str
    checkpointing: str
    float8: str = "no"
    compile: bool = False
    is_target: bool = False

    def __str__(self) -> str:
        float8 = {"no": "", "weights": ", weights in 8 bits", "products": ", products in 8 bits"}[self.float8]
        compiled = ", compiled" if self.compile else ""
        return f"{self.mode}, {self.grid}, checkpointing {self.checkpointing}{float8}{compiled}"

    @property
    def flags(self) -> list[str]:
        """For the worker."""
        named = ("size", "mode", "grid", "checkpointing", "float8")
        found = [word for name in named for word in (f"--{name}", getattr(self, name))]
        return [*found, "--compile"] if self.compile else found


# 480 x 832 px, 49 frames: 5,070 tokens; 704 x 1280 px, 121 frames: 27,280.
SHORT, LONG = "13x15x26", "31x22x40"
CPU_ROWS = (
    Row("small", "dit_lora", "2x8x8", "full"),
    Row("small", "dit_lora", "2x8x8", "selective"),
    Row("small", "dit_lora", "2x8x8", "off"),
    Row("small", "dit_lora", "2x8x8", "full", float8="weights"),
    Row("small", "encoder_ft", "2x8x8", "full"),
)
TARGET_ROWS = (
    Row("5b", "dit_lora", LONG, "full"),
    Row("5b", "dit_lora", LONG, "full", compile=True, is_target=True),
)
FULL_ROWS = (
    *TARGET_ROWS,
    Row("5b", "dit_lora", LONG, "selective"),
    Row("5b", "dit_lora", LONG, "offload"),
    Row("5b", "dit_lora", LONG, "selective", compile=True),
    *(Row("5b", "dit_lora", LONG, "full", float8=kind) for kind in ("weights", "products")),
    Row("5b", "dit_lora", LONG, "full", float8="products", compile=True),
    *(Row("5b", "dit_lora", SHORT, kind) for kind in ("full", "selective", "off")),
    Row("5b", "dit_lora", SHORT, "full", compile=True),
    Row("5b", "encoder_ft", SHORT, "full"),
    Row("5b", "encoder_ft", SHORT, "full", compile=True),
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser(TOOL, __doc__ or "")
    add_flags(parser, "device")
    parser.add_argument(
        "--rounds", type=positive_int, default=5, help="counted rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--full", action="store_true", help="on a GPU: the whole grid, not the target rows alone"
    )
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Run every row, write the report, print its lines.

    Raises:
        UserError: --full on a CPU, where every row is run anyhow, or a worker failed.
    """
    device = choose_device(args.device)
    if args.full and device.type == "cpu":
        raise UserError(
            "--full: a CPU has one set of rows, which is always whole; leave it out, or give --device cuda"
        )
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag, seed=0)
    note_machine(report, device)
    rows = CPU_ROWS if device.type == "cpu" else FULL_ROWS if args.full else TARGET_ROWS
    shown: list[dict[str, Any]] = []
    missed: list[str] = []
    refused: list[str] = []
    for row in rows:
        found = start(row, args.rounds, device)
        pair = Comparison(str(row), *(Timing(tuple(found["seconds"][name])) for name in ("all", "band")))
        if pair.is_noisy:
            refused.append(str(row))
        shown.append(describe(row, pair, found))
        print_rows(shown[-1:])
        if not pair.is_noisy:
            missed += misses(row, shown[-1])
    for name, limit in (("executed", MIN_EXECUTED), ("useful", MIN_USEFUL), ("band_gain", MIN_BAND_GAIN)):
        report.cap(f"min_{name}", limit, "of the target rows, on one H200")
    report.table("steps", shown, "Steps; all: everything trained, band: the top third", inline_rows=40)
    return finish(report, missed, refused, NEXT_STEPS)


def start(row: Row, rounds: int, device: torch.device) -> dict[str, Any]:
    """Run the worker and return what it printed.

    Raises:
        UserError: it failed; with the end of what it said.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if device.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-m", WORKER, *row.flags, "--rounds", str(rounds)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-LAST_LINES:])
        raise UserError(f"{row}: the worker ended with status {done.returncode}; its last words:\n{last}")
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    result: dict[str, Any] = json.loads(line)
    return result


def describe(row: Row, pair: Comparison, found: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table: the band's ratio first. Without numbers of time where it was too noisy."""
    flops, peak = found["flops"], found["matrix_peak"]
    predicted = flops["all"]["executed"] / flops["band"]["executed"]
    measured = pair.row()
    note = measured["note"]
    shown: dict[str, Any] = {"what": str(row), "predicted_gain": round(predicted, 3)}
    known = not pair.is_noisy
    shown["gain"] = round(pair.ratio.median, 3) if known else None
    shown["share_of_predicted"] = round(pair.ratio.median / predicted, 3) if known else None
    for name, timing in (("all", pair.ours), ("band", pair.other)):
        shown[f"{name}_tokens_per_second"] = round(found["tokens"] / timing.median, 1) if known else None
        for kind in ("executed", "useful"):
            share = None if peak is None or not known else flops[name][kind] / timing.median / peak
            shown[f"{name}_{kind}_of_peak"] = None if share is None else round(share, 3)
        shown[f"{name}_tflop"] = round(flops[name]["executed"] / 1e12, 4)
        shown[f"{name}_peak_gb"] = found["peak_gb"][name]
    shown["process_gb"] = round(found["process_gb"], 2)
    shown["matrix_peak_tflops"] = None if peak is None else round(peak / 1e12, 1)
    return shown | {"note": note}


def misses(row: Row, shown: Mapping[str, Any]) -> list[str]:
    """What of a target row is below its target."""
    if not row.is_target:
        return []
    limits = {
        "all_executed_of_peak": MIN_EXECUTED,
        "all_useful_of_peak": MIN_USEFUL,
        "share_of_predicted": MIN_BAND_GAIN,
    }
    return [
        f"{name} of {row}"
        for name, limit in limits.items()
        if shown[name] is not None and shown[name] < limit
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
