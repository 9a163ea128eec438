"""What evaluations leave in a run directory: `eval.jsonl` with a row each, and every sample's losses beside it.

Rank 0 only. All files are small and are replaced whole, so a kill leaves the state before or after an evaluation.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.files import TEMPORARY_SUFFIX, atomic_write_text
from utils.metrics import read_rows
from utils.paired import Paired, paired_difference

EVAL_FILE = "eval.jsonl"
SAMPLES_DIR = "evaluations"
FORMAT = 1


@dataclass(frozen=True)
class Measured:
    """One evaluation of one dataset.

    Attributes:
        dataset: the dataset's name.
        identity: names everything but the weights that the losses depend on; pairs are made within one identity.
        step: optimizer steps done.
        samples: each sample's name.
        quantiles: of the law of the noise level.
        losses: [samples, quantiles], float64; NaN where a loss is not finite.
        adapter_off: the same without the adapter; None where it was not measured.
    """

    dataset: str
    identity: str
    step: int
    samples: tuple[str, ...]
    quantiles: tuple[float, ...]
    losses: np.ndarray
    adapter_off: np.ndarray | None = None


class EvalRecords:
    """The evaluations of one run."""

    def __init__(self, run_dir: Path, step: int) -> None:
        """Open them, without those of later steps, which a run that goes on from `step` makes anew."""
        self._path = run_dir / EVAL_FILE
        self._samples_dir = run_dir / SAMPLES_DIR
        everything = read_rows(self._path)
        self._rows = [row for row in everything if row["step"] <= step]
        if len(self._rows) != len(everything):
            self._write_rows()
        for path in self._samples_dir.glob("*/*"):
            if path.name.endswith(TEMPORARY_SUFFIX) or _step_of(path) > step:
                path.unlink()

    def has(self, dataset: str, step: int) -> bool:
        """Whether the evaluation of this dataset at this step is there."""
        return any(row["dataset"] == dataset and row["step"] == step for row in self._rows)

    def first(self, dataset: str, identity: str) -> Measured | None:
        """The first evaluation of a dataset, with which later ones are compared; None before it.

        Raises:
            UserError: it was made of other samples, noise levels or noise.
        """
        steps = [row["step"] for row in self._rows if row["dataset"] == dataset]
        if not steps:
            return None
        path = self._samples_file(dataset, min(steps))
        try:
            found = _read(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}), and later evaluations are compared with it; put it back, or give the "
                f"dataset another name than {dataset!r} in eval_datasets"
            ) from error
        if found.identity != identity:
            raise UserError(
                f"{path}: the evaluation of {dataset!r} began with other samples, captions, eval_quantiles or seed, so a "
                "difference to it would compare unlike things; put these back, or give the dataset another name in "
                "eval_datasets, under which it begins anew"
            )
        return found

    def add(self, measured: Measured, first: Measured, epoch: int, seconds: float) -> dict[str, Any]:
        """Write an evaluation and return its row. `first` may be the same one.

        Raises:
            UserError: the disk is full.
        """
        # The samples come first: a row is never without them.
        atomic_write_text(self._samples_file(measured.dataset, measured.step), _document(measured))
        row = make_row(measured, first, epoch, seconds)
        self._rows.append(row)
        self._write_rows()
        return row

    def _write_rows(self) -> None:
        atomic_write_text(self._path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in self._rows))

    def _samples_file(self, dataset: str, step: int) -> Path:
        return self._samples_dir / dataset / f"step{step}.json"


def make_row(measured: Measured, first: Measured, epoch: int, seconds: float) -> dict[str, Any]:
    """What `eval.jsonl` says about an evaluation; numbers that are not finite are null."""
    losses, off = measured.losses, first.adapter_off
    row: dict[str, Any] = {
        "step": measured.step,
        "epoch": epoch,
        "dataset": measured.dataset,
        "num_samples": len(measured.samples),
        "loss": _plain(losses.mean()),
        "loss_by_quantile": {
            f"{quantile:g}": _plain(column.mean())
            for quantile, column in zip(measured.quantiles, losses.T, strict=True)
        },
        "first_step": first.step,
    }
    if measured.step != first.step:
        row |= _as_keys("change", _compare(losses, first.losses))
    if off is not None:
        row["loss_adapter_off"] = _plain(off.mean())
        row |= _as_keys("adapter_effect", _compare(losses, off))
    row["seconds"] = round(seconds, 2)
    return row


def _compare(now: np.ndarray, before: np.ndarray) -> Paired:
    """Over samples: each one's mean over the noise levels is one value of the pair."""
    if not (np.isfinite(now).all() and np.isfinite(before).all()):
        return Paired(float("nan"), None, None)
    return paired_difference(now.mean(axis=1).tolist(), before.mean(axis=1).tolist())


def _as_keys(name: str, paired: Paired) -> dict[str, Any]:
    ends = None if paired.low is None or paired.high is None else [paired.low, paired.high]
    return {name: _plain(paired.mean), f"{name}_interval": ends}


def _plain(number: float) -> float | None:
    return float(number) if np.isfinite(number) else None


def _step_of(path: Path) -> int:
    digits = path.stem.removeprefix("step")
    return int(digits) if digits.isdigit() else -1


def _document(measured: Measured) -> str:
    samples = []
    for index, name in enumerate(measured.samples):
        entry: dict[str, Any] = {"sample": name, "loss": [_plain(loss) for loss in measured.losses[index]]}
        if measured.adapter_off is not None:
            entry["loss_adapter_off"] = [_plain(loss) for loss in measured.adapter_off[index]]
        samples.append(entry)
    document = {
        "format": FORMAT,
        "dataset": measured.dataset,
        "identity": measured.identity,
        "step": measured.step,
        "quantiles": list(measured.quantiles),
        "samples": samples,
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _read(path: Path) -> Measured:
    document = json.loads(path.read_text(encoding="utf-8"))
    samples = document["samples"]

    def table(key: str) -> np.ndarray:
        return np.array([sample[key] for sample in samples], dtype=np.float64)  # None becomes NaN

    return Measured(
        document["dataset"],
        document["identity"],
        document["step"],
        tuple(sample["sample"] for sample in samples),
        tuple(document["quantiles"]),
        table("loss"),
        table("loss_adapter_off") if "loss_adapter_off" in samples[0] else None,
    )
