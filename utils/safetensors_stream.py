"""Writing a `.safetensors` file tensor by tensor: the header first, then each tensor's bytes as it comes."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from utils.safetensors_header import Shape, tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor

_ALIGNMENT = 8


def safetensors_header(
    shapes: Mapping[str, Shape], dtypes: Mapping[str, str], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, int]:
    """The first bytes of a file that holds these tensors in this order, and how many bytes of data follow.

    Args:
        shapes: by tensor name.
        dtypes: by tensor name, as safetensors spells them ("BF16").
        metadata: goes into `__metadata__`.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + tensor_bytes(shape, dtypes[name])
        header[name] = {"dtype": dtypes[name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, end


class SafetensorsStream:
    """A file that is being written; one tensor is in memory at a time."""

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, Shape],
        dtypes: Mapping[str, str],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Begin the file. Who calls sees to it that nobody reads it before it is whole."""
        self._path = Path(path)
        self._expected = [(name, tuple(shape), dtypes[name]) for name, shape in shapes.items()]
        self._next = 0
        header, _ = safetensors_header(shapes, dtypes, metadata)
        self._file: BinaryIO = self._path.open("wb")
        self._file.write(header)

    def write(self, name: str, tensor: "Tensor") -> None:
        """Append the next tensor.

        Raises:
            ValueError: it is not the next one of the header, or has another shape or dtype.
        """
        import torch

        from utils.tensor_source import dtype_name

        found = (name, tuple(tensor.shape), dtype_name(tensor))
        if self._next >= len(self._expected) or found != self._expected[self._next]:
            expected = self._expected[self._next] if self._next < len(self._expected) else "the end"
            raise ValueError(f"{self._path}: {found} comes where {expected} should")
        self._next += 1
        flat = tensor.detach().contiguous().reshape(-1)
        if flat.numel():
            self._file.write(flat.view(torch.uint8).numpy().data)

    def __enter__(self) -> "SafetensorsStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._next < len(self._expected):
            raise ValueError(f"{self._path}: {self._expected[self._next][0]} was not written")
