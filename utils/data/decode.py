"""Decoding ahead: while one clip is encoded, worker processes decode the next ones. The order is kept.

Workers know neither torch nor the model: they send uint8 frames, and `media.scale_frames` does the rest. They are
spawned, not forked, because the parent holds a GPU and the threads of its process group.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from utils.data.buckets import MediaRules
from utils.data.media import ClipSource, load_frames
from utils.errors import UserError
from utils.files import content_hash

# Starting a worker takes some tenths of a second: for fewer clips each, none is started.
MIN_CLIPS_PER_WORKER = 8
# A worker holds one decoded clip, which is seconds of encoding; a few are enough to keep an encoder busy.
MAX_AUTOMATIC_WORKERS = 4
_SECONDS_TO_END = 5.0

_FRAMES, _BAD_CLIP, _USER_ERROR, _FAILURE = "frames", "bad clip", "user error", "failure"


@dataclass(frozen=True)
class ClipJob:
    """A clip to decode: of which sample, to which rules, and what its file must still hold.

    Attributes:
        record: the sample.
        rules: of the model's variant.
        content_hash: of the file when it was scanned; None: not compared.
        mtime_ns: its time stamp then: as long as it is the same, the content is not read again to compare it.
    """

    record: ClipSource
    rules: MediaRules
    content_hash: str | None = None
    mtime_ns: int | None = None


def automatic_workers(local_world_size: int) -> int:
    """How many workers a process starts if nothing else is said: its share of the cores, less one for itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(MAX_AUTOMATIC_WORKERS, cores // max(local_world_size, 1) - 1))


@contextmanager
def decoded_clips(jobs: Sequence[ClipJob], num_workers: int) -> Iterator[Iterator[np.ndarray | UserError]]:
    """Decode `jobs` in order, ahead of who asks, for as long as the body runs.

    Memory: one clip of uint8 frames per worker, and the one that was asked for. With 0 workers, or too few clips to
    pay for starting one, each is decoded when it is asked for.

    Yields:
        An iterator over `media.load_frames` of each job; where a file cannot be decoded, over the error instead.

    Raises:
        UserError: (from the iterator, at the clip it belongs to) the file is not what its hash says, or the worker
            was killed while it decoded it.
    """
    num_workers = min(num_workers, len(jobs) // MIN_CLIPS_PER_WORKER)
    if num_workers <= 0:
        yield map(_decode, jobs)
        return
    workers: list[_Worker] = []
    try:
        for _ in range(num_workers):
            workers.append(_Worker())
        yield _in_order(jobs, workers)
    finally:
        for worker in workers:
            worker.end()
        for worker in workers:
            worker.wait_for_end()


def _in_order(jobs: Sequence[ClipJob], workers: Sequence["_Worker"]) -> Iterator[np.ndarray | UserError]:
    """Worker k decodes jobs k, k + N, ...: each is always one clip ahead, and the order needs no bookkeeping."""
    count = len(workers)
    for index, job in enumerate(jobs[:count]):
        workers[index].ask(job)
    for index, job in enumerate(jobs):
        worker = workers[index % count]
        decoded = worker.receive(job)
        if index + count < len(jobs):
            worker.ask(jobs[index + count])
        yield decoded


class _Worker:
    """The parent's side of a worker process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        # A pipe, and not shared memory: containers often have 64 MB of that, less than one long clip.
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_serve, args=(theirs,), daemon=True, name="decode worker"
        )
        # Ctrl-C reaches every process of a terminal. The child inherits the mask, so it never sees it: we end it.
        # Python's tracker of resources is started first, because starting it takes the mask away again.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def ask(self, job: ClipJob) -> None:
        """Let the worker decode a clip; it must have been asked for no other that was not received."""
        # A worker that has died is told of where its answer is read, with the clip that it died of.
        try:
            self._connection.send(job)
        except OSError:
            return

    def receive(self, job: ClipJob) -> np.ndarray | UserError:
        """The answer to `ask`: frames, or why they cannot be had; raises what else the worker raised."""
        try:
            kind, content = self._connection.recv()
            if kind == _FRAMES:
                frames_FHWC = np.empty(content, dtype=np.uint8)
                _read_into(self._connection.fileno(), frames_FHWC.data.cast("B"))
                return frames_FHWC
        except (EOFError, OSError) as error:
            raise self._death(job.record.path) from error
        if kind == _BAD_CLIP:
            return UserError(content)
        if kind == _USER_ERROR:
            raise UserError(content)
        raise RuntimeError(f"{job.record.path}: decoding failed in a worker process\n{content}")

    def _death(self, path: Path) -> UserError:
        self._process.join(_SECONDS_TO_END)
        code = self._process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        return UserError(
            f"{path}: the process that decoded it has died ({how}). Signal 9 mostly means that memory ran out: set "
            "decode_workers lower, 0 for none; otherwise the file may be damaged in a way that its decoder does not "
            "survive: take it out of the dataset"
        )

    def end(self) -> None:
        """Ask the worker to end, at once where it still decodes."""
        self._connection.close()
        self._process.terminate()

    def wait_for_end(self) -> None:
        """Wait until it has ended."""
        self._process.join(_SECONDS_TO_END)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _serve(connection: Connection) -> None:
    """The worker: decode what it is asked for until the parent closes the pipe or is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            job = connection.recv()
            kind, content, frames_FHWC = _answer(job)
            connection.send((kind, content))
            if frames_FHWC is not None:
                _write_all(connection.fileno(), frames_FHWC.data.cast("B"))
    except (EOFError, OSError):
        return


def _answer(job: ClipJob) -> tuple[str, object, np.ndarray | None]:
    try:
        decoded = _decode(job)
    except UserError as error:
        return _USER_ERROR, str(error), None
    except Exception:  # told to the parent, which raises
        return _FAILURE, traceback.format_exc(), None
    if isinstance(decoded, UserError):
        return _BAD_CLIP, str(decoded), None
    return _FRAMES, decoded.shape, decoded


def _write_all(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _read_into(descriptor: int, target: memoryview) -> None:
    """Fill `target`. Several times faster than `Connection.recv_bytes_into`, which copies what it has read twice."""
    while target:
        count = os.readv(descriptor, [target])
        if count == 0:
            raise EOFError
        target = target[count:]


def _end_with_parent() -> None:
    """A parent that was killed can end nobody: wait for its death, and go at once, whatever is being decoded."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os._exit(1)


def _decode(job: ClipJob) -> np.ndarray | UserError:
    path = job.record.path
    before = _time_stamp(path)
    try:
        frames_FHWC = load_frames(job.record, job.rules)
    except UserError as error:
        return error
    after = _time_stamp(path)
    is_unchanged = job.mtime_ns is not None and before == after == job.mtime_ns
    if job.content_hash is not None and not is_unchanged and _hash_once(path, after) != job.content_hash:
        raise UserError(
            f"{path}: its content is not what it was when the dataset was scanned, or, with --trust_cache, when it was "
            "last read; run the same command again, without --trust_cache"
        )
    return frames_FHWC


def _time_stamp(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None  # gone: decoding says so


@cache
def _hash_once(path: Path, mtime_ns: int | None) -> str:
    """Hash of a file; of several clips of one video only the first in a process reads it for that."""
    return content_hash(path)
