"""What is seen of a long job, on a terminal and in a log."""

import fcntl
import io
import os
import pty
import re
import struct
import termios
from collections.abc import Callable

import pytest

from utils.progress import Progress, announce

FIGURES = {"loss": "0.1234", "speed": "0.15 s/step", "lr": "1.00e-03", "grad": "0.52"}


def seen_on_terminal(use: Callable[[io.TextIOWrapper], None], rows: int, columns: int) -> list[str]:
    """What `use` writes to a terminal of this size, one string per redrawing."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        use(terminal)
    os.set_blocking(ours, False)
    shown = b""
    while True:
        try:
            read = os.read(ours, 1 << 16)
        except OSError:
            break
        if not read:
            break
        shown += read
    os.close(ours)
    return [line for line in re.split(r"[\r\n]+", shown.decode()) if line.strip()]


def advance_to_end(terminal: io.TextIOWrapper) -> None:
    bar = Progress("training", 4, 1, terminal)
    for _ in range(3):
        bar.advance(1, **FIGURES)
    bar.close()


def test_a_terminal_sees_a_bar_with_figures_and_eta() -> None:
    lines = seen_on_terminal(advance_to_end, 24, 120)
    assert re.search(r"^training:  25%\|.* 1/4 \[00:00<", lines[0])
    assert re.search(
        r"^training: 100%\|.*█.* 4/4 \[00:00<00:00, loss 0.1234  speed 0.15 s/step  lr 1.00e-03", lines[-1]
    )
    assert all(len(line) <= 120 for line in lines)


def test_a_narrow_terminal_still_sees_loss_and_speed() -> None:
    lines = seen_on_terminal(advance_to_end, 24, 80)
    assert "loss 0.1234  speed 0.15 s/step" in lines[-1] and len(lines[-1]) <= 80


def test_a_terminal_that_does_not_know_its_size_sees_a_bar_too() -> None:
    lines = seen_on_terminal(advance_to_end, 0, 0)
    assert "4/4" in lines[-1] and "loss 0.1234" in lines[-1] and len(lines[-1]) <= 80


def test_a_log_gets_plain_lines(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr("utils.progress.time.monotonic", lambda: now[0])
    log = io.StringIO()
    bar = Progress("training", 6, 2, log)
    for seconds in (4.0, 4.0, 20.0, 1.0):
        now[0] += seconds
        bar.advance(1, loss=f"{now[0]:.0f}")
    bar.close()
    # The first at once, then at most one per ten seconds, and the last. 4 s for 1 of 4, 28 s for 3 of 4.
    assert log.getvalue().splitlines() == [
        "training 3/6  loss 104  00:12 left",
        "training 5/6  loss 128  00:09 left",
        "training 6/6  loss 129",
    ]


def test_a_log_says_what_is_ahead_before_the_first_item() -> None:
    log = io.StringIO()
    Progress("caching latents", 7, stream=log).advance(0)
    assert log.getvalue() == "caching latents 0/7\n"


def test_announcements_go_to_stderr(capsys) -> None:
    announce("run directory: out/1")
    captured = capsys.readouterr()
    assert captured.err == "run directory: out/1\n" and captured.out == ""


@pytest.mark.parametrize("columns", [0, 80])
def test_an_announcement_does_not_tear_the_bar(columns, monkeypatch) -> None:
    def use(terminal: io.TextIOWrapper) -> None:
        monkeypatch.setattr("sys.stderr", terminal)
        bar = Progress("training", 2, 0, terminal)
        bar.advance(1)
        announce("warning: over the budget")
        bar.close()

    assert "warning: over the budget" in [line.strip() for line in seen_on_terminal(use, 24, columns)]


def test_what_was_held_back_is_said_at_the_end() -> None:
    """Stopped before the end: the last line says how far it came, also where it came soon after the one before."""
    stream = io.StringIO()
    bar = Progress("caching", 4, stream=stream)
    bar.reach(0)
    bar.advance(2, loss="0.5")
    assert stream.getvalue() == "caching 0/4\n"
    bar.close()
    assert stream.getvalue() == "caching 0/4\ncaching 2/4  loss 0.5\n"
    whole = io.StringIO()
    bar = Progress("caching", 2, stream=whole)
    bar.advance(2)
    bar.close()
    assert whole.getvalue() == "caching 2/2\n"
