"""A few values of a tensor, read from the bytes that the header points at: no torch, no whole tensor.

Headers cannot tell two files of one model apart. A few slices of each tensor can: they are equal, equal up to the
rounding of a smaller format, near each other, or have nothing to do with each other.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from utils.errors import UserError
from utils.tensor_source import TensorSource

if TYPE_CHECKING:
    import numpy as np

Likeness = Literal["identical", "rounded", "near", "different"]
NUM_SLICES = 3
SLICE_VALUES = 64
# Two independent tensors are at a relative distance of 1.41 from each other, a tensor and zeros at 1.
NEAR_LIMIT = 0.5
# What rounding to a format can move, relative: half of its spacing is 6.2 % in e4m3 and 12.5 % in e5m2 (more where
# values are so small that the exponent ends), 0.4 % in bfloat16, 0.05 % in float16.
_ROUNDING = {"F8_E4M3": 0.1, "F8_E5M2": 0.15, "BF16": 0.004, "F16": 0.004}
_NUMPY_NAMES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "U64": "<u8",
    "I32": "<i4",
    "U32": "<u4",
    "I16": "<i2",
    "U16": "<u2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "u1",
}
_BYTES_OF_FLOATS = {"BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class Comparison:
    """Samples of one tensor in two files.

    Attributes:
        is_equal: all sampled values are equal.
        distance: norm of the difference over that of the second; None where that norm is 0 or not finite.
        is_rounding: no farther apart than the coarser of two different formats explains.
        is_zero: all sampled values are 0 on both sides, which says nothing.
    """

    is_equal: bool
    distance: float | None
    is_rounding: bool
    is_zero: bool


class Sampler:
    """Reads samples of many tensors of one source; files stay open inside `with`."""

    def __init__(self, source: TensorSource) -> None:
        """Sample `source`, as it is stored: scales of fp8 files are applied."""
        self._source = source
        self._files: dict[Path, int] = {}

    @contextmanager
    def open(self) -> Iterator["Sampler"]:
        """Keep the files open while samples are read."""
        try:
            yield self
        finally:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def dtype(self, name: str) -> str:
        """How a tensor is stored."""
        return self._source.dtypes[name]

    def values(self, name: str) -> "np.ndarray":
        """Samples [at most NUM_SLICES * SLICE_VALUES] in float64 at places that only the number of elements decides.

        Raises:
            UserError: the file cannot be read, or the dtype is one that is not known here.
        """
        import numpy as np

        location = self._source.location(name)
        if location is None:
            flat = self._source.get(name).flatten()
            parts = [flat[first : first + SLICE_VALUES].double().numpy() for first in slice_starts(len(flat))]
            return np.concatenate(parts) if parts else np.zeros(0)
        path, first, end = location
        dtype = self._source.dtypes[name]
        width = _width(dtype, path, name)
        count = (end - first) // width
        parts = []
        for start in slice_starts(count):
            length = min(SLICE_VALUES, count - start) * width
            parts.append(decode(self._read(path, first + start * width, length), dtype))
        values = np.concatenate(parts) if parts else np.zeros(0)
        scale = name.removesuffix(".weight") + ".scale_weight"
        if dtype.startswith("F8") and scale in self._source.shapes:
            values = values * self.values(scale)[0]
        return values

    def _read(self, path: Path, offset: int, length: int) -> bytes:
        try:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            data = os.pread(self._files[path], length, offset)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
        if len(data) < length:
            raise UserError(f"{path}: became shorter while it was read; copy it again")
        return data


def slice_starts(count: int) -> list[int]:
    """Where the sampled slices of `count` values begin: all of a short tensor, else beginning, middle and end."""
    if count <= NUM_SLICES * SLICE_VALUES:
        return list(range(0, count, SLICE_VALUES))
    return [(count - SLICE_VALUES) * index // (NUM_SLICES - 1) for index in range(NUM_SLICES)]


def decode(data: bytes, dtype: str) -> "np.ndarray":
    """Stored bytes as float64 values; `dtype` as safetensors spells it ("BF16", "F8_E4M3", ...)."""
    import numpy as np

    if dtype == "BF16":  # the upper half of a float32
        with np.errstate(invalid="ignore"):  # a NaN stays one
            return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (np.frombuffer(data, "u1").astype(np.uint16) << 8).view(np.float16).astype(np.float64)
    if dtype == "F8_E4M3":
        return _e4m3_values()[np.frombuffer(data, "u1")]
    return np.frombuffer(data, _NUMPY_NAMES[dtype]).astype(np.float64)


def compare_samples(
    left: Sampler, right: Sampler, names: Mapping[str, tuple[str, str]]
) -> dict[str, Comparison]:
    """Compare tensors of two sources.

    Args:
        names: by shown name, the stored name on the left and on the right; both tensors have as many elements.
    """
    import numpy as np

    found = {}
    with left.open(), right.open(), np.errstate(all="ignore"):
        for shown, (one, other) in names.items():
            a, b = left.values(one), right.values(other)
            norm, gap = float(np.linalg.norm(b)), float(np.linalg.norm(a - b))
            distance = gap / norm if norm and np.isfinite(gap) and np.isfinite(norm) else None
            limit = rounding_limit(left.dtype(one), right.dtype(other))
            is_rounding = distance is not None and distance <= limit
            is_equal = bool(np.array_equal(a, b, equal_nan=True))
            found[shown] = Comparison(is_equal, distance, is_rounding, not a.any() and not b.any())
    return found


def likeness(comparisons: Mapping[str, Comparison]) -> Likeness:
    """What all samples together say, by the median distance of the tensors that are not equal."""
    unequal = [one for one in comparisons.values() if not one.is_equal]
    if not unequal:
        return "identical"
    if all(one.is_rounding for one in unequal):
        return "rounded"
    distance = median_distance(comparisons)
    return "different" if distance is None or distance > NEAR_LIMIT else "near"


def rounding_limit(one: str, other: str) -> float:
    """The largest relative distance that comes of storing the same values in two formats; 0 within one format."""
    return 0.0 if one == other else max(_ROUNDING.get(one, 0.0), _ROUNDING.get(other, 0.0))


def median_distance(comparisons: Mapping[str, Comparison]) -> float | None:
    """Median relative distance over the tensors that are not equal; None where none has one."""
    distances = sorted(
        one.distance for one in comparisons.values() if not one.is_equal and one.distance is not None
    )
    return distances[len(distances) // 2] if distances else None


def _width(dtype: str, path: Path, name: str) -> int:
    """Bytes of one value."""
    import numpy as np

    if dtype in _BYTES_OF_FLOATS:
        return _BYTES_OF_FLOATS[dtype]
    if dtype not in _NUMPY_NAMES:
        raise UserError(
            f"{path}: {name} is stored as {dtype}, whose values cannot be read here; give another file"
        )
    return int(np.dtype(_NUMPY_NAMES[dtype]).itemsize)


@cache
def _e4m3_values() -> "np.ndarray":
    """The 256 values of float8 e4m3fn: bias 7, no infinity, NaN at 0x7f and 0xff."""
    import numpy as np

    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[(codes & 127) == 127] = np.nan
    return np.where(codes & 128, -size, size)
