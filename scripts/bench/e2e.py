"""Bench: what a whole small run spends its time on: data, forward, backward, optimizer, logging, saving; start-up by phase.

    python -m scripts.bench.e2e
    python -m scripts.bench.e2e --steps 40

Makes the tiny checkpoint and dataset of `make smoke` in a temporary folder, fills the cache, then trains a translator on it
with a stopwatch around each part. The cache is warm in the run that is timed, as it is in every run but the first. What the run
itself measured of waiting for its data (metrics.jsonl) stands beside it.

Writes reports/bench_e2e/<run_tag>/.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from utils.argument_types import positive_int
from utils.bench import finish, note_machine, print_rows
from utils.devices import choose_device
from utils.errors import UserError
from utils.metrics import read_metrics
from utils.newest_run import newest_run_config
from utils.probe_cli import probe_parser, run_probe
from utils.report import Report, Verdict

TOOL = "bench_e2e"
QUESTION = "Does a run spend its time on arithmetic, and how long does it take to start?"
NEXT_STEPS = "Where waiting for data is over its cap: docs/cache.md, and scripts/bench/data.py."
ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 1800
LAST_LINES = 15
# Of the time of steps, on a GPU; at tiny size on a CPU it says little.
MAX_DATA_SHARE = 0.01


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser(TOOL, __doc__ or "")
    parser.add_argument(
        "--steps", type=positive_int, default=20, help="optimizer steps (default: %(default)s)"
    )
    parser.add_argument(
        "--scratch", metavar="DIR", help="where the temporary folder is made (default: the system's)"
    )
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Make the inputs, fill the cache, run, write the report, print its lines.

    Raises:
        UserError: a command failed.
    """
    device = choose_device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag, seed=0)
    note_machine(report, device)
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="bench_e2e_") as directory:
        scratch = Path(directory)
        flags = make_inputs(scratch)
        run_python("train.py", *flags, "--cache_only")
        out = scratch / "parts.json"
        run_python("-m", "scripts.bench.e2e_worker", str(out), *flags, "--set", f"max_steps={args.steps}")
        found = json.loads(out.read_text(encoding="utf-8"))
        metrics = read_metrics(newest_run_config(scratch / "output").parent)
    rows = shares(found["seconds"], found["calls"])
    report.table("parts", rows, f"Shares of the loop and of the start, {args.steps} steps, one process")
    print_rows(rows)
    # The first step is not counted: it waits for the first read, and warms up.
    counted = metrics[1:]
    if counted:
        waiting = sum(row["data_seconds"] for row in counted) / sum(row["step_seconds"] for row in counted)
        report.metric(
            "data_share", waiting, "of the time of steps but the first, by the run's own metrics.jsonl"
        )
        report.cap("max_data_share", MAX_DATA_SHARE, "on a GPU")
        print(f"waiting for data: {waiting:.2%} of the steps' time")
    report.metric("start_seconds", sum_of(found["seconds"], "start: "), "from the interpreter to the loop")
    report.metric(
        "loop_seconds", sum_of(found["seconds"], "loop: "), f"{args.steps} steps and what they save"
    )
    report.metric("whole_seconds", found["whole"], "both, and what lies between and behind")
    is_over = bool(counted) and device.type == "cuda" and waiting > MAX_DATA_SHARE
    return finish(report, ["waiting for data"] if is_over else [], [], NEXT_STEPS)


def make_inputs(scratch: Path) -> list[str]:
    """The tiny checkpoint and dataset; returns the flags of train.py that use them."""
    run_python("scripts/make_tiny_wan.py", "--variant", "ti2v-5b", "--out", str(scratch / "wan"))
    run_python("scripts/make_tiny_dataset.py", "--out", str(scratch / "media"))
    dataset = (ROOT / "configs" / "smoke_dataset.toml").read_text(encoding="utf-8")
    (scratch / "dataset.toml").write_text(
        dataset.replace("output/smoke/media", str(scratch / "media")), encoding="utf-8"
    )
    values = {
        "output_dir": scratch / "output",
        "dataset": scratch / "dataset.toml",
        "model.ckpt_path": scratch / "wan",
    }
    sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    return ["--config", str(ROOT / "configs" / "smoke_dit_lora.toml"), *sets]


def run_python(*arguments: str) -> None:
    """Run Python in the project's folder.

    Raises:
        UserError: it failed; with the end of what it said.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-LAST_LINES:])
        raise UserError(f"{arguments[0]} ended with status {done.returncode}; its last words:\n{last}")


def sum_of(seconds: Mapping[str, float], group: str) -> float:
    """Seconds of all parts of a group."""
    return sum(value for part, value in seconds.items() if part.startswith(group))


def shares(seconds: Mapping[str, float], calls: Mapping[str, int]) -> list[dict[str, Any]]:
    """Each part's share of its group, the largest first."""
    rows = []
    for group in ("start: ", "loop: "):
        total = sum_of(seconds, group)
        parts = sorted((one for one in seconds.items() if one[0].startswith(group)), key=lambda one: -one[1])
        rows += [
            {
                "part": part,
                "share": round(value / total, 4),
                "seconds": round(value, 3),
                "calls": calls.get(part, 1),
            }
            for part, value in parts
        ]
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
