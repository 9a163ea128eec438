"""The process between a training and a probe: limit, priority, and nothing left behind whoever dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.probes import HANGING, is_alive, read_pids, until

ROOT = Path(__file__).resolve().parents[2]
SUPERVISOR = [sys.executable, "-I", "-S", str(ROOT / "utils" / "probe_supervisor.py")]


def start(source: str, limit: float = 60.0, parent: int | None = None) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", source]
    return subprocess.Popen(
        [*SUPERVISOR, str(limit), str(parent or os.getpid()), *command],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def told(supervisor: "subprocess.Popen[bytes]") -> dict:
    output, _ = supervisor.communicate(timeout=40)
    assert supervisor.returncode == 0
    return json.loads(output)


@pytest.fixture
def pids(tmp_path) -> Path:
    return tmp_path / "pids"


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        ("import sys; print('ab'); sys.exit(3)", 3, "ab\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import sys; print('x' * 10 ** 6 + 'end', file=sys.stderr)", 0, "x" * 8188 + "end\n"),
        ("import os, sys; os.close(1); os.close(2); import time; time.sleep(0.3); os._exit(5)", 5, ""),
    ],
)
def test_it_tells_how_the_probe_ended_and_what_it_said_last(source, status, said) -> None:
    found = told(start(source))
    assert (found["status"], found["ended_by"], found["said"]) == (status, "itself", said)


def test_a_program_that_is_not_there_is_told() -> None:
    supervisor = subprocess.Popen(
        [*SUPERVISOR, "5", str(os.getpid()), "/no/such/program"], stdout=subprocess.PIPE
    )
    found = told(supervisor)
    assert found["status"] is None and "No such file" in found["said"]


def test_the_probe_has_low_priority_and_is_the_first_to_go_without_memory() -> None:
    source = (
        "import os; print(os.nice(0), open('/proc/self/oom_score_adj').read(), os.getsid(0) == os.getpid())"
    )
    assert told(start(source))["said"].split() == ["19", "1000", "True"]


def test_at_the_limit_a_probe_that_will_not_listen_is_killed_with_all_it_started(pids) -> None:
    supervisor = start(
        HANGING.format(pids=str(pids)), limit=5.0
    )  # long enough for it to start on a busy machine
    probe, child = read_pids(pids)
    assert is_alive(probe) and is_alive(child)
    started = time.monotonic()
    found = told(supervisor)
    assert (found["status"], found["ended_by"], found["said"]) == (-9, "time limit", "still at it\n")
    assert 5 < time.monotonic() - started < 60  # the grace between SIGTERM and SIGKILL
    assert not is_alive(probe) and not is_alive(child)


def test_a_probe_that_listens_ends_at_once() -> None:
    found = told(start("import time; time.sleep(600)", limit=0.5))
    assert (found["status"], found["ended_by"]) == (-15, "time limit") and found["seconds"] < 4


def test_what_a_probe_leaves_behind_when_it_ends_is_ended(pids) -> None:
    source = HANGING.format(pids=str(pids)).replace("time.sleep(600)\n", "")
    assert told(start(source))["status"] == 0
    assert not any(map(is_alive, read_pids(pids)))


def test_on_request_everything_ends(pids) -> None:
    supervisor = start(HANGING.format(pids=str(pids)))
    processes = read_pids(pids)
    supervisor.terminate()
    assert told(supervisor)["ended_by"] == "request"
    assert not any(map(is_alive, processes))


def test_when_the_training_is_killed_everything_ends(pids) -> None:
    """The parent here is a process of its own, killed without a chance to say anything."""
    arguments = [*SUPERVISOR, "60"]
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import os, subprocess, time\nsubprocess.Popen({arguments!r} + [str(os.getpid()), {sys.executable!r}, '-c', "
            f"{HANGING.format(pids=str(pids))!r}], start_new_session=True)\ntime.sleep(600)",
        ]
    )
    processes = read_pids(pids)
    supervisors = [child.pid for child in psutil.Process(parent.pid).children()]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: not any(map(is_alive, [*processes, *supervisors])), 15)


def test_when_the_supervisor_itself_is_killed_its_probe_ends(pids) -> None:
    supervisor = start(HANGING.format(pids=str(pids)))
    probe, child = read_pids(pids)
    supervisor.kill()
    supervisor.wait()
    until(lambda: not is_alive(probe))
    os.kill(child, signal.SIGKILL)  # in a session of its own, and nobody is left who knew of it
