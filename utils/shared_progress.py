"""A progress line over the work of all ranks, shown by rank 0 while it works, or waits for the others."""

import itertools
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

from utils.distributed import Processes, SharedCounter
from utils.progress import Progress

_LOOK_EVERY_SECONDS = 0.5
# Ranks make the same lines in the same order, so this number names one of them on every rank.
_numbers = itertools.count()


class SharedProgress:
    """Counts what every rank has done; rank 0 shows the sum, from the moment that each has said how much it has to do.

    Nobody waits for anybody: the counters stand at rank 0, and a thread looks at them. Every rank must make it.
    """

    def __init__(self, label: str, processes: Processes) -> None:
        """Show `label` before the numbers; nothing is shown where there is nothing to do."""
        self._label = label
        self._processes = processes
        name = f"progress/{next(_numbers)}"
        self._ready, self._done, self._total = (
            SharedCounter(f"{name}/{what}") for what in ("ready", "done", "total")
        )
        self._reported: int | None = None
        self._bar: Progress | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def report(self, done: int, total: int) -> None:
        """This rank has done so much of its own share. The first call says how much there is; `total` stays the same."""
        if self._reported is None:
            self._total.add(total)
            self._ready.add(1)
            self._reported = 0
        self._done.add(done - self._reported)
        self._reported = done

    def __enter__(self) -> Self:
        if self._processes.is_main:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()
        if not self._processes.is_main:
            return
        self._thread.join()
        self._show_if_reachable()
        if self._bar is not None:
            self._bar.close()

    def _watch(self) -> None:
        while not self._is_over.is_set():
            self._show_if_reachable()
            self._is_over.wait(_LOOK_EVERY_SECONDS)

    def _show_if_reachable(self) -> None:
        # Where the counters are gone the group is too, which the work itself notices and reports.
        with suppress(RuntimeError):
            self._show()

    def _show(self) -> None:
        """Called by one thread at a time: the watching one, and after its end the one that closes."""
        if self._ready.value() < self._processes.world_size:
            return
        done, total = self._done.value(), self._total.value()
        if not total:
            return
        if self._bar is None:
            self._bar = Progress(self._label, total)
        self._bar.reach(done)
