"""Norms of base weights, measured once for each checkpoint and kept in the user's cache directory.

A base never changes, and reading 4 GB of it only to learn 80 numbers again is what a probe would otherwise spend its
time on. A table belongs to the files' fingerprint, sizes and times of change (a fingerprint is taken from samples, which
a change of one tensor may miss; the time of change does not). It carries a checksum of its own: a table that is damaged,
or of a format that is not known, is made anew. Nothing is written beside the checkpoint, which may be read-only, or into a
run. Tables are replaced whole. Of two processes that save at the same instant one may lose what it added, which is then
measured again.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from utils.errors import UserError
from utils.files import atomic_write_text, combined_fingerprint
from utils.tensor_source import TensorSource

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2
_FOLDER = Path("ai-model-sandbox") / "base_norms"
_NOT_KEPT = "the norms of the base could not be kept for the next time"


@dataclass(frozen=True)
class SpectralNorm:
    """The largest singular value, at least this much and at most `error` more (both absolute)."""

    value: float
    error: float


def default_directory() -> Path | None:
    """`$XDG_CACHE_HOME/ai-model-sandbox/base_norms`, else below `~/.cache`; None where the user has no home."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / _FOLDER
    except RuntimeError:  # a user id without an entry, as containers have them
        return None


class BaseNorms:
    """The norms of one checkpoint's tensors: from the table where it has them, else from the tensor itself.

    `measured` counts the tensors that were read; `problems` says what was wrong with the table, for the report.
    """

    def __init__(self, source: TensorSource, directory: Path | None = None) -> None:
        """Open the table of `source`'s files; `directory` holds all tables, by default the user's cache directory."""
        self._source = source
        directory = directory or default_directory()
        self._path = None if directory is None else directory / f"{_identity(source)}.json"
        self._table, problem = _read(self._path)
        self._is_changed = False
        self.measured = 0
        self.problems: list[str] = [problem] if problem else []

    def frobenius(self, name: str) -> float:
        """||W||_F of a tensor.

        Raises:
            UserError: it holds values that are not finite.
        """
        entry = self._table.get(name, {})
        if "frobenius" not in entry:
            self._measure(name, with_spectral=False)
        return float(self._table[name]["frobenius"])

    def spectral(self, name: str) -> SpectralNorm:
        """The largest singular value of a tensor, whose axes from the second on count as one.

        Raises:
            UserError: it holds values that are not finite.
        """
        entry = self._table.get(name, {})
        if "spectral" not in entry:
            self._measure(name, with_spectral=True)
        return SpectralNorm(*self._table[name]["spectral"])

    def save(self) -> None:
        """Keep what was measured. Where that is not possible, `problems` says why, and nothing else is lost."""
        if not self._is_changed:
            return
        if self._path is None:
            self.problems.append(f"{_NOT_KEPT} (no home directory; set XDG_CACHE_HOME)")
            return
        merged, _ = _read(self._path)  # another process may have added to it
        for name, entry in self._table.items():
            merged[name] = merged.get(name, {}) | entry
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            document = {"format": FORMAT, "checksum": _checksum(merged), "norms": merged}
            atomic_write_text(self._path, json.dumps(document, indent=1) + "\n")
        except (OSError, UserError) as error:
            self.problems.append(f"{_NOT_KEPT} ({error})")

    def _measure(self, name: str, *, with_spectral: bool) -> None:
        from utils.delta_budget import weight_norm

        weight = self._source.get(name)
        self.measured += 1
        norm = weight_norm(weight)
        if not math.isfinite(norm):
            raise UserError(
                f"{self._source.files[0]}: {name} holds NaN or infinite values; download it again"
            )
        entry: dict[str, Any] = {"frobenius": norm}
        if with_spectral:
            found = spectral_norm(weight)
            entry["spectral"] = [found.value, found.error]
        self._table[name] = self._table.get(name, {}) | entry
        self._is_changed = True


def spectral_norm(weight: "Tensor") -> SpectralNorm:
    """The largest singular value, by Lanczos iterations (ARPACK) on products with vectors in float32.

    The value is that of a vector that was found, so it is a lower bound. Its error follows from the residual: some
    singular value s satisfies |s^2 - value^2| <= ||W^T W v - value^2 v||, and for a start that is random it is the
    largest one.

    Args:
        weight: [out, in]; further axes count as one with the second.
    """
    import numpy as np
    import torch
    from scipy.sparse.linalg import LinearOperator, eigsh

    matrix = weight.detach().flatten(1).float()
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    width = matrix.shape[1]
    peak = matrix.abs().max().item()
    if not peak:
        return SpectralNorm(0.0, 0.0)
    matrix = matrix / peak  # squares of very small or large weights have no place in float32

    def gram(vector: np.ndarray) -> np.ndarray:
        there = matrix @ torch.from_numpy(np.ascontiguousarray(vector.reshape(-1), dtype=np.float32))
        return (matrix.T @ there).numpy()

    if width < 3:  # ARPACK wants more columns than values
        largest = torch.linalg.matrix_norm(matrix.double(), 2).item()
        return SpectralNorm(peak * largest, 0.0)
    start = np.random.default_rng(0).standard_normal(width).astype(np.float32)
    operator = LinearOperator((width, width), matvec=gram, dtype=np.float32)
    values, vectors = eigsh(operator, k=1, which="LA", v0=start, tol=1e-4)
    squared, vector = float(values[0]), vectors[:, 0].astype(np.float32)
    residual = float(np.linalg.norm(gram(vector) - squared * vector))
    value = math.sqrt(max(squared, 0.0))
    return SpectralNorm(peak * value, peak * (math.sqrt(squared + residual) - value))


def _identity(source: TensorSource) -> str:
    parts = [combined_fingerprint(source.files)]
    for path in source.files:
        stat = path.stat()
        parts.append(f"{stat.st_size}-{stat.st_mtime_ns}")
    return str(xxhash.xxh3_128_hexdigest("/".join(parts).encode()))


def _read(path: Path | None) -> tuple[dict[str, dict[str, Any]], str | None]:
    """The table of a file, empty where there is none that can be used, and what was wrong with it."""
    if path is None:
        return {}, None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            return {}, None
        norms = document["norms"]
        if document["checksum"] == _checksum(norms) and all(map(_is_entry, norms.values())):
            return norms, None
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return {}, f"{path}: the table of base norms was damaged or not readable; the norms were measured again"


def _checksum(norms: Any) -> str:
    return str(xxhash.xxh3_128_hexdigest(json.dumps(norms, sort_keys=True).encode()))


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    numbers = [entry.get("frobenius", 0.0), *entry.get("spectral", [0.0, 0.0])]
    return len(numbers) == 3 and all(
        isinstance(number, float) and math.isfinite(number) and number >= 0 for number in numbers
    )
