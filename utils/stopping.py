"""Asking a run to save or to stop: signals, files in the run directory, and the clock.

One process hears a request; all have to act at the same step. Each step ends with a collective over all ranks anyway,
and the requests travel in it as a few more numbers (`RunControl.flags`, then `RunControl.hear`).
"""

import os
import signal
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from utils.errors import EXIT_INTERRUPTED

SAVE_FILE = "save"
SAVE_AND_QUIT_FILE = "save_quit"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A terminal sends Ctrl-C to the launcher and to its processes, and the launcher sends them one more: one request.
REPEAT_SECONDS = 2.0


class RequestFlags(NamedTuple):
    """What one process has been asked for; summed over all, what `RunControl.hear` wants."""

    sigterm: int = 0
    sigint: int = 0
    save: int = 0
    save_and_quit: int = 0
    minutes: int = 0
    probe: int = 0


class SignalWatch:
    """Hears SIGTERM and SIGINT while training runs: the first is remembered, another one ends the process at once.

    A thread does the hearing, so that the second one works also where the main thread waits inside a collective, in
    which Python's own handlers do not run.
    """

    def __init__(self, notice: str) -> None:
        """`notice` is printed when the first signal comes; empty: nothing is."""
        self.received: set[int] = set()
        self._notice = notice
        self._first = 0.0
        self._before: dict[int, object] = {}
        self._pipe: tuple[int, int] | None = None
        self._old_wakeup = -1

    def start(self) -> None:
        """Begin to hear. Outside the main thread, where Python allows no handlers, nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._old_wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        # A handler has to be there for the number to be written into the pipe; it has nothing else to do.
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        threading.Thread(target=self._listen, args=(self._pipe[0],), daemon=True, name="signals").start()

    def stop(self) -> None:
        """Put the handlers of before back."""
        if self._pipe is None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._pipe[1])  # ends the thread, which closes the other end
        self._pipe = None

    def _listen(self, descriptor: int) -> None:
        while data := os.read(descriptor, 1):
            number = data[0]
            if number not in SIGNALS:
                continue
            now = time.monotonic()
            if self.received and now - self._first > REPEAT_SECONDS:
                _say("a second signal: stopping at once, without a checkpoint")
                os._exit(EXIT_INTERRUPTED if number == signal.SIGINT else 128 + number)
            if not self.received:
                self._first = now
                if self._notice:
                    _say(f"{signal.Signals(number).name}: {self._notice}")
            self.received.add(number)
        os.close(descriptor)


def _say(text: str) -> None:
    # Not through `announce`: the main thread may hold the lock of its stream.
    os.write(2, f"\n{text}\n".encode())


class RunControl:
    """What a run has been asked for. A context: signals are heard inside it."""

    def __init__(self, run_dir: Path, is_main: bool, checkpoint_every_n_minutes: float | None) -> None:
        """Only the main process looks at files and at the clock; every process hears signals."""
        self._files = {name: run_dir / name for name in (SAVE_FILE, SAVE_AND_QUIT_FILE)} if is_main else {}
        self._obeying: set[str] = set()
        self._minutes = checkpoint_every_n_minutes if is_main else None
        self._last_save = time.monotonic()
        self._watch = SignalWatch(
            "the step in progress is finished, then a checkpoint is written; once more stops at once"
            if is_main
            else ""
        )
        self._heard = RequestFlags()
        self._probe = ""

    def __enter__(self) -> "RunControl":
        for path in self._files.values():
            path.unlink(missing_ok=True)  # meant for an earlier process, which did not live to see it
        self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After a stop the handlers stay: a launcher may pass its signal on late, when this process is about to end.
        if not (self._heard.sigterm or self._heard.sigint):
            self._watch.stop()

    def flags(self) -> RequestFlags:
        """What this process has been asked for since the last save."""
        received = self._watch.received
        waiting = {name for name, path in self._files.items() if name not in self._obeying and path.is_file()}
        is_due = self._minutes is not None and time.monotonic() - self._last_save >= 60 * self._minutes
        return RequestFlags(
            sigterm=int(signal.SIGTERM in received),
            sigint=int(signal.SIGINT in received),
            save=int(SAVE_FILE in waiting),
            save_and_quit=int(SAVE_AND_QUIT_FILE in waiting),
            minutes=int(is_due),
            probe=int(bool(self._probe)),
        )

    def stop_for_probe(self, name: str) -> None:
        """Ask for the end of the run because the probe of this name failed; for the main process alone."""
        self._probe = name

    @property
    def is_told_to_stop(self) -> bool:
        """Whether this process itself has been told to, since it began."""
        flags = self.flags()
        return bool(flags.sigterm or flags.sigint or flags.save_and_quit)

    def hear(self, total: RequestFlags) -> None:
        """Take note of what all processes together have been asked for."""
        self._heard = total

    @property
    def wants_stop(self) -> bool:
        """Whether the run is to end after this step."""
        heard = self._heard
        return bool(heard.sigterm or heard.sigint or heard.save_and_quit or heard.probe)

    @property
    def wants_stop_for_probe(self) -> bool:
        """Whether a failed probe is what ends it."""
        return bool(self._heard.probe)

    @property
    def wants_checkpoint(self) -> bool:
        """Whether a checkpoint is to be written after this step."""
        return self.wants_stop or bool(self._heard.save or self._heard.minutes)

    @property
    def reason(self) -> str:
        """What asked the run to stop; which probe is known to the main process alone."""
        if self._heard.probe:
            return f"the probe {self._probe}" if self._probe else "a probe"
        if self._heard.save_and_quit:
            return f"the file {SAVE_AND_QUIT_FILE}"
        return "SIGTERM" if self._heard.sigterm else "SIGINT"

    def saving(self) -> None:
        """A checkpoint begins: the clock starts anew, and the files that asked for it are being obeyed."""
        self._last_save = time.monotonic()
        asked = {SAVE_FILE: self._heard.save, SAVE_AND_QUIT_FILE: self._heard.save_and_quit}
        self._obeying |= {name for name, count in asked.items() if count}

    def saved(self) -> None:
        """The checkpoint is in place (called from another thread): remove the files that asked for it."""
        for name in tuple(self._obeying):
            self._files[name].unlink(missing_ok=True)
            self._obeying.discard(name)
