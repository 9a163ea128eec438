"""A rank that dies, raises or hangs: every process ends, one message names the first cause, and nobody stays behind."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from tests.helpers.workspace import ROOT, TIME_LIMIT_SECONDS, Workspace, environment, make_workspace
from tests.test_train import free_port
from utils.metrics import read_metrics

FAILING = ROOT / "tests" / "workers" / "failing_train.py"
ENDLESS = ("pipeline_stages=2", "max_steps=100000", "save_every_n_epochs=0", "checkpoint_every_n_epochs=0")
TORCHRUN = ("torchrun", "--standalone", "--nproc_per_node", "2")


@pytest.fixture
def workspace(tmp_path, tiny_ti2v, tiny_dataset) -> Workspace:
    return make_workspace(tmp_path, tiny_ti2v, tiny_dataset)


class Job:
    """A training on two stages, started by hand (two processes that nobody watches over) or by a launcher."""

    def __init__(
        self, workspace: Workspace, launcher: Sequence[str] = (), script: Path | None = None, **variables: str
    ) -> None:
        self.workspace = workspace
        command = workspace.command(launcher or ["python"], "dit_lora", *ENDLESS, "timeout_minutes=0.25")
        if script is not None:
            command[command.index(str(ROOT / "train.py"))] = str(script)
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        own = [{}] if launcher else [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        self.started = []
        for index, ranks in enumerate(own):
            with (workspace.root / f"said{index}").open("w") as said:
                self.started.append(
                    subprocess.Popen(
                        command,
                        stdout=said,
                        stderr=said,
                        cwd=workspace.root,
                        env=environment() | ranks | variables,
                        start_new_session=True,
                    )
                )
        self._everybody: dict[int, psutil.Process] = {}

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.workspace.root.glob("said?")))

    def everybody(self) -> list[psutil.Process]:
        """All processes that were ever seen: what was started, and its descendants."""
        for started in self.started:
            with contextlib.suppress(psutil.NoSuchProcess):
                root = psutil.Process(started.pid)
                for process in (root, *root.children(recursive=True)):
                    self._everybody.setdefault(process.pid, process)
        return list(self._everybody.values())

    def wait_for_steps(self, steps: int) -> None:
        deadline = time.monotonic() + TIME_LIMIT_SECONDS
        while not any(len(read_metrics(run)) >= steps for run in self.workspace.runs()):
            assert all(process.poll() is None for process in self.started), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def process_of(self, rank: int) -> psutil.Process:
        """The training process of a rank."""
        found = []
        for process in self.everybody():
            try:
                if process.environ().get("RANK") == str(rank) and "train.py" in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        (one,) = found
        return one

    def wait(self, seconds: float) -> list[int]:
        """Exit statuses; every process that was ever seen must be gone."""
        self.everybody()
        deadline = time.monotonic() + seconds
        codes = [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in self.started]
        left = [
            process
            for process in psutil.wait_procs(self.everybody(), timeout=5)[1]
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        ]
        assert not left, (left, self.said())
        return codes

    def end(self) -> None:
        for process in self.everybody():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture
def start(workspace):
    jobs: list[Job] = []

    def begin(*arguments: object, **variables: str) -> Job:
        jobs.append(Job(workspace, *arguments, **variables))  # type: ignore[arg-type]
        return jobs[-1]

    yield begin
    for job in jobs:
        job.end()


def messages(said: str) -> list[str]:
    """What a person would take for the reason."""
    return [
        line
        for line in said.splitlines()
        if any(word in line for word in ("stopped: ", "failed: ", "error: ", "interrupted"))
        and "torch" not in line
    ]


@pytest.mark.parametrize("rank", ["1", pytest.param("0", marks=pytest.mark.long)])
def test_a_process_that_raises_is_the_only_one_that_speaks(start: Callable[..., Job], rank: str) -> None:
    job = start((), FAILING, FAIL_RANK=rank)
    codes = job.wait(60)
    said = job.said()
    prefix = "[rank 1] " if rank == "1" else ""
    assert messages(said) == [f"{prefix}failed: ValueError: a stage cannot go on (--debug shows where)"], said
    assert codes == [1, 1] and "Traceback" not in said and "Connection closed" not in said


@pytest.mark.long
@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_is_named_by_the_one_that_is_left(start: Callable[..., Job], victim: int) -> None:
    """Also where the meeting point dies with it (rank 0)."""
    job = start()
    job.wait_for_steps(3)
    job.process_of(victim).send_signal(signal.SIGKILL)
    codes = job.wait(45)
    said = job.said()
    (message,) = messages(said)
    assert f"stopped: process {victim}" in message and "killed" in message, said
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1
    assert "Traceback" not in said and "Connection closed" not in said


@pytest.mark.long
def test_a_process_that_hangs_is_named_within_the_timeout(start: Callable[..., Job]) -> None:
    job = start()
    job.wait_for_steps(3)
    hanging = job.process_of(1)
    hanging.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert job.started[0].wait(timeout=60) == 1
    assert time.monotonic() - began < 45  # 15 s of timeout, and the search for the cause
    (message,) = messages(job.said())
    assert f"process 1 ({os.uname().nodename}, pid {hanging.pid}) gave no sign of life" in message
    # Where it goes on, it notices that the job is over.
    hanging.send_signal(signal.SIGCONT)
    assert job.wait(45) == [1, 1]
    assert "Traceback" not in job.said() and "Connection closed" not in job.said()


@pytest.mark.long
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launchers_clear_up(start: Callable[..., Job], launcher: str, sign: int) -> None:
    """Whatever a launcher does itself, the job ends and nobody is left."""
    deepspeed = ("deepspeed", "--num_gpus", "2", "--master_port", str(free_port()))
    job = start(TORCHRUN if launcher == "torchrun" else deepspeed)
    job.wait_for_steps(3)
    job.process_of(1).send_signal(sign)
    codes = job.wait(120)
    said = job.said()
    assert codes[0] not in (0, None)
    assert "Connection closed by peer" not in said
    named = "Signal 9 (SIGKILL)" in said if launcher == "torchrun" and sign == signal.SIGKILL else False
    assert named or len(messages(said)) == 1 or f"exits with return code = {-sign}" in said, said
