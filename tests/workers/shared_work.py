"""Two processes that fill and train together: run by tests/utils/test_shared_progress.py under the real launcher."""

import sys
import threading
import time
from pathlib import Path

from tests.utils.test_trainer import WatchedModel, make_config, train
from utils.cli import end_process, run_command
from utils.distributed import Processes, num_processes_here, on_every_rank, process_group
from utils.errors import UserError
from utils.run_dir import RunDir
from utils.shared_progress import SharedProgress


def body(root: Path) -> int:
    with process_group(timeout_minutes=1) as processes:
        assert num_processes_here() == 2
        fill(processes, "clips", 3)
        fill(processes, "nothing", 0)
        fail_on_one(processes)
        read_ahead(processes, root)
    return 0


def fill(processes: Processes, what: str, own: int) -> None:
    """Rank 1 has three times as much to do as rank 0, and goes on when rank 0 has done its share."""
    count = own * (1 + 2 * processes.rank)

    def work() -> None:
        progress.report(0, count)
        for done in range(1, count + 1):
            time.sleep(0.3 * processes.rank)
            progress.report(done, count)

    with SharedProgress(f"caching {what}", processes) as progress:
        on_every_rank(work)
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def fail_on_one(processes: Processes) -> None:
    def work() -> None:
        progress.report(0, 2)
        if processes.rank == 1:
            raise UserError("clip.mp4 is damaged")
        progress.report(2, 2)

    try:
        with SharedProgress("caching more", processes) as progress:
            on_every_rank(work)
    except UserError as error:
        print(f"rank {processes.rank}: {error}", flush=True)


def read_ahead(processes: Processes, root: Path) -> None:
    """Rank 1 cannot read its share of step 3; both stop there, with step 2 done."""
    model = WatchedModel(fails_at=3 if processes.rank == 1 else None)
    config = make_config(gradient_accumulation_steps=1, checkpoint_every_n_steps=1)
    try:
        train(config, model, processes, RunDir(root))
    except UserError as error:
        print(f"rank {processes.rank}: {error}; {len(model.asked)} micro-batches were asked for", flush=True)


if __name__ == "__main__":
    end_process(run_command(lambda: body(Path(sys.argv[1])), debug=True))
