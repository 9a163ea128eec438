"""A mistake that one process sees ends all of them, with one message and the right status."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from utils import distributed
from utils.distributed import init_processes
from utils.errors import TrainingStoppedError, UserError

WORKER = Path(__file__).parents[1] / "workers" / "shared_errors.py"


def launch(case: str) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*torchrun, str(WORKER), case],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_results_reach_every_rank() -> None:
    done = launch("fine")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("main", "error: disk of rank 0 is full"),
        ("other", "error: disk of rank 1 is full"),
        ("late", "error: disk of rank 1 is full"),  # rank 0 takes its time, and the launcher does not wait
        ("alone", "[rank 1] error: only rank 1 knows"),
    ],
)
def test_one_message_and_no_hang(case: str, message: str) -> None:
    done = launch(case)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "error:" in line and "torch" not in line]
    assert said == [message], done.stderr
    assert "exitcode  : 2" in done.stderr  # of the worker; torchrun itself ends with 1
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for key, value in {
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }.items():
            monkeypatch.setenv(key, str(value))
        with pytest.raises(UserError, match=rf"port 127\.0\.0\.1:{port} is in use.*--master_port"):
            init_processes(timeout_minutes=0.1)


def test_a_process_whose_peers_do_not_come_says_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0, which speaks for all as a rule, may be the one that never came."""
    variables = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 9}
    for key, value in variables.items():
        monkeypatch.setenv(key, str(value))
    with pytest.raises(
        UserError, match=r"the 2 processes did not find each other at 127\.0\.0\.1:9 "
    ) as raised:
        init_processes(timeout_minutes=0.02)
    assert raised.value.is_own


def test_after_an_error_of_its_own_a_process_does_not_wait_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several processes only a shared error is followed by leaving the group, which waits for peers on nccl."""
    left: list[bool] = []
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    alone = distributed.Processes(0, 0, 1, distributed.torch.device("cpu"))
    monkeypatch.setattr(distributed, "init_processes", lambda timeout_minutes: alone)
    monkeypatch.setattr(distributed, "shutdown", lambda: left.append(True))
    shared = UserError("all know")
    shared.on_every_rank = True
    for error, leaves in (
        (RuntimeError("mine"), 0),
        (UserError("mine"), 0),
        (shared, 1),
        (TrainingStoppedError(), 1),
    ):
        left.clear()
        with pytest.raises(type(error)), distributed.process_group(1.0):
            raise error
        assert len(left) == leaves, error
    left.clear()
    with distributed.process_group(1.0):
        pass
    assert left
