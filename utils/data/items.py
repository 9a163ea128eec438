"""One item of the cache as bytes: a whole safetensors file, read back without copying a tensor."""

import json
import math
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch

_LENGTH_BYTES = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def encode_item(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """Tensors, on any device and of any strides, and text about them."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, dict(metadata))


def decode_tensors(payload: memoryview) -> dict[str, torch.Tensor]:
    """The tensors, as views of `payload`, which must be writable (a private mapping is).

    Raises:
        ValueError: not a safetensors file, or of a kind that `encode_item` does not write.
    """
    header, start = _read_header(payload)
    tensors = {}
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = _DTYPES.get(facts["dtype"]), facts["shape"]
        begin, end = facts["data_offsets"]
        if dtype is None or end - begin != math.prod(shape) * dtype.itemsize or start + end > len(payload):
            raise ValueError(f"its tensor {name!r} is not described rightly")
        if begin == end:
            tensors[name] = torch.empty(shape, dtype=dtype)
        else:
            flat = torch.frombuffer(payload, dtype=dtype, count=math.prod(shape), offset=start + begin)
            tensors[name] = flat.reshape(shape)
    return tensors


def decode_metadata(payload: memoryview) -> dict[str, str]:
    """The text that was written with the tensors.

    Raises:
        ValueError: not a safetensors file.
    """
    return dict(_read_header(payload)[0].get("__metadata__", {}))


def _read_header(payload: memoryview) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    length = int.from_bytes(payload[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + length
    if len(payload) < _LENGTH_BYTES or start > len(payload):
        raise ValueError("it is not a whole safetensors file")
    header = json.loads(bytes(payload[_LENGTH_BYTES:start]))
    if not isinstance(header, dict):
        raise ValueError("its header is not a list of tensors")
    return header, start
