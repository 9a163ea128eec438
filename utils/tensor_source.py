"""Named tensors in weight files, read by header and by slice.

Opening a source reads headers only (`utils.safetensors_header`), so that tools that need no values need no torch; `get` reads
one tensor. `.pth` files are read with `weights_only=True` and never
otherwise: such a file can hold code, and code in a weight file is not run.
"""

import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.safetensors_header import SafetensorsHeader, Shape, file_size, read_index, read_safetensors_header

if TYPE_CHECKING:
    import torch

_INDEX_GLOB = "*.safetensors.index.json"
# How torch names what it refuses to load from a `.pth`.
_FORBIDDEN = re.compile(r"GLOBAL ([\w.]+) was not an allowed global")
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

    def location(self, name: str) -> tuple[Path, int, int] | None:
        """See `TensorSource`."""
        self._check_name(name)
        return self._base.location(self._names[name])

    def release(self) -> None:
        """See `TensorSource`."""
        self._base.release()

    def rows(self, name: str, start: int, end: int) -> "torch.Tensor":
        """See `TensorSource`."""
        self._check_name(name)
        return self._base.rows(self._names[name], start, end)


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
    weight_map = read_index(indices[0])
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (directory / shard).is_file()]
    if absent:
        raise UserError(
            f"{directory / absent[0]}: missing, but {indices[0].name} names it{more_names(absent)}; download it again"
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
    file_size(path)
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
        # torch's own words advise to switch its safety off, so nothing of them is shown but what stands in the file.
        found = _FORBIDDEN.search(str(error))
        what = f" ({found[1]})" if found else ""
        raise UserError(
            f"{path}: refused, it holds more than plain tensors{what}, and code in a weight file is never run; get it from its "
            "publisher, or as .safetensors"
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


def _check_index(index: Path, weight_map: dict[str, str], source: TensorSource) -> None:
    missing = [name for name in weight_map if name not in source.shapes]
    if missing:
        shard = index.parent / weight_map[missing[0]]
        raise UserError(
            f"{shard}: {index.name} promises {missing[0]} in it, which is not there{more_names(missing)}; download both again"
        )
    unlisted = [name for name in source.shapes if name not in weight_map]
    if unlisted:
        raise UserError(
            f"{index}: does not list {unlisted[0]}, which is in the shards{more_names(unlisted)}; download both again"
        )


def dtype_name(tensor: "torch.Tensor") -> str:
    """The tensor's dtype as safetensors spells it, such as "BF16"."""
    name = str(tensor.dtype).removeprefix("torch.")
    return _TORCH_DTYPE_NAMES.get(name, name.upper())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no details"])[0]


def more_names(names: list[str]) -> str:
    """How many names there are besides the first: ` (and 2 more)`, or nothing."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
