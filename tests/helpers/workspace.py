"""A place to train in: a copy of the tiny dataset, its TOML, and the command lines of both modes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from train import main

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {"encoder_ft": "configs/smoke_te_ft.toml", "dit_lora": "configs/smoke_dit_lora.toml"}
MEDIA = ("image_00", "image_01", "image_02", "video_00", "video_01", "video_02")
TIME_LIMIT_SECONDS = 240
DATASET = """
resolutions = [64]
enable_ar_bucket = false
frame_buckets = [1, 5]
"""


@dataclass(frozen=True)
class Workspace:
    """Directories of one test: `media/` with six samples, `dataset.toml`, `out/` for runs."""

    root: Path
    checkpoint: Path

    @property
    def media(self) -> Path:
        return self.root / "media"

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def write_dataset(self, *lines: str) -> None:
        """Write `dataset.toml`, with `lines` at its top level."""
        own = [f'cache_dir = "{self.cache}"', *lines, f'[[directory]]\npath = "{self.media}"\n']
        (self.root / "dataset.toml").write_text(DATASET + "\n".join(own), encoding="utf-8")

    def arguments(self, mode: str, *overrides: str, flags: Sequence[str] = ()) -> list[str]:
        """What stands behind `train.py`."""
        places = (
            f"model.ckpt_path={self.checkpoint}",
            f"dataset={self.root / 'dataset.toml'}",
            f"output_dir={self.out}",
        )
        return [
            *("--config", str(ROOT / CONFIGS[mode])),
            *(word for override in (*places, *overrides) for word in ("--set", override)),
            *flags,
        ]

    def train(self, mode: str, *overrides: str, flags: Sequence[str] = ()) -> int:
        """Train in this process; the exit status."""
        return main(self.arguments(mode, *overrides, flags=flags))

    def command(
        self, launcher: Sequence[str], mode: str, *overrides: str, flags: Sequence[str] = ()
    ) -> list[str]:
        """The whole command line; `launcher` is what stands before `train.py`, its first word a program of the venv."""
        program = Path(sys.executable).with_name(launcher[0]) if launcher[0] != "python" else sys.executable
        return [
            str(program),
            *launcher[1:],
            str(ROOT / "train.py"),
            *self.arguments(mode, *overrides, flags=flags),
        ]

    def launch(
        self,
        launcher: Sequence[str],
        mode: str,
        *overrides: str,
        flags: Sequence[str] = (),
        time_limit: float = TIME_LIMIT_SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """Train in processes of its own, for `time_limit` seconds at most."""
        command = self.command(launcher, mode, *overrides, flags=flags)
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=self.root,
            env=environment(),
            timeout=time_limit,
        )

    def runs(self) -> list[Path]:
        """Run directories, oldest first."""
        return sorted(path for path in self.out.iterdir()) if self.out.exists() else []

    def run(self) -> Path:
        """The only run directory."""
        (path,) = self.runs()
        return path

    def leftovers(self) -> list[Path]:
        """Files and directories that were only to be there for a moment."""
        return [path for path in self.root.rglob("*") if path.name.endswith(".tmp")]


def environment() -> dict[str, str]:
    """For processes of their own: one thread each, and none of this process's launcher variables."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in launcher}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def make_workspace(root: Path, checkpoint: Path, dataset: Path, *lines: str) -> Workspace:
    """A workspace in `root`, which exists and is empty."""
    workspace = Workspace(root, checkpoint)
    workspace.media.mkdir()
    for path in sorted(dataset.iterdir()):
        if path.stem in MEDIA:
            shutil.copy(path, workspace.media)
    workspace.write_dataset(*lines)
    return workspace


def linked_copy(checkpoint: Path, target: Path) -> Path:
    """The checkpoint again, as links to its files: to take files out or put others in their place."""
    for path in checkpoint.rglob("*"):
        place = target / path.relative_to(checkpoint)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    return target


def check_refused(code: int, said: str, *expected: str) -> None:
    """One clear message that names what is expected, and no trace."""
    assert code == 2, said
    assert said.count("error: ") == 1, said
    assert "Traceback" not in said
    for text in expected:
        assert text in said, f"{text!r} is not in: {said}"


def mount_or_skip(size_bytes: int, place: Path) -> None:
    """Mount a file system of `size_bytes` at `place`, or skip the test where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=10)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("mounting a small file system is not allowed here")
