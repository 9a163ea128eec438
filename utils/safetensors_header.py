"""The header of a `.safetensors` file, and the index of a directory of them: read and checked without torch.

A file is 8 bytes of length, that many bytes of JSON, then the data. Whatever may be wrong with them is one line that
names the file.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from utils.errors import UserError

Shape = tuple[int, ...]

# The limit of the safetensors library itself.
_MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
# Plain numbers: what is stored in fewer bits has its scale elsewhere.
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class SafetensorsHeader:
    """What the header of one `.safetensors` file says: shapes and dtypes ("BF16", "F32", ...) by name, and metadata.

    `spans` has, by name, where a tensor's bytes begin and end in the file.
    """

    shapes: dict[str, Shape]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    spans: dict[str, tuple[int, int]]


def tensor_bytes(shape: Shape, dtype: str) -> int:
    """Bytes of a tensor in a file; `dtype` as safetensors spells it ("BF16")."""
    return -(-math.prod(shape) * DTYPE_BITS[dtype] // 8)


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of a `.safetensors` file: 8 bytes of length, JSON, then the data.

    Raises:
        UserError: the file is missing, truncated, or its header is not one.
    """
    path = Path(path)
    size = file_size(path)
    with path.open("rb") as file:
        length_bytes = file.read(_LENGTH_BYTES)
        length = int.from_bytes(length_bytes, "little")
        if len(length_bytes) < _LENGTH_BYTES:
            raise UserError(f"{path}: truncated, it has only {size} bytes; download or copy it again")
        if length > _MAX_HEADER_BYTES or length < 2:
            raise UserError(
                f"{path}: not a .safetensors file (its header would be {length} bytes long); download it again"
            )
        if length > size - _LENGTH_BYTES:
            raise UserError(f"{path}: truncated inside its header ({size} bytes); download or copy it again")
        raw = file.read(length)
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its header is not readable as JSON ({error}); download it again") from None
    return _check_header(path, entries, _LENGTH_BYTES + length, size)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dictionary. A second entry of one name would hide the first without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return values


def _check_header(path: Path, entries: Any, data_start: int, size: int) -> SafetensorsHeader:
    data_bytes = size - data_start
    if not isinstance(entries, dict):
        raise UserError(f"{path}: its header is no list of tensors; it is not a .safetensors file")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: the metadata in its header are malformed; write or download it again")
    shapes, dtypes, spans, end, total = {}, {}, {}, 0, 0
    for name, entry in entries.items():
        shape, dtype, (first, stop) = _check_entry(path, name, entry)
        shapes[name], dtypes[name], spans[name] = shape, dtype, (data_start + first, data_start + stop)
        end, total = max(end, stop), total + stop - first
    if end > data_bytes:
        raise UserError(
            f"{path}: truncated, its header promises {end:,} bytes of tensors and {data_bytes:,} are there; "
            "download or copy it again"
        )
    if end < data_bytes:
        raise UserError(
            f"{path}: {data_bytes - end:,} bytes longer than its header says; download or copy it again"
        )
    if total != end:
        raise UserError(
            f"{path}: its tensors overlap or leave gaps ({total:,} bytes of tensors in {end:,}); download or copy it again"
        )
    texts = {str(key): str(value) for key, value in metadata.items()}
    return SafetensorsHeader(shapes, dtypes, texts, spans)


def _check_entry(path: Path, name: str, entry: Any) -> tuple[Shape, str, tuple[int, int]]:
    """Shape, dtype, and first and end offset of one header entry, all checked against each other."""
    if not name.isprintable():  # such as a line break, which would tear every message and table that shows it
        raise UserError(f"{path}: its header names a tensor {name!r}; download or copy it again")
    damaged = UserError(f"{path}: the header entry of {name!r} is malformed; download or copy it again")
    if not isinstance(entry, dict):
        raise damaged
    shape, dtype, offsets = entry.get("shape"), entry.get("dtype"), entry.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or not isinstance(dtype, str):
        raise damaged
    if dtype not in DTYPE_BITS:
        raise UserError(
            f"{path}: {name!r} has the unknown dtype {dtype!r}; update the safetensors library or convert the file"
        )
    if offsets[1] - offsets[0] != tensor_bytes(tuple(shape), dtype):
        raise damaged
    return tuple(shape), dtype, (offsets[0], offsets[1])


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def read_index(path: Path) -> dict[str, str]:
    """The shard of each tensor, by name, as an index says it.

    Raises:
        UserError: it is not readable, or names no shards.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); download it again") from None
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: has no weight_map, so it is not an index of shards; download it again")
    for name, shard in weight_map.items():
        if not name.isprintable():
            raise UserError(f"{path}: names a tensor {name!r}; download it again")
        # A shard lies beside its index; anything else could point at any file of the machine.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.isprintable():
            raise UserError(
                f"{path}: names the shard {shard!r} for {name}, which is not a plain file name; download it again"
            )
    return weight_map


def file_size(path: Path) -> int:
    """Bytes of a file.

    Raises:
        UserError: it is not there, or cannot be looked at.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a directory; give the weight file in it")
    try:
        with path.open("rb"):
            return path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
