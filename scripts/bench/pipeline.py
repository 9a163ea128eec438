"""Bench: is the pipeline as fast as its arithmetic says?

Five comparisons on a small DiT of random weights, each as a ratio within one run, taking turns, one thread per process:
a band of adapters on the top third against adapters everywhere; two stages against one; predicted against measured
shares of layers and stages; the engine against a plain torch loop; a checkpoint's stall against a copy to host memory.
Writes reports/bench_pipeline/<run_tag>/.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from models.wan.arch import VARIANTS, WanArch, expected_shapes
from utils.errors import UserError
from utils.probe_cli import probe_parser, run_probe
from utils.report import Report, Verdict

TOOL = "bench_pipeline"
QUESTION = "Is the pipeline as fast as its arithmetic says?"
WORKER = Path(__file__).with_name("pipeline_worker.py")
MICRO_BATCHES = 8
LAUNCH_LIMIT_SECONDS = 1800
# Layers with less than this share of the work are timed too short to be compared.
SMALL_SHARE = 0.02
LAST_LINES = 15

HOW_TO_READ = """\
Each row is a ratio of two things that took turns on the same machine in the same run. On a CPU, what one process does
is timed in the process's own seconds; two stages against one, and checkpoints, by the clock on the wall. *value* is the median, *spread*
half the distance between its quartiles. Times by themselves say nothing about other machines. A miss is a fact about
this machine as much as about the engine: other programs on the same cores lower the ratio of two stages against one
first of all.
"""
NEXT_STEPS = {
    "pass": "Nothing. Repeat after changes of `utils/pipeline.py`, `utils/partition.py` or `models/wan/costs.py`.",
    "fail": "Look at the spread first and repeat on an idle machine; then profile the row that misses.",
    "inconclusive": "Repeat with more rounds, or on a machine with what is missing.",
}


@dataclass(frozen=True)
class Row:
    """One comparison: the measured value, its spread, and the limit on its side."""

    name: str
    value: float
    spread: float
    limit: float | None
    at_least: bool
    meaning: str

    @property
    def holds(self) -> bool:
        """Whether the value keeps to its limit, if there is one."""
        if self.limit is None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model and of the steps."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    grid: str
    small: str


SIZES = {
    "cpu": Sizes(256, 1024, 4, 12, "4x8x8", "1x8x8"),
    "cuda": Sizes(1536, 6144, 12, 30, "9x15x26", "3x15x26"),
}


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles."""
    ordered = sorted(values)
    return (ordered[(3 * len(ordered)) // 4] - ordered[len(ordered) // 4]) / 2


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Ratio of each pair of turns."""
    return [a / b for a, b in zip(above, below, strict=True)]


def write_model(root: Path, sizes: Sizes) -> None:
    """A DiT of random weights in the official layout."""
    info = VARIANTS["ti2v-5b"]
    arch = WanArch(
        model_type=info.model_type,
        dim=sizes.dim,
        ffn_dim=sizes.ffn_dim,
        freq_dim=256,
        in_dim=info.in_dim,
        out_dim=info.out_dim,
        num_heads=sizes.num_heads,
        num_layers=sizes.num_layers,
        text_len=64,
        eps=1e-6,
        text_dim=64,
    )
    random = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=random) * max(1, math.prod(shape[1:])) ** -0.5
        for name, shape in expected_shapes(arch).items()
    }
    save_file(tensors, root / "dit.safetensors")
    (root / "config.json").write_text(json.dumps(arch.to_config_json()), encoding="utf-8")


def start(device: str, processes: int, *arguments: str) -> dict[str, Any]:
    """Run the worker and return what it printed.

    Raises:
        UserError: it failed; with the end of what it said.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(WORKER), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LAUNCH_LIMIT_SECONDS,
        check=False,
    )
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-LAST_LINES:])
        raise UserError(f"the worker ended with status {done.returncode}; its last words:\n{last}")
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    found: dict[str, Any] = json.loads(line)
    return found


def compare_band(single: Mapping[str, Any]) -> list[Row]:
    """A band on the top third against adapters on all blocks."""
    times, flops, saved = single["times"], single["flops"], single["saved"]
    predicted = flops["all"] / flops["band"]
    gains = [ratio / predicted for ratio in ratios(times["all"], times["band"])]
    return [
        Row(
            "band_speed",
            median(gains),
            spread(gains),
            0.9,
            True,
            f"speed-up of adapters on the top third over adapters everywhere, as a share of the {predicted:.2f} that "
            "counted FLOPs predict",
        ),
        Row(
            "band_activations",
            saved["band"] / saved["all"],
            0.0,
            0.4,
            False,
            "stored activations of the band over those of adapters everywhere, in bytes that autograd keeps",
        ),
    ]


def compare_shares(layers: Mapping[str, Any]) -> tuple[list[Row], list[dict[str, Any]]]:
    """Predicted against measured shares of the time of a step, per layer and for two stages."""
    seconds = [median(column) for column in zip(*layers["seconds"], strict=True)]
    costs, total, all_costs = layers["costs"], sum(seconds), sum(layers["costs"])
    table, errors = [], []
    for name, time, cost in zip(layers["names"], seconds, costs, strict=True):
        measured, predicted = time / total, cost / all_costs
        table.append({"layer": name, "predicted": round(predicted, 4), "measured": round(measured, 4)})
        if predicted >= SMALL_SHARE:
            errors.append(abs(measured / predicted - 1))
    stages = []
    for first, end in pairwise(layers["bounds"]):
        measured, predicted = sum(seconds[first:end]) / total, sum(costs[first:end]) / all_costs
        stages.append(abs(measured / predicted - 1))
    return [
        Row(
            "layer_shares",
            max(errors),
            spread(errors),
            0.15,
            False,
            f"largest relative error of a layer's predicted share of the time (layers of at least {SMALL_SHARE:.0%})",
        ),
        Row(
            "stage_shares",
            max(stages),
            0.0,
            0.15,
            False,
            "largest relative error of a stage's predicted share, split by cost over two",
        ),
    ], table


def compare_overhead(times: Mapping[str, Sequence[float]]) -> Row:
    """The engine against a plain loop."""
    extra = [ratio - 1 for ratio in ratios(times["engine"], times["plain"])]
    milliseconds = 1000 * median(times["plain"])
    meaning = (
        f"time that the engine adds to a step of a plain torch loop, which takes {milliseconds:.0f} ms here"
    )
    return Row("engine_overhead", median(extra), spread(extra), 0.03, False, meaning)


def compare_saving(saving: Mapping[str, Any]) -> Row:
    """A checkpoint's stall against copying what is in it to host memory."""
    times = saving["times"]
    stall = ratios(times["save"], times["copy"])
    meaning = (
        f"time that a checkpoint of {saving['bytes'] / 1e6:.1f} MB holds training up, over that of copying it to host "
        f"memory ({1000 * median(times['save']):.1f} against {1000 * median(times['copy']):.1f} ms)"
    )
    return Row("checkpoint_stall", median(stall), spread(stall), None, False, meaning)


def compare_stages(args: argparse.Namespace, root: Path, sizes: Sizes) -> Row:
    """Two stages against one, whole processes taking turns."""
    speed_ups, bound = [], 0.0
    common = ("--root", str(root), "--grid", sizes.grid, "--rounds", str(args.rounds))
    for _ in range(args.launches):
        one = start(args.device, 1, "steps", *common, "--stages", "1")
        two = start(args.device, 2, "steps", *common, "--stages", "2")
        speed_ups.append(median(one["times"]) / median(two["times"]))
        bound = two["bound"]
    shares = [speed_up / bound for speed_up in speed_ups]
    meaning = (
        f"speed-up of two stages over one with {MICRO_BATCHES} micro-batches ({median(speed_ups):.2f}), as a share of the "
        f"{bound:.2f} that the schedule allows"
    )
    return Row("two_stages", median(shares), spread(shares), 0.9, True, meaning)


def bench(args: argparse.Namespace) -> Verdict:
    """Measure, write the report, and return the verdict."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag, seed=0)
    sizes = SIZES[args.device]
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_model(root, sizes)
        common = ("--root", directory, "--grid", sizes.grid, "--small", sizes.small)
        single = start(args.device, 1, "single", *common, "--rounds", str(args.rounds))
        rows = compare_band(single)
        shares, table = compare_shares(single["layers"])
        rows += [*shares, compare_overhead(single["overhead"]), compare_saving(single["saving"])]
        if args.device == "cpu" or torch.cuda.device_count() > 1:
            rows.append(compare_stages(args, root, sizes))
        else:
            report.note("two stages against one: not measured, it needs two GPUs")
    return write(report, rows, table, args, sizes, single["device"])


def write(
    report: Report,
    rows: Sequence[Row],
    layers: Sequence[Mapping[str, Any]],
    args: argparse.Namespace,
    sizes: Sizes,
    device: str,
) -> Verdict:
    """Print the table and write the report."""
    shown = []
    for row in rows:
        sign = ">=" if row.at_least else "<="
        limit = "none" if row.limit is None else f"{sign} {row.limit:g}"
        shown.append(
            {
                "comparison": row.name,
                "value": round(row.value, 4),
                "spread": round(row.spread, 4),
                "limit": limit,
                "holds": "yes" if row.holds else "NO",
                "meaning": row.meaning,
            }
        )
        report.metric(row.name, row.value, row.meaning)
        if row.limit is not None:
            report.cap(row.name, row.limit, f"{sign} this")
        print(
            f"{row.name:18} {row.value:8.3f} +- {row.spread:<7.3f} {limit:8} "
            f"{'yes' if row.holds else 'NO '}  {row.meaning}"
        )
    report.table("comparisons", shown, "Comparisons")
    report.table("layers", list(layers), "Shares of layers")
    report.metric("device", device, "where it ran")
    report.metric("sizes", sizes.__dict__, "of the model and of micro-batches (tokens)")
    report.metric("cores", os.cpu_count(), "of this machine")
    report.metric(
        "load", os.getloadavg()[0], "average over the last minute at the end; the bench itself makes up to 2"
    )
    report.metric("rounds", args.rounds, "times each thing was measured")
    missed = [row.name for row in rows if not row.holds]
    verdict: Verdict = "fail" if missed else "pass"
    explanation = f"misses its limit: {', '.join(missed)}" if missed else "every ratio keeps to its limit"
    directory = report.write(verdict, explanation, HOW_TO_READ, NEXT_STEPS[verdict])
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench and return the exit status."""
    parser = probe_parser("pipeline", __doc__ or "")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    parser.add_argument(
        "--rounds", type=int, default=9, help="times each thing is measured (default: %(default)s)"
    )
    parser.add_argument(
        "--launches", type=int, default=3, help="times one and two stages take turns (default: %(default)s)"
    )
    return run_probe(parser, bench, argv)


if __name__ == "__main__":
    sys.exit(main())
