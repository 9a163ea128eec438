"""Processes: how this one learns its rank, how the group starts, and small collectives of plain objects."""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout

from utils.errors import TrainingStoppedError, UserError
from utils.peers import PeerWatch, watch_peers

T = TypeVar("T")
_own_environment: list[str] = []
_has_joined: list[bool] = []
# Objects travel over gloo also where tensors use nccl: no GPU is kept busy, and a peer that dies is noticed at once.
_object_group: list[Any] = []
# Outlives the group: a launcher ends all processes when the first one has failed, so that one must not be too early.
_store: list[Any] = []
_TOLD = "told"
_PATIENCE = timedelta(seconds=10)
# Rank 0 may read a large dataset for hours, or the ranks' shares of caching may differ, while the others wait.
_OBJECT_TIMEOUT = timedelta(hours=24)


@dataclass(frozen=True)
class Processes:
    """This process among all: its rank, its number on this machine, how many there are, and its device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    timeout_minutes: float = 30.0

    @property
    def is_main(self) -> bool:
        """True on the one process that speaks and writes for all."""
        return self.rank == 0


def init_processes(timeout_minutes: float) -> Processes:
    """Join the process group that the launcher describes; plain `python` is a group of one.

    Raises:
        UserError: the port is in use or the peers cannot be reached.
    """
    _complete_environment()
    rank, local_rank, world_size, _ = map(_read_number, ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise _own_error(
                f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; start at most "
                "one process per GPU"
            )
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    try:
        dist.init_process_group(
            backend, timeout=timedelta(minutes=timeout_minutes), rank=rank, world_size=world_size
        )
        if world_size > 1:
            _object_group.append(dist.new_group(backend="gloo", timeout=_OBJECT_TIMEOUT))
    except (RuntimeError, dist.DistError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise _own_error(
                f"port {address} is in use by another program or another training run; choose another one "
                "(deepspeed --master_port N, torchrun --master-port N)"
            ) from error
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _own_error(
            f"the {world_size} processes did not find each other at {address} (waited at most {timeout_minutes:g} "
            f"minutes): {first_line}"
        ) from error
    _has_joined.append(True)
    _store[:] = [_get_default_store()]
    return Processes(rank, local_rank, world_size, device, timeout_minutes)


def _own_error(text: str) -> UserError:
    """What this process alone may have met: rank 0 may be fine, and would say nothing for it."""
    error = UserError(text)
    error.is_own = True
    return error


def has_joined() -> bool:
    """Whether this process has been in a group; it stays true after `shutdown`."""
    return bool(_has_joined)


def tell_that_it_is_told() -> None:
    """Rank 0, which speaks for all, has said why all end."""
    for store in _store:
        with suppress(RuntimeError):
            store.set(_TOLD, "")


def wait_until_it_is_told() -> None:
    """The others end after it: else their launcher might end rank 0 before it has said a word."""
    for store in _store:
        with suppress(RuntimeError):  # it is late, or gone
            store.wait([_TOLD], _PATIENCE)


def _complete_environment() -> None:
    """Set what no launcher has set, where DeepSpeed looks for it; `shutdown` takes it out again."""
    missing = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    if "WORLD_SIZE" not in os.environ:
        missing |= {"WORLD_SIZE": "1", "MASTER_PORT": str(_free_port())}
    for key, value in missing.items():
        if key not in os.environ:
            os.environ[key] = value
            _own_environment.append(key)


def _read_number(key: str) -> int:
    try:
        return int(os.environ[key])
    except ValueError as error:
        raise UserError(
            f"the environment variable {key} is {os.environ[key]!r} and not a number; unset it, or start with a launcher "
            "(deepspeed, torchrun), which sets it"
        ) from error


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`, on every rank. Every rank must call it."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_objects())
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value, group=_objects())
    return gathered


def _objects() -> Any:
    """The group for objects; None is the whole world's own."""
    return _object_group[0] if _object_group else None


class SharedCounter:
    """A number that every rank adds to and reads, without waiting for any other rank."""

    def __init__(self, name: str) -> None:
        """The counter of this name in the process group; it begins at 0."""
        self._name = name
        self._store = _get_default_store()

    def add(self, amount: int) -> int:
        """Add `amount`; returns the sum so far."""
        return int(self._store.add(self._name, amount))

    def value(self) -> int:
        """The sum so far."""
        return self.add(0)


def num_processes_here() -> int:
    """How many of the processes run on this machine. Every rank must call it."""
    return gather_objects(socket.gethostname()).count(socket.gethostname())


def on_main(function: Callable[[], T]) -> T:
    """Run `function` on rank 0 and return its result on every rank; a UserError is raised on every rank.

    So that a mistake that only rank 0 sees ends all processes with one message, instead of leaving the others
    waiting. Every rank must call it.
    """
    result, problem = _attempt(function) if dist.get_rank() == 0 else (None, None)
    result, problem = broadcast_object((result, problem))
    _raise_everywhere(problem)
    return cast(T, result)


def on_every_rank(function: Callable[[], T]) -> T:
    """Run `function` on every rank, wait for all, and raise everywhere the UserError of the first rank that had one."""
    result, problem = _attempt(function)
    _raise_everywhere(next((other for other in gather_objects(problem) if other is not None), None))
    return cast(T, result)


def _attempt(function: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return function(), None
    except UserError as error:
        return None, str(error)


def _raise_everywhere(problem: str | None) -> None:
    if problem is not None:
        error = UserError(problem)
        error.on_every_rank = True
        raise error


def shutdown() -> None:
    """Leave the process group, if there is one, and the environment as it was.

    Only where every process leaves: on nccl this waits for the peers.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    _object_group.clear()
    while _own_environment:
        os.environ.pop(_own_environment.pop(), None)


@contextmanager
def process_group(timeout_minutes: float) -> Iterator[Processes]:
    """Join for the body (see `init_processes`), and leave after it, also after an error that all processes share.

    After an error of this process alone it does not leave, because that would wait for peers which do not know;
    `utils.cli.end_process` then ends it, and the watch (`utils.peers`) the others.

    Raises:
        PeerLostError: instead of what torch says where a peer is gone.
    """
    watch: PeerWatch | None = None
    try:
        processes = init_processes(timeout_minutes)
        watch = watch_peers(processes.rank, processes.world_size, timeout_minutes, _say)
        yield processes
        if watch is not None:
            watch.leave()
            gather_objects(None)  # nobody takes the store away from those who still work
    except BaseException as error:
        lost = None
        if watch is not None:
            lost = None if is_shared(error) else watch.explain(error)
            watch.stop()
        if not dist.is_initialized() or dist.get_world_size() == 1 or is_shared(error):
            shutdown()
        if lost is not None:
            raise lost from error
        raise
    if watch is not None:
        watch.stop()
    shutdown()


def limit_waits(timeout_minutes: float) -> None:
    """From now on no process takes long alone: objects are waited for no longer than tensors."""
    for group in _object_group:
        _set_pg_timeout(timedelta(minutes=timeout_minutes), group)


def lift_waits() -> None:
    """Again a process may take long alone, as before `limit_waits`: another model is read and built."""
    for group in _object_group:
        _set_pg_timeout(_OBJECT_TIMEOUT, group)


def _say(text: str) -> None:
    prefix = f"[rank {dist.get_rank()}] " if dist.get_rank() else ""
    sys.stderr.write(f"{prefix}{text}\n")


def is_shared(error: BaseException) -> bool:
    """Whether every process raises this error."""
    return isinstance(error, TrainingStoppedError) or bool(getattr(error, "on_every_rank", False))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
