"""The progress line that a person watches."""

import os
import sys
import time
from typing import TextIO

from tqdm import tqdm

_PLAIN_LINE_EVERY_SECONDS = 10.0
# The rate is left out: the loop names its own speed among the figures.
_BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_FALLBACK_COLUMNS = 80
_FALLBACK_ROWS = 24


def announce(text: str) -> None:
    """Print a line for the person who started the command, without tearing a progress bar."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """A progress bar with ETA on a terminal; plain lines, at most one per ten seconds and the last, elsewhere."""

    def __init__(self, label: str, total: int, start: int = 0, stream: TextIO | None = None) -> None:
        """Show `label` at `start` of `total`; `start` is what an earlier process did and does not count for the ETA."""
        self._stream = sys.stderr if stream is None else stream
        self._label = label
        self._start, self._done, self._total = start, start, total
        self._began, self._last_line = time.monotonic(), 0.0
        self._is_shown = False
        self._held_back: str | None = None  # figures of a line that came too soon after the one before it
        self._bar = self._open_bar() if self._stream.isatty() else None

    def _open_bar(self) -> "tqdm[None]":
        # A terminal that does not know its size says 0 x 0, and tqdm would then show nothing at all.
        knows_size = os.get_terminal_size(self._stream.fileno()).columns > 0
        return tqdm(
            total=self._total,
            initial=self._start,
            desc=self._label,
            file=self._stream,
            bar_format=_BAR_FORMAT,
            mininterval=0.1,
            dynamic_ncols=knows_size,
            ncols=None if knows_size else _FALLBACK_COLUMNS,
            nrows=None if knows_size else _FALLBACK_ROWS,
        )

    def advance(self, count: int, **figures: str) -> None:
        """Move on by `count`, showing `figures` behind the bar, the most important first: a narrow terminal cuts.

        By 0: the work begins now, and what came before it says nothing about how long it takes.
        """
        if count == 0:
            self._began = time.monotonic()
            if self._bar is not None:
                self._bar.unpause()
        self._done += count
        self._is_shown = True
        shown = "  ".join(f"{name} {value}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if self._done < self._total and now - self._last_line < _PLAIN_LINE_EVERY_SECONDS and self._last_line:
            self._held_back = shown
            return
        self._print_line(shown, self._remaining(now))
        self._last_line = now

    def _print_line(self, figures: str, remaining: str) -> None:
        self._held_back = None
        line = f"{self._label} {self._done}/{self._total}  {figures}".rstrip() + remaining
        print(line, file=self._stream, flush=True)

    def reach(self, done: int) -> None:
        """Stand at `done`, as far as that is news."""
        if done != self._done or not self._is_shown:
            self.advance(done - self._done)

    def _remaining(self, now: float) -> str:
        """How long it still takes, once there is something to go by."""
        done = self._done - self._start
        if done <= 0 or self._done >= self._total:
            return ""
        seconds = (self._total - self._done) * (now - self._began) / done
        return f"  {tqdm.format_interval(seconds)} left"

    def close(self) -> None:
        """Finish the bar's line; elsewhere say how far it came, if that was held back."""
        if self._bar is not None:
            self._bar.close()
        elif self._held_back is not None:
            self._print_line(self._held_back, "")
