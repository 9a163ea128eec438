"""Kills training again and again at random moments, most of them inside a save, and checks that nothing is ever lost.

Each run is killed once with SIGKILL and resumed to its end, perhaps with another number of pipeline stages. Its losses
must be those of a run that nobody killed, to the bit; at no time may `latest`, or the name of a checkpoint, stand for
something incomplete. Everything lands under output/chaos/, which is made anew each time.

Runs are forked from this process, which has imported everything: starting Python would take most of the time. They
write to a slow disk: every sync takes a little longer than it would, so that saves are long enough to be hit.
"""

import argparse
import gc
import importlib
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

import utils.checkpoint_writer
import utils.files
import utils.saver
from utils.checkpoint import LATEST, complete_checkpoints, read_state
from utils.cli import run_command
from utils.errors import EXIT_UNEXPECTED, TrainingStoppedError, UserError
from utils.metrics import read_metrics

ROOT = Path("output/chaos")
CONFIG = "configs/smoke_dit_lora.toml"
STEP_LIMIT_SECONDS = 120.0
SYNC_SECONDS = 0.004
# Most kills wait for a save to begin, then so long at most.
SHARE_IN_SAVES = 0.7
LONGEST_WAIT_IN_SAVE_SECONDS = 0.06
SETTINGS = (
    "epochs=4",
    "checkpoint_every_n_steps=1",
    "save_every_n_epochs=2",
    "adapter.rank=4",
    "adapter.dropout=0.2",
    "uncond_fraction=0.3",
    "warmup_steps=5",
)
DATASET = """
resolutions = [64]
enable_ar_bucket = false
frame_buckets = [1, 5]
cache_dir = "{cache}"
[[directory]]
path = "{media}"
"""


@dataclass(frozen=True)
class Kill:
    """What one kill found: which step was the last, whether a save was in progress."""

    step: int
    in_save: bool


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=25, help="how many runs are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=ROOT, help="made anew")
    parser.add_argument("--checkpoint", type=Path, help="a tiny checkpoint; not given: one is made")
    parser.add_argument("--media", type=Path, help="a tiny dataset; not given: one is made")
    parser.add_argument("--debug", action="store_true", help="show stack traces")
    arguments = parser.parse_args(argv)
    return run_command(lambda: chaos(arguments), debug=arguments.debug)


def chaos(arguments: argparse.Namespace) -> int:
    """Train once undisturbed, then kill and resume; stop at the first thing that is wrong.

    Raises:
        TrainingStoppedError: something was lost; the message says what and where to look.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    out = arguments.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    checkpoint, media = arguments.checkpoint or out / "tiny", arguments.media or out / "media"
    for script, target, more in (
        ("make_tiny_wan.py", checkpoint, ("--variant", "ti2v-5b")),
        ("make_tiny_dataset.py", media, ()),
    ):
        if not target.exists():
            subprocess.run([sys.executable, f"scripts/{script}", "--out", str(target), *more], check=True)
    dataset = out / "dataset.toml"
    dataset.write_text(DATASET.format(cache=out / "cache", media=media), encoding="utf-8")
    trainings = Trainings(out, [f"model.ckpt_path={checkpoint}", f"dataset={dataset}", *SETTINGS])

    rng = random.Random(arguments.seed)
    whole = trainings.start("whole", 1)
    started = time.monotonic()
    whole.wait()
    duration = time.monotonic() - started
    expected = losses(newest_run(out / "whole"))
    print(f"undisturbed: {len(expected)} steps in {duration:.1f} s", flush=True)
    kills: list[Kill] = []
    while len(kills) < arguments.kills:
        kill = kill_once(trainings, f"run{len(kills):02d}", rng, duration, expected)
        if kill is not None:
            kills.append(kill)
    in_save = sum(kill.in_save for kill in kills)
    print(
        f"{len(kills)} runs killed, {in_save} of them inside a save, and resumed: every sequence of {len(expected)} losses "
        "is that of the undisturbed run, and no checkpoint was ever named before it was complete"
    )
    return 0


class Trainings:
    """Starts runs of one configuration, each in an output directory of its own."""

    def __init__(self, out: Path, overrides: list[str]) -> None:
        self.out = out
        self._overrides = overrides
        # What training imports late: a forked run must not have to.
        for name in (
            *("models.wan.model", "models.wan.preflight", "models.wan.setup", "utils.run", "utils.resume"),
            *("transformers", "peft", "torch.utils.tensorboard"),
        ):
            importlib.import_module(name)
        gc.collect()
        gc.freeze()  # or each run would walk through all of that, and copy it

    def start(self, name: str, stages: int, *flags: str) -> "Processes":
        """Fork the processes of one run."""
        words = [*self._overrides, f"output_dir={self.out / name}", f"pipeline_stages={stages}"]
        argv = ["--config", CONFIG, *(word for one in words for word in ("--set", one)), *flags]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        log = self.out / f"{name}.log"
        places = [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(stages),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            for rank in range(stages)
        ]
        return Processes([_fork(argv, place, log) for place in places], log)


def _fork(argv: list[str], environment: dict[str, str], log: Path) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(environment)
        _make_disk_slow()
        sys.argv = ["train.py", *argv]
        runpy.run_path("train.py", run_name="__main__")  # ends the process
    finally:
        os._exit(EXIT_UNEXPECTED)


def _make_disk_slow() -> None:
    def slowly(function: Callable[[Path], None]) -> Callable[[Path], None]:
        def slow(path: Path) -> None:
            function(path)
            time.sleep(SYNC_SECONDS)

        return slow

    for module in (utils.checkpoint_writer, utils.files, utils.saver):
        for name in ("fsync_file", "fsync_directory"):
            setattr(module, name, slowly(getattr(module, name)))


class Processes:
    """The processes of one run."""

    def __init__(self, pids: list[int], log: Path) -> None:
        self._pids = pids
        self._log = log
        self._statuses: dict[int, int] = {}

    def poll(self) -> bool:
        """Whether any is still there."""
        for pid in self._pids:
            if pid not in self._statuses:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self._statuses[pid] = status
        return len(self._statuses) < len(self._pids)

    def wait(self) -> None:
        """Wait for the end.

        Raises:
            TrainingStoppedError: one of them failed, or they do not end.
        """
        deadline = time.monotonic() + STEP_LIMIT_SECONDS
        while self.poll():
            if time.monotonic() > deadline:
                self.kill(random.Random(0))
                raise TrainingStoppedError(
                    f"the run did not end within {STEP_LIMIT_SECONDS:g} s; see {self._log}"
                )
            time.sleep(0.01)
        if any(self._statuses.values()):
            raise TrainingStoppedError(f"the run failed ({list(self._statuses.values())}); see {self._log}")

    def kill(self, rng: random.Random) -> bool:
        """SIGKILL, all at once or one first; returns whether any was there to be killed."""
        if not self.poll():
            return False
        order = rng.sample(self._pids, len(self._pids))
        pause = rng.choice([0.0, rng.uniform(0, 0.2)])
        for pid in order:
            if pid not in self._statuses:
                os.kill(pid, signal.SIGKILL)
                time.sleep(pause)
        while self.poll():
            time.sleep(0.005)
        return True


def kill_once(
    trainings: Trainings, name: str, rng: random.Random, duration: float, expected: list[float]
) -> Kill | None:
    """Start a run, kill it, check what it left, resume it and compare; None where it ended before it was killed."""
    out = trainings.out / name
    shutil.rmtree(out, ignore_errors=True)
    run = trainings.start(name, rng.choice([1, 2]))
    moment = time.monotonic() + rng.uniform(0.2, 1.0) * duration
    aims_at_save, wait = rng.random() < SHARE_IN_SAVES, rng.uniform(0, LONGEST_WAIT_IN_SAVE_SECONDS)
    while time.monotonic() < moment and run.poll():
        time.sleep(0.002)
    if aims_at_save:
        while run.poll() and not list(out.glob("*/.global_step*.tmp")):
            time.sleep(0.0005)
        time.sleep(wait)
    if not run.kill(rng):
        return None
    kill = look(out)
    resumed = rng.choice([1, 2])
    trainings.start(name, resumed, "--resume_from_checkpoint").wait()
    path = newest_run(out)
    found = losses(path)
    if found != expected:
        raise TrainingStoppedError(f"{path}: killed after step {kill.step}, it has other losses: {found}")
    check_checkpoints(path)
    left = sorted(path.glob(".*.tmp"))
    if left or latest_of(path) != f"global_step{len(expected)}":
        raise TrainingStoppedError(f"{path}: left behind {left}, latest is {latest_of(path)}")
    where = "inside a save" if kill.in_save else "between saves"
    print(
        f"{name}: killed after step {kill.step}, {where}; resumed with {resumed} stage(s): equal", flush=True
    )
    return kill


def look(out: Path) -> Kill:
    """What the killed run left."""
    runs = [path for path in out.glob("*") if not path.name.startswith(".")]
    if not runs:
        return Kill(0, in_save=False)
    path = newest_run(out)
    check_checkpoints(path)
    complete = complete_checkpoints(path)
    unnamed = bool(complete) and complete[-1].name != latest_of(path)
    return Kill(len(losses(path)), in_save=unnamed or bool(list(path.glob(".*.tmp"))))


def check_checkpoints(path: Path) -> None:
    """Read everything that is named as a checkpoint, to the last tensor.

    Raises:
        TrainingStoppedError: something is not whole.
    """
    latest = latest_of(path)
    complete = complete_checkpoints(path)
    try:
        if latest is not None and latest not in {found.name for found in complete}:
            raise UserError(f"{path / LATEST}: names {latest}, which is not there")
        for checkpoint in complete:
            read_state(checkpoint)
            for file in checkpoint.glob("*.safetensors"):
                with safe_open(file, framework="pt") as tensors:
                    for key in tensors.keys():  # noqa: SIM118 (not a dict)
                        tensors.get_tensor(key)
    except Exception as error:
        raise TrainingStoppedError(f"an incomplete checkpoint has a name: {error}") from error


def latest_of(path: Path) -> str | None:
    """What `latest` says."""
    pointer = path / LATEST
    return pointer.read_text(encoding="utf-8").strip() if pointer.exists() else None


def newest_run(out: Path) -> Path:
    """The run directory in a run's output directory."""
    return max(path for path in out.glob("*/config.toml") if not path.parent.name.startswith(".")).parent


def losses(path: Path) -> list[float]:
    """The losses of a run, which must be of steps 1, 2, 3, ..."""
    rows = read_metrics(path)
    if [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
        raise TrainingStoppedError(f"{path}: steps are missing or doubled in its metrics")
    return [row["loss"] for row in rows]


if __name__ == "__main__":
    sys.exit(main())
