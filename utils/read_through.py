"""Weight files read from the first byte to the last: are they whole, and are their numbers finite.

Tensor by tensor, in pieces, so that a file of any size needs little memory. Plain reads, no mapping: a disk that fails is an
error message here, and would end the process there.
"""

import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError
from utils.finite import all_finite
from utils.safetensors_header import SafetensorsHeader, read_index, read_safetensors_header, tensor_bytes
from utils.tensor_source import more_names, open_pth

PIECE_BYTES = 16 << 20
_INDEX_GLOB = "*.safetensors.index.json"
# Names of torch's dtypes whose numbers can be NaN or infinite, as safetensors spells them.
_FLOATS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class ReadFile:
    """What reading one file found.

    Attributes:
        path: the file.
        num_tensors: how many it holds.
        num_bytes: of its tensors.
        problems: what is wrong with it; each names it.
    """

    path: Path
    num_tensors: int
    num_bytes: int
    problems: tuple[str, ...]


def find_shards(directory: Path) -> tuple[list[Path], list[str]]:
    """The weight files of a directory that are there, and every difference between them and the index.

    Absent and surplus shards, tensors that are missing, not listed, or in another shard than the index says, and its total size.
    """
    indices, files = sorted(directory.glob(_INDEX_GLOB)), sorted(directory.glob("*.safetensors"))
    if len(indices) > 1:
        return files, [f"{directory}: has several indices ({', '.join(path.name for path in indices)})"]
    if not indices:
        return files, (
            [] if len(files) == 1 else [f"{directory}: holds {len(files)} .safetensors files and no index"]
        )
    index = indices[0]
    try:
        weight_map = read_index(index)
    except UserError as error:
        return files, [str(error)]
    listed = sorted(set(weight_map.values()))
    problems = [
        f"{directory / name}: missing, but {index.name} names it"
        for name in listed
        if not (directory / name).is_file()
    ]
    problems += [
        f"{file}: is not one of the shards that {index.name} names"
        for file in files
        if file.name not in listed
    ]
    headers = {name: header for name in listed if (header := _header(directory / name)) is not None}
    problems += _against_index(index, weight_map, headers)
    return [directory / name for name in listed if (directory / name).is_file()], problems


def _header(path: Path) -> SafetensorsHeader | None:
    """None where it is absent or damaged, which is said where the file is read."""
    try:
        return read_safetensors_header(path)
    except UserError:
        return None


def _against_index(
    index: Path, weight_map: dict[str, str], headers: dict[str, SafetensorsHeader]
) -> list[str]:
    problems = []
    for shard, header in headers.items():
        meant = {name for name, place in weight_map.items() if place == shard}
        lacking = sorted(meant - header.shapes.keys())
        surplus = sorted(header.shapes.keys() - meant)
        path = index.parent / shard
        if lacking:
            problems.append(
                f"{path}: {index.name} promises {lacking[0]} in it, which is not there{more_names(lacking)}"
            )
        if surplus:
            problems.append(
                f"{path}: holds {surplus[0]}, which {index.name} does not place there{more_names(surplus)}"
            )
    total = _total_size(index)
    if total is not None and len(headers) == len(set(weight_map.values())):
        found = sum(
            tensor_bytes(header.shapes[name], header.dtypes[name])
            for header in headers.values()
            for name in header.shapes
        )
        if found != total:
            problems.append(
                f"{index}: says that the shards hold {total:,} bytes of tensors, they hold {found:,}"
            )
    return problems


def _total_size(index: Path) -> int | None:
    metadata = json.loads(index.read_text(encoding="utf-8")).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return int(total) if isinstance(total, int | float) else None


def read_file(path: Path, on_bytes: OnBytes) -> ReadFile:
    """Read a `.safetensors` or `.pth` file through.

    Args:
        path: the file.
        on_bytes: hears how many bytes were read since it was called last.
    """
    read = _read_pth if path.suffix in (".pth", ".pt") else _read_safetensors
    try:
        return read(path, on_bytes)
    except UserError as error:
        return ReadFile(path, 0, 0, (str(error),))
    except OSError as error:
        return ReadFile(
            path,
            0,
            0,
            (f"{path}: cannot be read ({error.strerror or error}); copy it again, or look at the disk",),
        )


def _read_safetensors(path: Path, on_bytes: OnBytes) -> ReadFile:
    header = read_safetensors_header(path)
    bad: list[str] = []
    with path.open("rb") as file:
        for name, (start, end) in sorted(header.spans.items(), key=lambda item: item[1]):
            file.seek(start)
            pieces = _pieces(file, end - start, on_bytes)
            if not _are_finite(pieces, header.dtypes[name]):
                bad.append(name)
    return ReadFile(
        path,
        len(header.shapes),
        sum(end - start for start, end in header.spans.values()),
        _non_finite(path, bad),
    )


def _pieces(file: BinaryIO, length: int, on_bytes: OnBytes) -> Iterator[bytearray]:
    while length:
        piece = bytearray(min(length, PIECE_BYTES))
        if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
            raise UserError(f"{file.name}: ended while it was read; something else is writing it")
        length -= len(piece)
        on_bytes(len(piece))
        yield piece


def _are_finite(pieces: Iterator[bytearray], dtype: str) -> bool:
    """Whether all numbers are; what is no floating point is read all the same."""
    import torch

    is_finite = True
    for piece in pieces:
        if is_finite and dtype in _FLOATS:
            is_finite = all_finite(torch.frombuffer(piece, dtype=getattr(torch, _FLOATS[dtype])))
    return is_finite


def _read_pth(path: Path, on_bytes: OnBytes) -> ReadFile:
    source = open_pth(path)
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()  # every byte against its checksum
    if damaged is not None:
        return ReadFile(
            path,
            0,
            0,
            (f"{path}: damaged, {damaged} in it does not fit its checksum; download or copy it again",),
        )
    bad, num_bytes, unreleased = [], 0, 0
    for name, shape in source.shapes.items():
        tensor = source.get(name)
        rows = max(1, PIECE_BYTES * (shape[0] if shape else 1) // max(1, tensor.nbytes))
        pieces = tensor.split(rows) if shape else (tensor,)
        if not all(all_finite(piece) for piece in pieces):
            bad.append(name)
        num_bytes += tensor.nbytes
        on_bytes(tensor.nbytes)
        unreleased += tensor.nbytes
        if unreleased > 64 * PIECE_BYTES:  # mapped pages count as this process's memory
            source.release()
            unreleased = 0
    return ReadFile(path, len(source.shapes), num_bytes, _non_finite(path, bad))


def _non_finite(path: Path, bad: list[str]) -> tuple[str, ...]:
    if not bad:
        return ()
    return (
        f"{path}: {bad[0]} holds NaN or infinite values{more_names(bad)}; download it again, or use another save",
    )
