import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.data.cache import CacheStore
from utils.data.fill import FillItem, FillStats, fill_cache, make_batches, rank_share
from utils.errors import UserError


def make_work(count: int) -> list[FillItem]:
    return [FillItem(f"latents/{n * 7919 % 1009:032x}", (n % 3, 5), payload=n) for n in range(count)]


@pytest.fixture
def store(tmp_path):
    return CacheStore(tmp_path / "cache")


class Encoder:
    """Gives each item its payload, and remembers the batches."""

    def __init__(self, fails_at: int | None = None):
        self.batches = []
        self.fails_at = fails_at

    def __call__(self, items):
        self.batches.append([item.payload for item in items])
        for item in items:
            if item.payload == self.fails_at:
                raise UserError("clip.mp4: cannot be decoded")
            yield {"x": torch.tensor([item.payload])}


def check_contents(store, work):
    for item in work:
        assert store.get(item.key)["x"].item() == item.payload


def test_all_is_encoded_in_batches_of_one_group_and_then_never_again(store):
    work, encoder, calls = make_work(20), Encoder(), []
    stats = fill_cache(
        store, work, encoder, batch_size=4, on_progress=lambda done, total: calls.append((done, total))
    )
    assert stats == FillStats(num_items=20, num_present=0, num_encoded=20)
    assert calls == [(done, 20) for done in range(21)]
    assert sorted(len(batch) for batch in encoder.batches) == [2, 3, 3, 4, 4, 4]
    assert all(len({payload % 3 for payload in batch}) == 1 for batch in encoder.batches)
    check_contents(store, work)
    encoder = Encoder()
    assert fill_cache(store, work, encoder) == FillStats(num_items=20, num_present=20, num_encoded=0)
    assert encoder.batches == []
    assert fill_cache(store, work, encoder, regenerate=True).num_encoded == 20


def keys_of(batches):
    return [[item.key for item in batch] for batch in batches]


@given(count=st.integers(0, 60), world_size=st.integers(1, 7), batch_size=st.integers(1, 9))
def test_shares_cover_everything_once_whatever_the_order(count, world_size, batch_size):
    work = make_work(count)
    shares = [
        rank_share(reversed(work) if rank % 2 else work, rank, world_size, batch_size)
        for rank in range(world_size)
    ]
    assert sorted(item.payload for share in shares for item in share) == list(range(count))
    alone = list(make_batches(work, batch_size))
    together = [list(make_batches(share, batch_size)) for share in shares]
    # The same batches as one process makes, spread evenly.
    assert sorted(batch for batches in together for batch in keys_of(batches)) == sorted(keys_of(alone))
    assert max(map(len, together)) - min(map(len, together)) <= 1
    assert all(len(batch) <= batch_size and len({item.group for item in batch}) == 1 for batch in alone)
    # As few batches as the groups allow.
    groups = [sum(item.group == group for item in work) for group in {item.group for item in work}]
    assert len(alone) == sum(-(-size // batch_size) for size in groups)


def test_payloads_are_loaded_in_the_order_of_encoding_and_for_what_is_missing_alone(store):
    work, encoder, given, events = make_work(10), Encoder(), [], []

    @contextmanager
    def load(payloads):
        given.extend(payloads)
        events.append("open")
        try:
            yield (payload + 100 for payload in payloads)
        finally:
            events.append("closed")

    fill_cache(store, work[:3], Encoder())
    fill_cache(store, work, encoder, batch_size=2, load=load)
    assert sorted(given) == list(range(3, 10))
    assert [payload for batch in encoder.batches for payload in batch] == [one + 100 for one in given]
    assert all(len({payload % 3 for payload in batch}) == 1 for batch in encoder.batches)
    with pytest.raises(UserError, match="clip"):
        fill_cache(store, work, Encoder(fails_at=107), regenerate=True, load=load)
    assert events == ["open", "closed"] * 2


def test_the_next_batch_is_loaded_while_one_is_encoded_and_no_more(store):
    loads, changed = [], threading.Condition()

    @contextmanager
    def load(payloads):
        def one_by_one():
            for payload in payloads:
                with changed:
                    loads.append(payload)
                    changed.notify_all()
                yield payload

        yield one_by_one()

    seen = []

    def encode(items):
        for item in items:
            yield {"x": torch.tensor([item.payload])}
        wanted = min(2 * (len(seen) + 2), 6)
        with changed:
            assert changed.wait_for(lambda: len(loads) >= wanted, timeout=60)
            seen.append(len(loads))

    work = [FillItem(f"latents/{n:032x}", (5,), payload=n) for n in range(6)]
    fill_cache(store, work, encode, batch_size=2, load=load)
    assert seen == [4, 6, 6]
    check_contents(store, work)


def test_ranks_that_start_at_different_times_leave_no_hole(store):
    work = make_work(30)
    encoded = [fill_cache(store, work, Encoder(), rank=rank, world_size=3).num_encoded for rank in range(3)]
    assert encoded == [10, 10, 10]
    check_contents(store, work)


def test_equal_keys_are_encoded_once(store):
    work = make_work(3)
    assert fill_cache(store, work + work, Encoder()).num_items == 3


def test_an_error_keeps_what_was_done_and_the_next_run_does_the_rest(store):
    work = make_work(20)
    with pytest.raises(UserError, match="clip"):
        fill_cache(store, work, Encoder(fails_at=10), batch_size=3)
    done = 20 - len(store.missing(item.key for item in work))
    assert 0 < done < 20
    assert fill_cache(store, work, Encoder(), batch_size=3) == FillStats(20, done, 20 - done)
    check_contents(store, work)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_cannot_be_loaded_is_left_out_and_listed(store, batch_size):
    work, calls = make_work(9), []
    bad = {2, 3, 7}

    @contextmanager
    def load(payloads):
        yield (UserError(f"{payload} is damaged") if payload in bad else payload for payload in payloads)

    stats = fill_cache(
        store,
        work,
        Encoder(),
        load=load,
        batch_size=batch_size,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    keys = {item.key: item.payload for item in work}
    assert {keys[key]: reason for key, reason in stats.failures} == {
        payload: f"{payload} is damaged" for payload in bad
    }
    assert (stats.num_items, stats.num_present, stats.num_encoded) == (9, 0, 6)
    assert calls[-1] == (9, 9) and calls == sorted(calls)
    assert {keys[key] for key in store.missing(keys)} == bad
    again = fill_cache(store, work, Encoder(), load=load)
    assert (again.num_present, again.num_encoded, len(again.failures)) == (6, 0, 3)


def test_an_encoder_that_gives_too_little_is_an_error(store):
    with pytest.raises(ValueError, match="shorter"):
        fill_cache(store, make_work(3), lambda items: [], batch_size=2)


def test_metadata_is_kept(store):
    item = FillItem("text/" + "0" * 32, (3,), payload=1, metadata={"caption": "a circle"})
    fill_cache(store, [item], Encoder())
    assert store.metadata(item.key)["caption"] == "a circle"


FILLER = """
import sys, torch
from pathlib import Path
from utils.data.cache import CacheStore
from utils.data.fill import FillItem, fill_cache
def encode(items):
    for item in items:
        yield {"x": torch.tensor([item.payload] * 3000)}
work = [FillItem(f"latents/{n:032x}", (n % 3,), payload=n) for n in range(int(sys.argv[2]))]
print("ready", flush=True)
fill_cache(CacheStore(Path(sys.argv[1])), work, encode, batch_size=4)
"""
NUM_KILLS = 20
NUM_ITEMS = 4000


@pytest.mark.long
def test_killed_at_twenty_moments_and_finished_it_holds_what_an_undisturbed_fill_holds(tmp_path):
    """Whole items or none after each kill, and each kill costs at most the item in flight."""
    random, root = Random(0), tmp_path / "cache"
    keys = [f"latents/{n:032x}" for n in range(NUM_ITEMS)]
    command = [sys.executable, "-c", FILLER, str(root), str(NUM_ITEMS)]
    done, num_killed = 0, 0
    for _ in range(NUM_KILLS):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(random.uniform(0.0, 0.06))
        process.kill()
        num_killed += process.wait(timeout=60) == -signal.SIGKILL
        present = set(keys) - set(CacheStore(root).missing(keys))
        assert len(present) >= done, "an item that was there is lost"
        done = len(present)
        check_whole(CacheStore(root), Random(done).sample(sorted(present), min(done, 50)))
    assert num_killed == NUM_KILLS and done > 0
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
    store = CacheStore(root)
    assert store.missing(keys) == [] and list(store.keys("latents")) == keys
    check_whole(store, keys)
    undisturbed = CacheStore(tmp_path / "undisturbed")
    fill_cache(undisturbed, [FillItem(key, (0,), int(key[-32:], 16)) for key in keys], encode_as_filler)
    for key in keys:
        assert torch.equal(store.get(key)["x"], undisturbed.get(key)["x"])


def encode_as_filler(items):
    return [{"x": torch.tensor([item.payload] * 3000)} for item in items]


def check_whole(store, keys) -> None:
    for key in keys:
        assert store.damage(key) is None
        assert store.get(key)["x"].tolist() == [int(key[-32:], 16)] * 3000


def test_two_processes_fill_one_store(tmp_path):
    command = [sys.executable, "-c", FILLER, str(tmp_path / "cache"), "300"]
    fillers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [filler.wait(timeout=120) for filler in fillers] == [0, 0]
    check_whole(CacheStore(tmp_path / "cache"), [f"latents/{n:032x}" for n in range(300)])
