"""Writing checkpoints in the background: a step waits for the copy to host memory, the disk works while training goes on.

Each process copies its share and hands it to a thread, which writes and syncs it. At each step boundary the processes
learn from a collective that runs anyway whether all shares are on disk; then rank 0's thread writes `loop.json`,
renames the directory and replaces `latest`. So nothing is named before every stage is done, whatever dies when.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from utils.checkpoint import (
    LATEST,
    LOOP_FILE,
    LoopState,
    Share,
    checkpoint_name,
    complete_checkpoints,
    loop_document,
    share_of,
)
from utils.distributed import gather_objects, on_every_rank, on_main
from utils.errors import UserError
from utils.files import (
    TEMPORARY_SUFFIX,
    atomic_write_text,
    disk_errors_as_user_errors,
    fsync_directory,
    fsync_file,
    give_usual_mode,
)
from utils.pipeline import Pipeline
from utils.saver import rename_into_place

# For headers and the plain numbers of each file, and for the file system's own books.
_SPARE_BYTES = 1 << 20


class SaveTimes(NamedTuple):
    """How long a save held training up, and how much of that was the copy to host memory, in seconds."""

    stall: float
    copy: float


class WriteFlags(NamedTuple):
    """What one process says about the write in flight; summed over all, what `CheckpointWriter.advance` wants."""

    done: int
    failed: int


class HostBuffers:
    """Host memory that tensors are copied into, kept from save to save; pinned where the tensor is on a GPU.

    The buffers stay as long as this object: as much host memory as the process's share of a checkpoint.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now, in host memory. The next call overwrites them."""
        copies = {}
        for name, tensor in tensors.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = self._buffers[name] = _host_buffer(tensor)
            copies[name] = buffer.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return copies


def _host_buffer(tensor: Tensor) -> Tensor:
    if tensor.is_cuda:
        try:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        except RuntimeError:
            pass  # no more memory may be pinned; other memory is slower to copy to, and does as well
    return torch.empty(tensor.shape, dtype=tensor.dtype)


@dataclass
class _Job:
    """A checkpoint that is being written."""

    target: Path
    temporary: Path
    document: str
    then: Callable[[], None]
    share: "Future[None]"
    is_publishing: bool = False
    publication: "Future[None] | None" = None

    @property
    def current(self) -> "Future[None] | None":
        """What this process's thread works at now; None where another process's turn it is."""
        return self.publication if self.is_publishing else self.share


class CheckpointWriter:
    """Writes checkpoints of one run, one at a time. Every rank makes its calls in the same order."""

    def __init__(self, run_dir: Path, pipeline: Pipeline, keep: int) -> None:
        """For a run's directory; after each checkpoint all but the newest `keep` are removed."""
        self._run_dir = run_dir
        self._pipeline = pipeline
        self._keep = keep
        self._buffers = HostBuffers()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._job: _Job | None = None

    def save(self, state: LoopState, then: Callable[[], None] = lambda: None) -> SaveTimes:
        """Begin a checkpoint; the one before it is finished first. Every rank must call it.

        Args:
            state: of the loop, after the step that was just done.
            then: called on rank 0 when the checkpoint is in place, in another thread.

        Raises:
            UserError: the disk has no room for it, or the one before failed; earlier checkpoints and `latest` are
                untouched.
        """
        started = time.perf_counter()
        self.finish()
        target = self._run_dir / checkpoint_name(state.step)
        temporary = target.with_name(f".{target.name}{TEMPORARY_SUFFIX}")
        share = share_of(self._pipeline)
        shares = gather_objects(None if share is None else (share.stem, share.num_bytes))
        stems = sorted(found[0] for found in shares if found is not None)
        num_bytes = sum(found[1] for found in shares if found is not None)
        on_main(lambda: _make_room(target, temporary, num_bytes + _SPARE_BYTES * (len(stems) + 1)))
        copy_started = time.perf_counter()
        copied = (
            None if share is None else Share(share.stem, self._buffers.copy(share.tensors), share.numbers)
        )
        now = time.perf_counter()
        self._job = _Job(
            target,
            temporary,
            loop_document(state, self._pipeline.num_stages, stems),
            then,
            self._thread.submit(_write_share, temporary, target, copied),
        )
        return SaveTimes(stall=now - started, copy=now - copy_started)

    def flags(self) -> WriteFlags:
        """Whether this process has done its part of what is in flight, and whether that failed."""
        current = None if self._job is None else self._job.current
        if current is None:
            return WriteFlags(done=1, failed=0)
        failed = current.done() and current.exception() is not None
        return WriteFlags(done=int(current.done()), failed=int(failed))

    def advance(self, total: WriteFlags) -> None:
        """Go on with what is in flight, given every rank's `flags` added up. Every rank must call it.

        Raises:
            UserError: a write failed, on every rank.
        """
        if self._job is None:
            return
        if total.failed:
            self.finish()
        elif total.done == dist.get_world_size():
            if self._job.is_publishing:
                self._job = None
            else:
                self._begin_publishing(self._job)

    def finish(self) -> None:
        """Wait until what is in flight is in place. Every rank must call it.

        Raises:
            UserError: it cannot be written, on every rank; nothing of it is left.
        """
        job = self._job
        if job is None:
            return
        try:
            if not job.is_publishing:
                on_every_rank(job.share.result)
                self._begin_publishing(job)
            on_main(lambda: job.publication.result() if job.publication is not None else None)
        except UserError:
            if dist.get_rank() == 0:
                shutil.rmtree(job.temporary, ignore_errors=True)
            raise
        finally:
            self._job = None

    def _begin_publishing(self, job: _Job) -> None:
        job.is_publishing = True
        if dist.get_rank() == 0:
            job.publication = self._thread.submit(_publish, self._run_dir, job, self._keep)


def _make_room(target: Path, temporary: Path, num_bytes: int) -> None:
    """Check that the disk has room, and make the directory to write in."""
    with disk_errors_as_user_errors(target):
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
        free = shutil.disk_usage(target.parent).free
        if free < num_bytes:
            raise UserError(
                f"{target}: the disk is full: the checkpoint needs {_size(num_bytes)}, and {target.parent} has "
                f"{_size(free)} free. Earlier checkpoints are untouched; free some space and continue with "
                "--resume_from_checkpoint"
            )
        temporary.mkdir(parents=True)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"


@contextmanager
def _errors_as_user_errors(target: Path) -> Iterator[None]:
    """All that a disk can answer becomes a UserError, which every rank gets to see."""
    try:
        with disk_errors_as_user_errors(target):
            yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{target}: could not be written: {error}. Earlier checkpoints are untouched; mend that and continue with "
            "--resume_from_checkpoint"
        ) from error


def _write_share(temporary: Path, target: Path, share: Share | None) -> None:
    """Write this process's files and sync them; its own, because only its machine's cache holds them."""
    if share is None:
        return
    with _errors_as_user_errors(target):
        tensors, numbers = (temporary / f"{share.stem}{suffix}" for suffix in (".safetensors", ".json"))
        save_file(share.tensors, tensors)
        numbers.write_text(json.dumps(share.numbers, indent=1) + "\n", encoding="utf-8")
        for path in (tensors, numbers):
            give_usual_mode(path)
            fsync_file(path)


def _publish(run_dir: Path, job: _Job, keep: int) -> None:
    """Every share is on disk: name the checkpoint, point `latest` at it, remove what is too old."""
    with _errors_as_user_errors(job.target):
        loop = job.temporary / LOOP_FILE
        loop.write_text(job.document, encoding="utf-8")
        give_usual_mode(loop)
        fsync_file(loop)
        fsync_directory(job.temporary)
        rename_into_place(job.temporary, job.target)
        atomic_write_text(run_dir / LATEST, job.target.name + "\n")
        others = [path for path in complete_checkpoints(run_dir) if path != job.target]
        for old in others[: max(0, len(others) + 1 - keep)]:
            # Out of sight first: a directory that is half removed must not look like a checkpoint.
            hidden = old.with_name(f".{old.name}.old{TEMPORARY_SUFFIX}")
            old.rename(hidden)
            shutil.rmtree(hidden)
        job.then()
