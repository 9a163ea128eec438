"""One JSON object per optimizer step in `metrics.jsonl`, and the same numbers as TensorBoard events."""

import errno
import json
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import atomic_write_text, disk_errors_as_user_errors

METRICS_FILE = "metrics.jsonl"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All steps of a run, in order. A last line torn by a kill is left out.

    Raises:
        UserError: as `read_rows`.
    """
    return read_rows(run_dir / METRICS_FILE)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one on each line; none where it does not exist. A torn line ends it.

    Raises:
        UserError: the file is no text, or a line of it is an object without a step, or no object.
    """
    if not path.exists():
        return []
    mend = "put back the file that the run wrote"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); {mend}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path}: line {number} is not a row of a run, with its step; {mend}")
        rows.append(row)
    return rows


def append_line(file: FileIO, line: bytes) -> None:
    """Append to an unbuffered file, whole or not at all: a torn line would hide all that come after it.

    Raises:
        OSError: the disk is full; the file ends as before.
    """
    end = file.tell()
    try:
        written = file.write(line)
        if written != len(line):  # what a disk that is almost full does
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        file.truncate(end)
        raise


class MetricsWriter:
    """Appends to `metrics.jsonl` and TensorBoard. After a resume each step stands there once."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        """Drop what an earlier process wrote from `first_step` on, then append.

        Raises:
            UserError: the disk is full.
        """
        from torch.utils.tensorboard import SummaryWriter

        path = run_dir / METRICS_FILE
        kept = [row for row in read_metrics(run_dir) if row["step"] < first_step]
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._path = path
        with disk_errors_as_user_errors(path):
            self._tensorboard = SummaryWriter(str(run_dir), purge_step=first_step)
        self._file = path.open("ab", buffering=0)

    def write(self, row: dict[str, Any]) -> None:
        """Write one step; the line has left this process when this returns, so that a kill does not lose it.

        Raises:
            UserError: the disk is full; the file ends with the last whole line.
        """
        line = json.dumps(row, allow_nan=False) + "\n"
        with disk_errors_as_user_errors(self._path):
            append_line(self._file, line.encode())
            for key, value in row.items():
                if isinstance(value, dict):
                    for name, number in value.items():
                        self._tensorboard.add_scalar(f"{key}/{name}", number, row["step"])
                elif isinstance(value, (int, float)) and key != "step":
                    self._tensorboard.add_scalar(f"train/{key}", value, row["step"])

    def write_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Write numbers of another kind (evaluations) for TensorBoard alone.

        Raises:
            UserError: the disk is full.
        """
        with disk_errors_as_user_errors(self._path):
            for name, number in scalars.items():
                self._tensorboard.add_scalar(name, number, step)

    def write_picture(self, name: str, path: Path, step: int) -> None:
        """Write a PNG file for TensorBoard alone.

        Raises:
            UserError: the disk is full, or the file is not there or no picture.
        """
        import numpy as np
        from PIL import Image

        try:
            with Image.open(path) as picture:
                pixels_HWC = np.asarray(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:  # what PIL makes of a file that is damaged
            raise UserError(f"{path}: cannot be read as a picture ({error})") from None
        with disk_errors_as_user_errors(self._path):
            self._tensorboard.add_image(name, pixels_HWC, step, dataformats="HWC")

    def close(self) -> None:
        """Close both files, with everything on disk."""
        with disk_errors_as_user_errors(self._path), self._file:
            os.fsync(self._file.fileno())
            self._tensorboard.close()
