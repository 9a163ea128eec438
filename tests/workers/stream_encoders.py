"""Run two encoders block by block and print by how many bytes the peak of this process's memory lies above the start."""

import re
import sys
from pathlib import Path

import torch

from models.wan.probes.encoder_stream import open_encoder_pair, stream_states


def status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def main() -> None:
    # Everything that is imported late is there before the start is measured.
    from models.wan.component_shapes import Umt5Sizes
    from models.wan.text_encoder import build_umt5_block, umt5_config

    build_umt5_block(umt5_config(Umt5Sizes(8, 8, 2, 4, 8, 1, 32)), 0)(
        torch.ones(1, 2, 8), torch.zeros(1, 1, 1, 2)
    )
    pair = open_encoder_pair(Path(sys.argv[1]), Path(sys.argv[2]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    start = status("VmRSS")
    stream_states(pair, [[3, 4, 1], [5, 1]], torch.float32, torch.device("cpu"), lambda layer: None)
    print(status("VmHWM") - start)


main()
