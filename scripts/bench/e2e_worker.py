"""Runs train.py with a stopwatch around its parts, for scripts/bench/e2e.py, which starts it in a process of its own.

A part's time is its own: what another part takes inside it is taken off. On a GPU each part ends with waiting for the device, so
that its time is that of its work and not of starting it; the whole is a little slower for that. Writes one JSON object.
"""

import functools
import json
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_BEGUN = time.perf_counter()


class Parts:
    """Seconds and calls by part. Calls may be nested; they all come from one thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._wait: Callable[[], object] = lambda: None
        self._open: list[float] = []
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def wait_for(self, wait: Callable[[], object]) -> None:
        """Call this before each reading of the clock, such as `torch.cuda.synchronize`."""
        self._wait = wait

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose calls count for `part`."""

        @functools.wraps(function)
        def run(*arguments: Any, **named: Any) -> Any:
            self._wait()
            started = self._clock()
            self._open.append(0.0)
            try:
                return function(*arguments, **named)
            finally:
                self._wait()
                whole = self._clock() - started
                inside = self._open.pop()
                self.seconds[part] = self.seconds.get(part, 0.0) + whole - inside
                self.calls[part] = self.calls.get(part, 0) + 1
                if self._open:
                    self._open[-1] += whole

        return run

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Put a stopwatch around a function of a module, or a method of a class."""
        setattr(owner, name, self.timed(part, getattr(owner, name)))


def watch_everything(parts: Parts) -> None:
    """Import what train.py would, and put the stopwatches in."""
    import torch

    import models.wan.setup
    import utils.config.load
    import utils.run
    from utils.checkpoint_writer import CheckpointWriter
    from utils.data.prefetch import ReadAhead
    from utils.metrics import MetricsWriter
    from utils.pipeline import BandEngine
    from utils.progress import Progress
    from utils.trainer import Trainer

    parts.watch(utils.config.load, "load_config", "start: config and headers")
    parts.watch(models.wan.setup, "prepare", "start: data and cache")
    parts.watch(utils.run, "build", "start: building the model")
    parts.watch(Trainer, "run", "loop: the rest")
    parts.watch(ReadAhead, "take", "loop: data")
    parts.watch(MetricsWriter, "write", "loop: logging")
    parts.watch(Progress, "advance", "loop: logging")
    parts.watch(CheckpointWriter, "save", "loop: saving")
    parts.watch(CheckpointWriter, "finish", "loop: saving")
    parts.watch(Trainer, "_export", "loop: saving")
    # The engine looks instructions up in its map, not by name.
    named = {"ForwardPass": "forward", "BackwardPass": "backward", "OptimizerStep": "optimizer"}
    for instruction, function in BandEngine._INSTRUCTION_MAP.items():
        if instruction.__name__ in named:
            part = f"loop: {named[instruction.__name__]}"
            BandEngine._INSTRUCTION_MAP[instruction] = parts.timed(part, function)
    if torch.cuda.is_available():
        parts.wait_for(torch.cuda.synchronize)


def main(argv: Sequence[str]) -> int:
    """`OUT.json`, then train.py's own arguments."""
    out, *arguments = argv
    parts = Parts()
    watch_everything(parts)
    imported = time.perf_counter() - _BEGUN
    sys.argv = ["train.py", *arguments]
    started = time.perf_counter()
    # By its `main`, because as a program it would end this process before anything is written.
    status = runpy.run_path("train.py")["main"](arguments)
    whole = time.perf_counter() - started
    found = {
        "seconds": {"start: imports": imported, **parts.seconds},
        "calls": parts.calls,
        "whole": imported + whole,
    }
    Path(out).write_text(json.dumps(found), encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    from utils.cli import end_process

    end_process(main(sys.argv[1:]))
