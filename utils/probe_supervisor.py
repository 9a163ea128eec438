"""Runs one probe for a training: with a time limit, at low priority, and never longer than the training lives.

A program of its own, `python -I -S probe_supervisor.py LIMIT_SECONDS PARENT_PID COMMAND...`, because the training looks
up only between steps, which may take minutes, and because it may be killed. It uses the standard library alone, so it
starts in some 20 ms. What the probe says is kept in memory, the end of it, and nothing is written to disk.

On stdout it writes one JSON object, about the process and not about the weights:

- `status`: the probe's exit status; negative: the signal that killed it; null: it could not be started.
- `ended_by`: `itself`, `time limit`, or `request` (SIGTERM to this process, or the end of the parent).
- `seconds`: how long it ran.
- `said`: the end of what it wrote on stdout and stderr.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# How long a probe has between SIGTERM and SIGKILL.
GRACE_SECONDS = 5.0
_LOOK_SECONDS = 0.1
_TAIL_BYTES = 8192
_READ_BYTES = 65536
_STRAY_SECONDS = 5.0
# Of <linux/prctl.h>.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# Above every process that has not said it of itself: where memory runs out, the kernel takes the probe, not the training.
_OOM_SCORE = b"1000"
_NICE = 19  # the kernel takes the priority of reading and writing from it too


def supervise(command: Sequence[str], limit_seconds: float, parent: int) -> dict[str, Any]:
    """Run `command` to its end, or end it; afterwards nothing that it started is left.

    Args:
        command: the probe's command line.
        limit_seconds: after which it is cut off.
        parent: process id of this process's parent; when that is another one, the training is gone.
    """
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: asked.append(received))
    prctl = _prctl()
    # What the probe starts, and leaves behind, becomes a child of this process instead of the system's first.
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    own, started = os.getpid(), time.monotonic()

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))  # should even this process be killed
        if os.getppid() != own:
            os._exit(1)
        _lower_priority()

    try:
        # Alone with its group, so that one signal reaches all of it. No thread runs here that a fork could trip over.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=prepare,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return {"status": None, "ended_by": "itself", "seconds": 0.0, "said": str(error)}
    assert process.stdout is not None
    output = _Tail(process.stdout.fileno())
    ended_by = ""
    while not ended_by:
        output.wait(_LOOK_SECONDS)
        if process.poll() is not None:
            ended_by = "itself"
        elif asked or os.getppid() != parent:
            ended_by = "request"
        elif time.monotonic() - started >= limit_seconds:
            ended_by = "time limit"
    if ended_by != "itself":
        _end(process, output)
    _kill_strays()
    output.wait(0.0)
    return {
        "status": process.returncode,
        "ended_by": ended_by,
        "seconds": round(time.monotonic() - started, 3),
        "said": output.text(),
    }


class _Tail:
    """The end of what comes out of a pipe; it is always read, so that the writer never waits."""

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._is_open = True
        self._bytes = b""

    def wait(self, seconds: float) -> None:
        """Read what is there; where nothing is, wait for it so long."""
        if not self._is_open:
            time.sleep(seconds)
            return
        if not select.select([self._descriptor], [], [], seconds)[0]:
            return
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._descriptor, _READ_BYTES)
            self._is_open = bool(data)
            self._bytes = (self._bytes + data)[-_TAIL_BYTES:]

    def text(self) -> str:
        return self._bytes.decode("utf-8", errors="replace")


def _end(process: "subprocess.Popen[bytes]", output: _Tail) -> None:
    """SIGTERM to the probe's group, and after a while SIGKILL."""
    _signal_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        output.wait(_LOOK_SECONDS)
    if process.returncode is None:
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _kill_strays() -> None:
    """Kill whatever the probe has started and left, whichever group or session it has moved to (Linux)."""
    deadline = time.monotonic() + _STRAY_SECONDS
    while time.monotonic() < deadline:
        strays = list(_children())
        for pid in strays:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not strays:
            return
        time.sleep(0.01)


def _children() -> Iterator[int]:
    own = os.getpid()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in brackets, may hold anything; state and parent come behind it.
            if int(path.read_bytes().rpartition(b")")[2].split()[1]) == own:
                yield int(path.parent.name)


def _prctl() -> Any:
    """Linux's `prctl`; elsewhere something that does nothing (there the check of the parent alone has to do)."""
    if not sys.platform.startswith("linux"):
        return lambda *_: 0
    return ctypes.CDLL(None, use_errno=True).prctl


def _lower_priority() -> None:
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    with contextlib.suppress(OSError):
        descriptor = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
        os.write(descriptor, _OOM_SCORE)
        os.close(descriptor)


def main(arguments: Sequence[str]) -> int:
    """Supervise the command and tell what became of it."""
    limit_seconds, parent, command = float(arguments[0]), int(arguments[1]), list(arguments[2:])
    told = supervise(command, limit_seconds, parent)
    # Nobody listens any more where the training is gone.
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(told))
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    os._exit(code)
