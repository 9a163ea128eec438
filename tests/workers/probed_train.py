"""`train.py`, with the probes of the directory PROBE_SCRIPTS, whose outcomes the loop waits for after every save.

Steps of a tiny model are shorter than a probe, so without waiting all outcomes would come after the last step. With
WAIT_FOR_PROBES=0 it does not wait. Run by tests/test_probe_runs.py.
"""

import os
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command does before it imports torch

from train import main
from utils import probe_runner
from utils.cli import end_process
from utils.probe_outcomes import ProbeOutcome
from utils.probe_runner import ProbeRunner

poll = ProbeRunner.poll


def wait_and_poll(runner: ProbeRunner) -> list[ProbeOutcome]:
    runner.wait(60)
    return poll(runner)


if __name__ == "__main__":
    probe_runner.SCRIPTS_DIR = Path(os.environ["PROBE_SCRIPTS"])
    if os.environ.get("WAIT_FOR_PROBES") != "0":
        ProbeRunner.poll = wait_and_poll  # type: ignore[method-assign]
    end_process(main())
