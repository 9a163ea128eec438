"""Runs several trainings one after the other in one process group: starting is dearer than a few tiny steps.

Reads jobs from a JSON file and runs each as `train.py` would. A job is the words behind `train.py`, and perhaps an output
directory to copy first, the step after which somebody asks the run to save and quit, or the step whose checkpoint the last
rank finds no room for. Exit status: 0 where each job ends as it should.
"""

import gc
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import train
from utils import checkpoint_writer, distributed
from utils.checkpoint import checkpoint_name
from utils.cli import end_process, run_command
from utils.metrics import MetricsWriter
from utils.stopping import SAVE_AND_QUIT_FILE


def main() -> int:
    jobs = Path(sys.argv[1])
    torch.set_num_threads(1)
    processes = distributed.init_processes(timeout_minutes=2)

    @contextmanager
    def the_same_group(timeout_minutes: float) -> Iterator[distributed.Processes]:
        yield processes

    distributed.process_group = the_same_group
    gc.freeze()
    statuses = []
    for job in json.loads(jobs.read_text()):
        arguments = train.parse_arguments(job["words"])
        if job["copy_from"] is not None:
            distributed.on_main(lambda job=job: shutil.copytree(job["copy_from"], job["out"]))
        is_last = processes.rank == processes.world_size - 1
        full_at = job["disk_full_at"] if is_last else None
        with asked_to_quit(job["quit_after"]), disk_full(full_at):
            status = run_command(lambda arguments=arguments: train.train(arguments), debug=False)
        statuses.append(status == (0 if job["disk_full_at"] is None else 2))
    return 0 if all(statuses) else 1


@contextmanager
def disk_full(step: int | None) -> Iterator[None]:
    """Let this process find no room for the tensors of one checkpoint."""
    save = checkpoint_writer.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if step is not None and checkpoint_name(step) in path.parent.name:
            raise OSError(28, "No space left on device")
        save(tensors, path)

    checkpoint_writer.save_file = full  # type: ignore[assignment]
    try:
        yield
    finally:
        checkpoint_writer.save_file = save


@contextmanager
def asked_to_quit(after: int | None) -> Iterator[None]:
    """Make the file `save_quit` while step `after` is on its way: when the step before it has been written down."""
    write = MetricsWriter.write

    def write_and_ask(writer: MetricsWriter, row: dict[str, Any]) -> None:
        write(writer, row)
        if after is not None and row["step"] == after - 1:
            (writer._path.parent / SAVE_AND_QUIT_FILE).touch()

    MetricsWriter.write = write_and_ask  # type: ignore[method-assign]
    try:
        yield
    finally:
        MetricsWriter.write = write  # type: ignore[method-assign]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    end_process(main())
