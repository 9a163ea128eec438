"""`.safetensors` files with a real header and no data on disk: what reads headers alone cannot tell them from real ones.

For tests and benchmarks at the real size: 28 GB of weights become a file of a few kilobytes, whose values read as 0. Where
some tensors need values, `fill` writes those alone.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from utils.safetensors_stream import safetensors_header
from utils.tensor_source import Shape, read_safetensors_header


@dataclass(frozen=True)
class Span:
    """Where the bytes of a tensor lie in a file."""

    path: Path
    start: int
    length: int


def write_sparse_safetensors(
    path: Path,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str] | str = "BF16",
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write the header, and leave a hole where the data would be. The file system has to know holes (most do).

    Args:
        path: the file.
        shapes: by tensor name, in the order in which they lie in the file.
        dtypes: by tensor name, or one for all, as safetensors spells them ("BF16").
        metadata: goes into `__metadata__`.

    Returns:
        The bytes of the data that the header promises.
    """
    by_name = dict.fromkeys(shapes, dtypes) if isinstance(dtypes, str) else dtypes
    header, promised = safetensors_header(shapes, by_name, metadata)
    with Path(path).open("wb") as file:
        file.write(header)
        file.truncate(len(header) + promised)
    return promised


def write_sparse_shards(
    directory: Path, prefix: str, shapes: Mapping[str, Shape], dtype: str, num_shards: int
) -> dict[str, Span]:
    """Write a sharded checkpoint without data: at most `num_shards` files of about equal size, and their index.

    Returns:
        Where each tensor would lie.
    """
    directory.mkdir(parents=True)
    parts = _split(shapes, num_shards)
    spans: dict[str, Span] = {}
    for number, part in enumerate(parts, start=1):
        path = directory / f"{prefix}-{number:05d}-of-{len(parts):05d}.safetensors"
        write_sparse_safetensors(path, part, dtype)
        spans |= tensor_spans(path)
    index = {
        "metadata": {"total_size": sum(span.length for span in spans.values())},
        "weight_map": {name: span.path.name for name, span in spans.items()},
    }
    (directory / f"{prefix}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return spans


def tensor_spans(path: Path) -> dict[str, Span]:
    """Where the tensors of a `.safetensors` file lie."""
    header = read_safetensors_header(path)
    return {name: Span(path, start, end - start) for name, (start, end) in header.spans.items()}


def fill(spans: Iterable[Span], data: bytes) -> None:
    """Write the same bytes into each of these tensors.

    Raises:
        ValueError: a tensor has another length.
    """
    for span in spans:
        if span.length != len(data):
            raise ValueError(f"{span.path}: {len(data)} bytes for a tensor of {span.length}")
        with span.path.open("r+b") as file:
            file.seek(span.start)
            file.write(data)


def read_plainly(spans: Iterable[Span], buffer: memoryview) -> int:
    """Read tensors' bytes once, piece by piece into one buffer, which is the least that reading them can cost.

    Returns:
        How many bytes they were.

    Raises:
        EOFError: a file ends early.
    """
    total = 0
    for span in spans:
        with span.path.open("rb", buffering=0) as file:
            file.seek(span.start)
            left = span.length
            while left:
                count = file.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    raise EOFError(f"{span.path}: ends early")
                left -= count
        total += span.length
    return total


def _split(shapes: Mapping[str, Shape], num_shards: int) -> list[dict[str, Shape]]:
    """The tensors in order, in shards of about the same number of weights."""
    per_shard = sum(math.prod(shape) for shape in shapes.values()) / num_shards
    shards: list[dict[str, Shape]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if filled >= per_shard * len(shards):
            shards.append({})
        shards[-1][name] = shape
        filled += math.prod(shape)
    return shards
