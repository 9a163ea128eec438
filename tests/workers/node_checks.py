"""Two processes that compare inputs and places: run by tests/utils/test_nodes.py under the real launcher."""

import sys
from pathlib import Path

from utils import nodes
from utils.cli import end_process, run_command
from utils.distributed import process_group


def body(case: str, root: Path) -> int:
    nodes._WAIT_SECONDS = 0.5
    with process_group(timeout_minutes=1) as processes:
        own = root / str(processes.rank)
        own.mkdir(exist_ok=True)
        if case == "fine":
            nodes.check_same_inputs({"the configuration": "a", "the DiT": "b"}, processes)
            nodes.check_shared({"the cache": root / "new" / "cache", "more": root}, processes)
            nodes.check_seen({"the run": Path(__file__)}, processes)
        if case == "inputs":
            nodes.check_same_inputs({"the configuration": "a", "the DiT": str(processes.rank)}, processes)
        if case == "shared":
            nodes.check_shared({"the first": root, f"the cache {own}": own}, processes)
        if case == "seen":
            nodes.check_seen(
                {"the run directory": Path(__file__) if processes.rank == 0 else own / "x"}, processes
            )
    return 0


if __name__ == "__main__":
    end_process(run_command(lambda: body(sys.argv[1], Path(sys.argv[2])), debug=False))
