"""Compaction gives bytes back and loses nothing, with readers at work and killed at any moment."""

import contextlib

import pytest
import torch

from utils.data import compaction, shards
from utils.data.cache import CacheStore
from utils.data.compaction import compact, remove_items
from utils.data.items import encode_item
from utils.errors import UserError


def key_of(number: int, kind: str = "latents") -> str:
    return f"{kind}/{number:032x}"


def value(number: int) -> dict[str, torch.Tensor]:
    return {"x": torch.full((500,), float(number))}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Twenty items over several shards."""
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 20_000)
    made = CacheStore(tmp_path / "cache")
    for number in range(20):
        made.put(key_of(number), value(number), {"number": str(number)})
    made.flush()
    return made


def total_bytes(store) -> int:
    return sum(path.stat().st_size for path in (store.root / "shards").iterdir())


def check(store, numbers) -> None:
    for opened in (store, CacheStore(store.root)):
        assert list(opened.keys("latents")) == [key_of(number) for number in sorted(numbers)]
        for number in numbers:
            assert torch.equal(opened.get(key_of(number))["x"], value(number)["x"])
            assert opened.metadata(key_of(number)) == {"number": str(number)}


def test_bytes_come_back_and_the_rest_stays(store):
    before = total_bytes(store)
    freed = remove_items(store, [key_of(number) for number in range(0, 20, 2)])
    check(store, range(1, 20, 2))
    assert freed.left_bytes == 0
    assert before - total_bytes(store) > 0.45 * before
    assert freed.freed_bytes > 0.45 * before


def test_everything_may_go(store):
    remove_items(store, [key_of(number) for number in range(20)])
    assert total_bytes(store) < 1000 and len(CacheStore(store.root)) == 0  # at most a few tombstones
    store.put(key_of(3), value(3), {"number": "3"})
    check(store, [3])


def test_a_shard_with_little_to_gain_is_left(store):
    names = {path.name for path in (store.root / "shards").iterdir()}
    store.remove(key_of(0))
    freed = compact(store, min_dead_share=0.5)
    assert freed.freed_bytes == 0 and freed.left_bytes > 2000
    assert {path.name for path in (store.root / "shards").iterdir()} >= names
    check(store, range(1, 20))


def test_what_replaced_items_held_comes_back(store):
    before = total_bytes(store)
    for _ in range(3):
        for number in range(20):
            store.put(key_of(number), value(number), {"number": str(number)})
    assert total_bytes(store) > 3.5 * before
    compact(store)
    assert total_bytes(store) <= 1.2 * before
    check(store, range(20))


def test_a_removed_item_does_not_come_back(store):
    """Its tombstone lies in another shard than the item, and that shard is compacted first."""
    for number in (1, 15):
        store.remove(key_of(number))
    store.flush()
    for _ in range(3):
        compact(store, min_dead_share=0.0)
        check(store, set(range(20)) - {1, 15})


def test_readers_and_shards_in_use_are_not_disturbed(store):
    reader = CacheStore(store.root)
    kept = reader.get(key_of(19))["x"]
    writer = CacheStore(store.root)
    writer.put(key_of(50), value(50), {"number": "50"})
    remove_items(store, [key_of(number) for number in range(18)])
    assert torch.equal(kept, value(19)["x"])
    assert torch.equal(reader.get(key_of(18))["x"], value(18)["x"])
    with pytest.raises(UserError, match="missing"):
        reader.get(key_of(2))
    assert reader.metadata(key_of(50)) == {"number": "50"} and reader.damage(key_of(18)) is None
    writer.put(key_of(51), value(51), {"number": "51"})
    check(store, [18, 19, 50, 51])


def test_what_another_process_writes_until_the_shard_is_locked_stays(store, monkeypatch):
    """A filler takes the shard over, appends and leaves, between the judgement and the lock."""
    for number in range(4):
        store.remove(key_of(number))
    store.flush()
    adopt, written = shards.ShardWriter.adopt, []

    def adopt_after_a_filler(path):
        if not written:
            written.append(path)
            writer = adopt(path)
            assert writer is not None
            writer.append(bytes.fromhex(key_of(60)[-32:]), encode_item(value(60), {"number": "60"}))
            writer.close()
        return adopt(path)

    monkeypatch.setattr(shards.ShardWriter, "adopt", adopt_after_a_filler)
    compact(store)
    monkeypatch.undo()
    assert (
        written and not written[0].exists()
    ), "the shard that was written into is the one that was compacted"
    check(store, [*range(4, 20), 60])


def test_damage_is_not_copied_as_whole(store):
    place = store.place(key_of(5))
    content = bytearray(place.shard.path.read_bytes())
    content[place.entry.offset + place.entry.length - 1] ^= 1
    place.shard.path.write_bytes(content)
    opened = CacheStore(store.root)
    remove_items(opened, [key_of(4), key_of(6)])
    check(opened, set(range(20)) - {4, 5, 6})


@pytest.mark.parametrize("last_call", range(0, 30, 3))
def test_stopped_at_any_moment_it_loses_nothing(store, monkeypatch, last_call):
    for number in range(0, 20, 2):
        store.remove(key_of(number))
    calls = []

    def dying(function):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) > last_call:
                raise MemoryError("killed")
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("append", "sync", "create"):
            patch.setattr(shards.ShardWriter, name, dying(getattr(shards.ShardWriter, name)))
        patch.setattr(compaction.Path, "unlink", dying(compaction.Path.unlink))
        with contextlib.suppress(MemoryError):
            compact(store)
    check(CacheStore(store.root), range(1, 20, 2))
    compact(store, min_dead_share=0.0)
    check(store, range(1, 20, 2))
