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


def flip_last_byte(path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_only_a_cache_is_opened(store, tmp_path):
    assert open_existing(store.root).root == store.root
    with pytest.raises(UserError, match=r"is no cache; .*\.wan_cache is one"):
        open_existing(tmp_path)
    with pytest.raises(UserError, match="is no cache; give"):
        open_existing(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_items_are_counted_per_kind(store):
    os.utime(store.path(key_of(2)), (1000, 1000))
    latents, text = measure(store)
    assert (latents.kind, latents.num_items, text.kind, text.num_items) == ("latents", 4, "text", 1)
    assert latents.num_bytes == sum(store.path(key_of(number)).stat().st_size for number in range(4))
    assert latents.oldest == 1000 and latents.newest == max(
        store.path(key_of(number)).stat().st_mtime for number in range(4)
    )
    assert latents.made_by == {"vae": {"new": 3, "old": 1}} and text.made_by == {}
    store.path(key_of(9, "text")).write_bytes(b"torn")
    assert measure(store)[1].num_unreadable == 1


def test_damage_is_found_and_left_alone(store):
    flip_last_byte(store.path(key_of(2)))
    done = []
    keys = all_keys(store)
    assert len(keys) == 5
    assert find_damaged(store, keys, lambda: done.append(1)) == {key_of(2): "does not match its checksum"}
    assert len(done) == 5 and store.has(key_of(2))


def test_only_what_is_not_needed_goes(store):
    keys = all_keys(store)
    gone = store.path(key_of(3))
    gone.unlink()  # by another process, meanwhile
    unneeded = find_unneeded(store, keys, {key_of(0), key_of(9, "text"), key_of(77)})
    assert set(unneeded.paths) == {store.path(key_of(1)), store.path(key_of(2))}
    assert unneeded.num_bytes == sum(path.stat().st_size for path in unneeded.paths)
    unneeded.paths[0].unlink()
    delete(unneeded)
    assert all_keys(store) == [key_of(0), key_of(9, "text")]


def test_old_leftovers_go_and_files_in_the_making_stay(store):
    folder = store.path(key_of(0)).parent
    old, fresh, other = folder / ".a.safetensors.x.tmp", store.root / ".memo.y.tmp", folder / "mine.tmp"
    for path in (old, fresh, other):
        path.write_bytes(b"torn")
    for path in (old, other):
        os.utime(path, (time.time() - 7200,) * 2)
    found = find_leftovers(store.root)
    assert found.paths == (old,) and found.num_bytes == 4
    delete(found)
    assert fresh.exists() and other.exists() and len(all_keys(store)) == 5
