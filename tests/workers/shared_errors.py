"""Two processes in which one has trouble: run by tests/utils/test_distributed.py under the real launcher."""

import sys

import torch.distributed as dist

from utils.cli import run_command
from utils.distributed import gather_objects, init_processes, on_every_rank, on_main
from utils.errors import UserError


def body(case: str) -> int:
    processes = init_processes(timeout_minutes=1)

    def fail_on(rank: int) -> str:
        if processes.rank == rank:
            raise UserError(f"disk of rank {rank} is full")
        return "fine"

    if case == "fine":
        assert on_main(lambda: {"from": processes.rank}) == {"from": 0}
        assert on_every_rank(lambda: processes.rank) == processes.rank
        assert gather_objects(processes.rank) == list(range(processes.world_size))
        dist.barrier()
        return 0
    if case == "main":
        on_main(lambda: fail_on(0))
    if case == "other":
        on_every_rank(lambda: fail_on(1))
    if case == "alone" and processes.rank == 1:
        raise UserError("only rank 1 knows")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: body(sys.argv[1]), debug=False))
