"""Knowing when a peer is gone, and saying once what failed first.

A thread in every process gives a sign of life each second, in the store through which the processes found each other,
and reads the others' there. A process that fails writes its cause there first, so that the others end with it, at once
and without a message of their own; one that is gone without a word is named by who misses it.
"""

import os
import re
import socket
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from utils.errors import EXIT_FAILED, PeerLostError

_TICK_SECONDS = 1.0
# So many ticks without a sign of life: gone, where a connection has broken anyway.
_MISSED_TICKS = 5
# How long after a broken connection its cause is looked for; longer than the ticks above take.
_SEARCH_SECONDS = 12.0
_CLAIM_SECONDS = 5.0
# Between two looks at who knows the cause already.
_HURRY_SECONDS = 0.1
_GOODBYE = "goodbye"
# What gloo and torch say when a peer is gone or silent; gloo's errors have no type of their own.
_BROKEN = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out|socket|tcpstore", re.IGNORECASE
)


def is_peer_error(error: BaseException) -> bool:
    """Whether an error is what a process sees when a peer has gone or is silent."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and _BROKEN.search(str(error)) is not None


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class PeerWatch:
    """The signs of life of all processes, seen from this one.

    Only its thread touches the store, because a store whose host hangs would hang who asks it.
    """

    def __init__(
        self,
        store: "dist.Store",
        rank: int,
        world_size: int,
        timeout_minutes: float,
        *,
        say: Callable[[str], None],
        end: Callable[[int], object] = _exit,
        tick_seconds: float = _TICK_SECONDS,
    ) -> None:
        """Begin to watch.

        Args:
            store: where the processes found each other; a client of this thread's own.
            rank: of this process.
            world_size: number of processes.
            timeout_minutes: a peer that is silent for so long is lost.
            say: prints a message for people.
            end: ends this process.
            tick_seconds: time between two signs of life.
        """
        self._store = store
        self._rank = rank
        self._others = [other for other in range(world_size) if other != rank]
        self._tick_seconds = tick_seconds
        self._max_missed = max(_MISSED_TICKS, round(60 * timeout_minutes / tick_seconds))
        self._say = say
        self._end = end
        self._names = {other: f"process {other}" for other in self._others}
        self._beats = dict.fromkeys(self._others, "")
        self._missed = dict.fromkeys(self._others, 0)
        self._cause = ""  # "<rank>: <text>" of the first failure
        self._claim = ""  # what this process wants to be the cause
        self._claimed = threading.Event()
        self._all_know = threading.Event()
        self._store_gone = threading.Event()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._is_leaving = False
        self._is_main_handling = False
        self._thread = threading.Thread(target=self._run, name="peer-watch", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------ for the main thread

    def leave(self) -> None:
        """This process has done its work: from now on a peer that is gone has left too."""
        self._is_leaving = True

    def stop(self) -> None:
        """Say goodbye and watch no longer."""
        self._stopping.set()
        self._wake.set()
        self._thread.join(timeout=_CLAIM_SECONDS)

    def explain(self, error: BaseException) -> PeerLostError | None:
        """What an error of this process alone comes from.

        An error of its own becomes the cause that ends the others, and None is returned. A broken connection is traced
        to the process that failed first; the PeerLostError says so, on one process only.
        """
        self._is_main_handling = True
        if not is_peer_error(error):
            self._make_cause(f"{type(error).__name__}: {error}")
            return None
        for _ in range(round(_SEARCH_SECONDS / 0.1)):
            if self._cause:
                return PeerLostError(self._cause, is_told=False)
            if self._store_gone.is_set():
                # Nobody can be asked who speaks; the lowest rank that is left for certain does.
                return PeerLostError(self._host_is_gone(), is_told=self._rank == 1)
            if gone := [other for other, missed in self._missed.items() if missed >= _MISSED_TICKS]:
                return self._lost(gone)
            if self._stopping.wait(0.1):
                break
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        text = (
            f"a peer did not answer ({first_line}), though all {len(self._others) + 1} processes give signs of life: one of "
            "them is stuck or slow (a hanging disk?), or the network between them is broken. Look at what each of them "
            "does, or raise timeout_minutes"
        )
        return PeerLostError(text, is_told=self._make_cause(text))

    def _lost(self, gone: list[int]) -> PeerLostError:
        text = self._describe_lost(gone)
        return PeerLostError(text, is_told=self._make_cause(text))

    def _describe_lost(self, gone: list[int]) -> str:
        names = ", ".join(self._names[other] for other in gone)
        seconds = min(self._missed[other] for other in gone) * self._tick_seconds
        return (
            f"{names} gave no sign of life for {seconds:.0f} s: killed (for want of memory?), stopped, or cut off. What it "
            "said last stands above. All processes end; start again with --resume_from_checkpoint"
        )

    def _host_is_gone(self) -> str:
        return (
            f"{self._names.get(0, 'process 0')}, or the launcher, through which the processes meet, is gone: killed (for "
            "want of memory?) or cut off. What it said last stands above. All processes end; start again with "
            "--resume_from_checkpoint"
        )

    def _make_cause(self, text: str) -> bool:
        """Make this the cause of all, unless there is one; whether it is the one now."""
        self._claim = f"{self._rank}: {text}"
        self._wake.set()
        self._claimed.wait(_CLAIM_SECONDS)
        if self._rank == 0:
            # Where this process is the host of the store, the cause would go with it.
            self._all_know.wait(_CLAIM_SECONDS)
        return self._cause in ("", self._claim)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        ticks = 0
        try:
            self._store.set(
                f"who/{self._rank}", f"process {self._rank} ({socket.gethostname()}, pid {os.getpid()})"
            )
            while not self._stopping.is_set():
                ticks += 1
                self._store.set(f"beat/{self._rank}", str(ticks))
                self._put_claim()
                self._read_cause()
                if not self._cause:
                    self._read_beats()
                self._act()
                self._wake.wait(_HURRY_SECONDS if self._cause else self._tick_seconds)
                self._wake.clear()
            self._store.set(f"knows/{self._rank}", "")  # whatever it is, nobody need wait for this process
            self._store.set(f"beat/{self._rank}", _GOODBYE)
        except (RuntimeError, OSError):  # torch's store raises subclasses of RuntimeError
            self._store_gone.set()
            self._act_without_store()

    def _put_claim(self) -> None:

        if self._claim and not self._claimed.is_set():
            self._cause = self._store.compare_set("cause", "", self._claim).decode(errors="replace")
            self._claimed.set()

    def _read_cause(self) -> None:
        if not self._cause and self._store.check(["cause"]):
            self._cause = self._store.get("cause").decode(errors="replace")
        if self._cause:
            self._store.set(f"knows/{self._rank}", "")
            waited_for = [other for other in self._others if self._missed[other] < _MISSED_TICKS]
            if all(self._store.check([f"knows/{other}"]) for other in waited_for):
                self._all_know.set()

    def _read_beats(self) -> None:
        for other in self._others:
            if not self._store.check([f"beat/{other}", f"who/{other}"]):
                self._missed[other] += 1
                continue
            beat, name = (
                value.decode(errors="replace")
                for value in self._store.multi_get([f"beat/{other}", f"who/{other}"])
            )
            self._names[other] = name
            # Ticks of this thread, not seconds: if this process is stopped for a while, the others are not to blame.
            alive = beat == _GOODBYE or beat != self._beats[other]
            self._missed[other] = 0 if alive else self._missed[other] + 1
            self._beats[other] = beat

    def _act(self) -> None:
        """End this process where the main thread cannot: it may wait for a peer that will never come."""
        if self._is_main_handling:
            return
        if self._cause:
            self._end(EXIT_FAILED)
            return
        gone = [other for other, missed in self._missed.items() if missed >= self._max_missed]
        if gone and not self._is_leaving:
            self._claim = f"{self._rank}: {self._describe_lost(gone)}"
            self._put_claim()
            if self._cause == self._claim:
                self._say(f"stopped: {self._describe_lost(gone)}")
            self._end(EXIT_FAILED)

    def _act_without_store(self) -> None:
        # The main thread comes first, if it notices.
        self._stopping.wait(_SEARCH_SECONDS)
        if not (self._is_main_handling or self._is_leaving or self._stopping.is_set()):
            if self._rank == 1:
                self._say(f"stopped: {self._host_is_gone()}")
            self._end(EXIT_FAILED)


def watch_peers(
    rank: int, world_size: int, timeout_minutes: float, say: Callable[[str], None]
) -> PeerWatch | None:
    """Watch the processes of the group that this one has joined; None where it is alone."""
    if world_size == 1:
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    store = dist.PrefixStore("peers", _get_default_store().clone())  # type: ignore[attr-defined]
    return PeerWatch(store, rank, world_size, timeout_minutes, say=say)
