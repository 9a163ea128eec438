"""`.safetensors` files with a real header and no data on disk: what reads headers alone cannot tell them from real ones.

For tests and benchmarks at the real size: 28 GB of weights become a file of a few kilobytes, whose values read as 0.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from utils.tensor_source import Shape

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I64": 8}
_ALIGNMENT = 8


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
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        dtype = dtypes if isinstance(dtypes, str) else dtypes[name]
        start, end = end, end + math.prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end
