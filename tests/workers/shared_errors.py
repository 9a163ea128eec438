"""Two processes in which one has trouble: run by tests/utils/test_distributed.py under the real launcher."""

import sys
import time

import torch.distributed as dist

from utils.cli import end_process, run_command
from utils.distributed import Processes, gather_objects, on_every_rank, on_main, process_group
from utils.errors import UserError


def body(case: str) -> int:
    try:
        with process_group(timeout_minutes=1) as processes:
            run_case(case, processes)
    except UserError:
        if case == "late" and processes.is_main:
            time.sleep(2)
        raise
    return 0


def run_case(case: str, processes: Processes) -> None:
    def fail_on(rank: int) -> str:
        if processes.rank == rank:
            raise UserError(f"disk of rank {rank} is full")
        return "fine"

    if case == "fine":
        assert on_main(lambda: {"from": processes.rank}) == {"from": 0}
        assert on_every_rank(lambda: processes.rank) == processes.rank
        assert gather_objects(processes.rank) == list(range(processes.world_size))
        dist.barrier()
    if case == "main":
        on_main(lambda: fail_on(0))
    if case in ("other", "late"):
        on_every_rank(lambda: fail_on(1))
    if case == "alone" and processes.rank == 1:
        raise UserError("only rank 1 knows")


if __name__ == "__main__":
    end_process(run_command(lambda: body(sys.argv[1]), debug=False))
