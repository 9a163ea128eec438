"""`.safetensors` files with a real header and no data on disk: what reads headers alone cannot tell them from real ones.

For tests and benchmarks at the real size: 28 GB of weights become a file of a few kilobytes, whose values read as 0.
"""

from collections.abc import Mapping
from pathlib import Path

from utils.safetensors_stream import safetensors_header
from utils.tensor_source import Shape


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
