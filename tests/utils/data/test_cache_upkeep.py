"""Looking after a cache: counting, finding damage without touching it, and deleting only what may go."""

import os
import time

import pytest
import torch

from utils.data.cache import CacheStore
from utils.data.cache_upkeep import (
    all_keys,
    delete,
    find_damaged,
    find_leftovers,
    find_unneeded,
    measure,
    open_existing,
)
from utils.data.compaction import remove_items
from utils.errors import UserError


def key_of(number: int, kind: str = "latents") -> str:
    return f"{kind}/{number:032x}"


@pytest.fixture
def store(tmp_path):
    made = CacheStore(tmp_path / ".wan_cache")
    for number in range(4):
        made.put(key_of(number), {"x": torch.full((8,), float(number))}, {"vae": "new" if number else "old"})
    made.put(key_of(9, "text"), {"states": torch.zeros(2, 3)})
    return made


def damage_item(store, key, at=-1) -> None:
    """Flip a bit of the item in its file."""
    place = store.place(key)
    data = bytearray(place.shard.path.read_bytes())
    data[place.entry.offset + at % place.entry.length] ^= 1
    place.shard.path.write_bytes(data)


def test_only_a_cache_is_opened(store, tmp_path):
    assert open_existing(store.root).root == store.root
    with pytest.raises(UserError, match=r"is no cache; .*\.wan_cache is one"):
        open_existing(tmp_path)
    with pytest.raises(UserError, match="is no cache; give"):
        open_existing(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_items_are_counted_per_kind(store):
    latents, text = measure(store)
    assert (latents.kind, latents.num_items, text.kind, text.num_items) == ("latents", 4, "text", 1)
    assert latents.num_bytes == sum(store.place(key_of(number)).entry.length for number in range(4)) > 4 * 32
    assert time.time() - 60 < latents.oldest < latents.newest < text.newest < time.time() + 1
    assert latents.made_by == {"vae": {"new": 3, "old": 1}} and text.made_by == {}
    damage_item(store, key_of(9, "text"), at=7)
    assert measure(CacheStore(store.root))[1].num_unreadable == 1


def test_damage_is_found_and_left_alone(store):
    damage_item(store, key_of(2))
    done = []
    keys = all_keys(store)
    assert len(keys) == 5
    assert find_damaged(store, keys, lambda: done.append(1)) == {key_of(2): "does not match its checksum"}
    assert len(done) == 5 and store.has(key_of(2))


def test_only_what_is_not_needed_goes(store):
    keys = all_keys(store)
    store.flush()
    CacheStore(store.root).remove(key_of(3))  # by another process, meanwhile
    store.refresh()
    unneeded = find_unneeded(store, keys, {key_of(0), key_of(9, "text"), key_of(77)})
    assert set(unneeded.keys) == {key_of(1), key_of(2)}
    assert unneeded.num_bytes == sum(store.place(key).entry.length for key in unneeded.keys)
    remove_items(store, unneeded.keys)
    assert all_keys(CacheStore(store.root)) == [key_of(0), key_of(9, "text")]


def test_old_leftovers_go_and_files_in_the_making_stay(store):
    folder = store.root / "shards"
    old, orphan = folder / ".a.index.x.tmp", folder / "latents-0123.index"
    fresh, other = store.root / ".memo.y.tmp", folder / "mine.tmp"
    for path in (old, orphan, fresh, other):
        path.write_bytes(b"torn")
    for path in (old, orphan, other, *folder.glob("*.index")):
        os.utime(path, (time.time() - 7200,) * 2)
    found = find_leftovers(store.root)
    assert set(found.paths) == {old, orphan} and found.num_bytes == 8
    delete(found)
    assert fresh.exists() and other.exists() and len(all_keys(CacheStore(store.root))) == 5
