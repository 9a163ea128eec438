"""Named tensors in weight files, read by header and by slice.

Opening a source reads headers only; `get` reads one tensor. `.safetensors` headers are parsed here, without torch and
with limits, so that tools that need no values need no torch. `.pth` files are read with `weights_only=True` and never
otherwise: such a file can hold code, and code in a weight file is not run.
"""

import json
import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from utils.errors import UserError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

# The limit of the safetensors library itself.
_MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_INDEX_GLOB = "*.safetensors.index.json"
SCALED_FP8_MARK = "scaled_fp8"
_WEIGHT_SCALE = ".scale_weight"
_SCALE_SUFFIXES = (_WEIGHT_SCALE, ".scale_input")
_DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_TORCH_DTYPE_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
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


class TensorSource(ABC):
    """Named tensors of one or more files. `shapes` and `dtypes` ("BF16", "F32", ...) come from headers."""

    files: tuple[Path, ...]
    shapes: dict[str, Shape]
    dtypes: dict[str, str]

    @abstractmethod
    def get(self, name: str) -> "torch.Tensor":
        """Read one tensor, on the CPU, in its stored dtype. It may be a view of the mapped file: do not write to it."""

    def metadata(self) -> dict[str, str]:
        """The `__metadata__` of a `.safetensors` file; nothing for other kinds."""
        return {}

    def stored_in_8_bits(self, name: str) -> "tuple[torch.Tensor, torch.Tensor] | None":
        """Values (float8) and scale [1, 1] of a tensor that is stored so; None for all others."""
        return None

    def location(self, name: str) -> tuple[Path, int, int] | None:
        """File, first byte and end of a tensor's plain bytes; None where only `get` can read it."""
        return None

    @abstractmethod
    def release(self) -> None:
        """Let go of the files' pages in memory; the next `get` opens them again."""

    def rows(self, name: str, start: int, end: int) -> "torch.Tensor":
        """Rows `start` to `end` (not included) of one tensor, as `get`; where the file allows it, only they are read."""
        return self.get(name)[start:end]

    def _check_name(self, name: str) -> None:
        if name not in self.shapes:
            raise UserError(f"{self.files[0]}: has no tensor {name!r}; it may belong to another model")


class RenamedSource(TensorSource):
    """Another source's tensors under other names; tensors that get no name are hidden."""

    def __init__(self, base: TensorSource, names: dict[str, str]) -> None:
        """Show `base` under the keys of `names`, whose values are the names in the file."""
        self._base = base
        self._names = names
        self.files = base.files
        self.shapes = {shown: base.shapes[stored] for shown, stored in names.items()}
        self.dtypes = {shown: base.dtypes[stored] for shown, stored in names.items()}

    def get(self, name: str) -> "torch.Tensor":
        """Read one tensor by its shown name."""
        self._check_name(name)
        return self._base.get(self._names[name])

    def metadata(self) -> dict[str, str]:
        """The metadata of the file behind."""
        return self._base.metadata()

    def stored_in_8_bits(self, name: str) -> "tuple[torch.Tensor, torch.Tensor] | None":
        """See `TensorSource`."""
        self._check_name(name)
        return self._base.stored_in_8_bits(self._names[name])

    def release(self) -> None:
        """See `TensorSource`."""
        self._base.release()

    def rows(self, name: str, start: int, end: int) -> "torch.Tensor":
        """See `TensorSource`."""
        self._check_name(name)
        return self._base.rows(self._names[name], start, end)


class ScaledSource(TensorSource):
    """A file whose linear weights are float8 with a scale beside each (ComfyUI's `fp8_scaled`), shown as plain weights.

    The mark `scaled_fp8` and the scales (`X.scale_weight`, and `X.scale_input`, which is for computing in 8 bits) are
    hidden; `get` multiplies.
    """

    def __init__(self, base: TensorSource) -> None:
        """Wrap a source that has the mark.

        Raises:
            UserError: a scale has no weight or is not one number, or a float8 weight has no scale.
        """
        self._base = base
        self.files = base.files
        hidden = {name for name in base.shapes if name == SCALED_FP8_MARK or name.endswith(_SCALE_SUFFIXES)}
        self._scale_of = {
            name.removesuffix(_WEIGHT_SCALE) + ".weight": name
            for name in hidden
            if name.endswith(_WEIGHT_SCALE)
        }
        self.shapes = {name: shape for name, shape in base.shapes.items() if name not in hidden}
        self.dtypes = {name: "F32" if name in self._scale_of else base.dtypes[name] for name in self.shapes}
        for weight, scale in self._scale_of.items():
            if weight not in self.shapes:
                raise UserError(f"{self.files[0]}: has {scale} but no {weight}; download it again")
            if math.prod(base.shapes[scale]) != 1:
                raise UserError(
                    f"{self.files[0]}: {scale} has the shape {list(base.shapes[scale])}, and only one scale per weight is "
                    "known here; give a bf16 or fp16 file"
                )
        bare = [
            name
            for name, dtype in self.dtypes.items()
            if dtype.startswith("F8") and name not in self._scale_of
        ]
        if bare:
            raise UserError(
                f"{self.files[0]}: is marked {SCALED_FP8_MARK}, but {bare[0]} is in 8 bits without a scale{_more(bare)}; "
                "give a bf16 or fp16 file"
            )

    def get(self, name: str) -> "torch.Tensor":
        """Read one tensor; a scaled one in float32, multiplied by its scale."""
        self._check_name(name)
        if name not in self._scale_of:
            return self._base.get(name)
        return self._base.get(name).float() * self._base.get(self._scale_of[name]).float()

    def metadata(self) -> dict[str, str]:
        """The metadata of the file behind."""
        return self._base.metadata()

    def stored_in_8_bits(self, name: str) -> "tuple[torch.Tensor, torch.Tensor] | None":
        """See `TensorSource`. Only of e4m3, which is the format that is computed with."""
        self._check_name(name)
        if name not in self._scale_of or self._base.dtypes[name] != "F8_E4M3":
            return None
        return self._base.get(name).clone(), self._base.get(self._scale_of[name]).float().reshape(1, 1)

    def release(self) -> None:
        """See `TensorSource`."""
        self._base.release()


class _SafetensorsSource(TensorSource):
    def __init__(self, headers: dict[Path, SafetensorsHeader]) -> None:
        self.files = tuple(headers)
        self.shapes, self.dtypes, self._metadata = {}, {}, dict[str, str]()
        self._file_of: dict[str, Path] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        self._handles: dict[Path, Any] = {}
        for path, header in headers.items():
            for name in header.shapes:
                if name in self._file_of:
                    raise UserError(
                        f"{path}: holds {name}, and so does {self._file_of[name]}; keep only one of the two files"
                    )
                self._file_of[name] = path
            self.shapes |= header.shapes
            self.dtypes |= header.dtypes
            self._spans |= header.spans
            self._metadata |= header.metadata

    def get(self, name: str) -> "torch.Tensor":
        return self._read(name, lambda handle: handle.get_tensor(name))

    def rows(self, name: str, start: int, end: int) -> "torch.Tensor":
        return self._read(name, lambda handle: handle.get_slice(name)[start:end])

    def _read(self, name: str, read: "Callable[[Any], torch.Tensor]") -> "torch.Tensor":
        from safetensors import SafetensorError, safe_open

        self._check_name(name)
        path = self._file_of[name]
        try:
            if path not in self._handles:
                self._handles[path] = safe_open(path, framework="pt", device="cpu")
            return read(self._handles[path])
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: {name} cannot be read ({_first_line(error)}); download or copy it again"
            ) from error

    def metadata(self) -> dict[str, str]:
        return dict(self._metadata)

    def location(self, name: str) -> tuple[Path, int, int]:
        self._check_name(name)
        return self._file_of[name], *self._spans[name]

    def release(self) -> None:
        self._handles.clear()


class _PthSource(TensorSource):
    def __init__(self, path: Path, tensors: dict[str, "torch.Tensor"]) -> None:
        self.files = (path,)
        self._tensors: dict[str, torch.Tensor] | None = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: dtype_name(tensor) for name, tensor in tensors.items()}

    def get(self, name: str) -> "torch.Tensor":
        self._check_name(name)
        if self._tensors is None:
            self._tensors = _load_pth(self.files[0])
        return self._tensors[name]

    def release(self) -> None:
        self._tensors = None


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of a `.safetensors` file: 8 bytes of length, JSON, then the data.

    Raises:
        UserError: the file is missing, truncated, or its header is not one.
    """
    path = Path(path)
    size = _file_size(path)
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


def open_safetensors(paths: Iterable[Path]) -> TensorSource:
    """Open one or more `.safetensors` files as one source. Reads headers only.

    Raises:
        UserError: a file is missing, truncated or damaged, or two files hold the same tensor.
    """
    return _SafetensorsSource({Path(path): read_safetensors_header(path) for path in paths})


def open_sharded(directory: Path) -> TensorSource:
    """Open a directory with `*.safetensors.index.json` and its shards, or with a single `.safetensors` file, or that file.

    Raises:
        UserError: no such files, several indices, a shard is missing, truncated or damaged, or index and shards disagree.
    """
    directory = Path(directory)
    if directory.is_file():
        return open_safetensors([directory])
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; check the path")
    indices = sorted(directory.glob(_INDEX_GLOB))
    if len(indices) > 1:
        raise UserError(
            f"{directory}: has several indices ({', '.join(p.name for p in indices)}); keep only one"
        )
    if not indices:
        files = sorted(directory.glob("*.safetensors"))
        if len(files) == 1:
            return open_safetensors(files)
        found = f"{len(files)} .safetensors files and no index" if files else "no .safetensors files"
        raise UserError(f"{directory}: holds {found} ({_INDEX_GLOB}); download the whole directory again")
    weight_map = _read_index(indices[0])
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (directory / shard).is_file()]
    if absent:
        raise UserError(
            f"{directory / absent[0]}: missing, but {indices[0].name} names it{_more(absent)}; download it again"
        )
    source = open_safetensors(directory / shard for shard in shards)
    _check_index(indices[0], weight_map, source)
    return source


def open_pth(path: Path) -> TensorSource:
    """Open a PyTorch `.pth` file that holds one dictionary of tensors. The data stay on disk until they are used.

    Raises:
        UserError: the file is missing, truncated, damaged, holds code, or is not a dictionary of tensors.
    """
    path = Path(path)
    _file_size(path)
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path}: truncated or not a PyTorch file (its zip directory is missing); download or copy it again"
        )
    return _PthSource(path, _load_pth(path))


def open_weights(path: Path) -> TensorSource:
    """Open a weight file by its suffix: `.safetensors`, `.pth` or `.pt`.

    Raises:
        UserError: as `open_safetensors` and `open_pth`, or the suffix is another one.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return open_safetensors([path])
    if path.suffix in (".pth", ".pt"):
        return open_pth(path)
    raise UserError(f"{path}: not a weight file that can be read here; give a .safetensors or .pth file")


def _load_pth(path: Path) -> dict[str, "torch.Tensor"]:
    import pickle

    import torch

    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, it holds more than plain tensors, and code in a weight file is never run "
            f"({_first_line(error)}); get it from its publisher, or as .safetensors"
        ) from None
    except Exception as error:  # damaged bytes make the reader fail in many ways, all with the same remedy
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {_first_line(error)}); download or copy it again"
        ) from error
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(
            f"{path}: holds a {type(loaded).__name__} and not a dictionary of tensors; it is not a weight file"
        )
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(
                f"{path}: its entry {name!r} is a {type(value).__name__} and not a tensor; give the file of the model's weights alone"
            )
    return loaded


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
    if dtype not in _DTYPE_BITS:
        raise UserError(
            f"{path}: {name!r} has the unknown dtype {dtype!r}; update the safetensors library or convert the file"
        )
    if offsets[1] - offsets[0] != -(-math.prod(shape) * _DTYPE_BITS[dtype] // 8):
        raise damaged
    return tuple(shape), dtype, (offsets[0], offsets[1])


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _read_index(path: Path) -> dict[str, str]:
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


def _check_index(index: Path, weight_map: dict[str, str], source: TensorSource) -> None:
    missing = [name for name in weight_map if name not in source.shapes]
    if missing:
        shard = index.parent / weight_map[missing[0]]
        raise UserError(
            f"{shard}: {index.name} promises {missing[0]} in it, which is not there{_more(missing)}; download both again"
        )
    unlisted = [name for name in source.shapes if name not in weight_map]
    if unlisted:
        raise UserError(
            f"{index}: does not list {unlisted[0]}, which is in the shards{_more(unlisted)}; download both again"
        )


def _file_size(path: Path) -> int:
    if path.is_dir():
        raise UserError(f"{path}: is a directory; give the weight file in it")
    try:
        with path.open("rb"):
            return path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its rights") from None


def dtype_name(tensor: "torch.Tensor") -> str:
    """The tensor's dtype as safetensors spells it, such as "BF16"."""
    name = str(tensor.dtype).removeprefix("torch.")
    return _TORCH_DTYPE_NAMES.get(name, name.upper())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no details"])[0]


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
