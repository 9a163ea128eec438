"""Probes that do as a test wants, to stand in the place of real ones."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

# Writes a true report; `{verdict}` and `{seconds}` are filled in.
REPORTING = """
import argparse, sys, time
from utils.report import Report
parser = argparse.ArgumentParser(allow_abbrev=False)
for flag in ("--config", "--adapter", "--text_encoder", "--run_tag", "--reports_dir"):
    parser.add_argument(flag)
args = parser.parse_args()
report = Report({tool!r}, "Is it so?", args.reports_dir, args.run_tag)
for role in ("config", "adapter"):
    report.add_input(role, args.config if role == "config" else args.adapter + "/adapter_model.safetensors")
time.sleep({seconds})
verdict = {verdict!r}
report.metric("size", 2.5)
report.write(verdict, "because of the test.", "-", "-")
sys.exit({{"pass": 0, "fail": 1, "inconclusive": 3}}[verdict])
"""
# Writes a report as prompt_grid does, with a picture unless the verdict is inconclusive.
DRAWING = """
import argparse, pathlib, sys
from PIL import Image
from utils.report import Report
parser = argparse.ArgumentParser(allow_abbrev=False)
for flag in ("--config", "--run", "--device", "--run_tag", "--reports_dir"):
    parser.add_argument(flag, required=True)
args = parser.parse_args()
report = Report({tool!r}, "Is it so?", args.reports_dir, args.run_tag)
report.metric("neutral_change", {{"adapter": 0.25, "other": 0.5}})
report.metric("neutral_change_interval", {{"adapter": [0.1, 0.4]}})
report.metric("words", [args.run, args.device])
if {verdict!r} != "inconclusive":
    report.picture("grid", Image.new("RGB", (8, 8)))
report.write({verdict!r}, "because of the test.", "-", "-")
sys.exit({{"pass": 0, "fail": 1, "inconclusive": 3}}[{verdict!r}])
"""
# Does not listen to SIGTERM, and has a child in a session of its own; leaves their ids in `{pids}`.
HANGING = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
with open({pids!r} + ".new", "w") as file:
    file.write(f"{{os.getpid()}} {{child.pid}}")
os.rename({pids!r} + ".new", {pids!r})
print("still at it", flush=True)
time.sleep(600)
"""
EXITING = "import sys\nprint('no room for the tensors', file=sys.stderr)\nsys.exit({status})\n"
KILLED = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n"


def write_probe(scripts: Path, source: str, tool: str = "lora_delta_budget", **values: object) -> Path:
    """`scripts/<tool>.py` from one of the sources above."""
    scripts.mkdir(exist_ok=True)
    path = scripts / f"{tool}.py"
    path.write_text(source.format(**({"tool": tool, "verdict": "pass", "seconds": 0} | values)))
    return path


def read_pids(path: Path) -> list[int]:
    """The processes of a HANGING probe; waits for them to be there."""
    until(path.exists, 180)  # a training that begins them has to start first, beside other tests
    return [int(word) for word in path.read_text().split()]


def is_alive(pid: int) -> bool:
    """Whether a process is there and not only a name that nobody has asked for yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for it, at most so long."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def own_children() -> Iterator[int]:
    """Processes that this one has started and that are still there; not Python's own, which another test may have begun."""
    for child in psutil.Process(os.getpid()).children(recursive=True):
        try:
            if "multiprocessing.resource_tracker" not in " ".join(child.cmdline()):
                yield child.pid
        except psutil.NoSuchProcess:
            continue
