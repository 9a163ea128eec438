"""The progress line that a person watches."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

_PLAIN_LINE_EVERY_SECONDS = 10.0


def announce(text: str) -> None:
    """Print a line for the person who started the command, without tearing a progress bar."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


class Progress:
    """A progress bar with ETA on a terminal; plain lines, at most one per ten seconds and the last, elsewhere."""

    def __init__(self, label: str, total: int, start: int = 0, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._label = label
        interactive = self._stream.isatty()
        self._bar = tqdm(
            total=total,
            initial=start,
            desc=label,
            file=self._stream,
            disable=False if interactive else None,
            dynamic_ncols=True,
            mininterval=0.1,
        )
        self._interactive = interactive
        self._done, self._total, self._last_line = start, total, 0.0

    def advance(self, count: int, **figures: str) -> None:
        """Move on by `count`, showing `figures` behind the bar."""
        self._done += count
        if self._interactive:
            self._bar.set_postfix(figures, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if self._done < self._total and now - self._last_line < _PLAIN_LINE_EVERY_SECONDS and self._last_line:
            return
        self._last_line = now
        shown = "  ".join(f"{key} {value}" for key, value in figures.items())
        print(f"{self._label} {self._done}/{self._total}  {shown}".rstrip(), file=self._stream, flush=True)

    def close(self) -> None:
        """Finish the bar's line."""
        self._bar.close()
