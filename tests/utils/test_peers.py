"""Who is gone and who says so, with several watches over one store in one process."""

import threading
import time

import pytest
import torch.distributed as dist

from utils.peers import PeerWatch, is_peer_error

TICK = 0.02


class Group:
    """Watches of some ranks; what they say, and which of them would have ended their process."""

    def __init__(self, world_size: int, watching: list[int], timeout_ticks: int = 25) -> None:
        self.said: list[str] = []
        self.ended: list[int] = []
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        minutes = timeout_ticks * TICK / 60
        self.watches = {
            rank: PeerWatch(
                dist.TCPStore("127.0.0.1", self.store.port, is_master=False),
                rank,
                world_size,
                minutes,
                say=self.said.append,
                end=lambda status, rank=rank: self.end(rank),
                tick_seconds=TICK,
            )
            for rank in watching
        }

    def end(self, rank: int) -> None:
        self.ended.append(rank)
        self.watches[rank]._stopping.set()

    def wait_until_ended(self, count: int) -> None:
        deadline = time.monotonic() + 20
        while len(self.ended) < count and time.monotonic() < deadline:
            time.sleep(TICK)
        assert len(self.ended) == count, (self.ended, self.said)


def test_those_who_live_are_left_alone() -> None:
    group = Group(3, [0, 1, 2], timeout_ticks=10)
    time.sleep(40 * TICK)
    group.watches[1].leave()
    group.watches[1].stop()  # with a goodbye
    time.sleep(40 * TICK)
    assert not group.ended and not group.said
    for watch in group.watches.values():
        watch.stop()


def test_a_silent_peer_is_named_once_and_ends_the_others() -> None:
    group = Group(3, [0, 1])
    group.wait_until_ended(2)
    (message,) = group.said
    assert message.startswith("stopped: process 2 gave no sign of life") and sorted(group.ended) == [0, 1]


def test_an_error_of_its_own_ends_the_others_without_a_word() -> None:
    group = Group(3, [0, 1, 2])
    assert group.watches[1].explain(ValueError("no more")) is None
    group.wait_until_ended(2)
    assert sorted(group.ended) == [0, 2] and not group.said
    group.watches[1].stop()


def test_a_broken_connection_is_traced_to_who_failed_first() -> None:
    group = Group(3, [0, 1, 2])
    group.watches[2]._is_main_handling = True  # busy, so that its thread does not end it
    group.watches[1].explain(ValueError("no more"))
    lost = group.watches[2].explain(RuntimeError("[gloo/pair.cc] Connection closed by peer"))
    assert lost is not None and not lost.is_told and "1: ValueError: no more" in str(lost)
    for watch in group.watches.values():
        watch.stop()


def test_a_broken_connection_is_traced_to_who_is_silent_and_one_tells_it() -> None:
    group = Group(3, [0, 1], timeout_ticks=10_000)
    found = []

    def explain(rank: int) -> None:
        found.append(group.watches[rank].explain(RuntimeError("[gloo/pair.cc] Connection closed by peer")))

    threads = [threading.Thread(target=explain, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert sorted(lost.is_told for lost in found) == [False, True]
    assert all("process 2" in str(lost) for lost in found)
    for watch in group.watches.values():
        watch.stop()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError(
                "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer"
            ),
            True,
        ),
        (RuntimeError("[third_party/gloo] Timed out waiting 15000ms for recv operation to complete"), True),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("Connection closed by peer"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_a_lost_peer_looks_like(error: BaseException, expected: bool) -> None:
    assert is_peer_error(error) == expected
