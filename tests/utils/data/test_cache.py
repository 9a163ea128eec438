"""The store: whole items or none, several processes at once, damage found, nothing stale."""

import subprocess
import sys

import pytest
import torch

from utils.data import shards
from utils.data.cache import STORE_FORMAT, CacheStore
from utils.errors import UserError

TENSORS = {
    "latents": torch.randn(16, 2, 8, 8),
    "half": torch.randn(5, 3).to(torch.bfloat16),
    "count": torch.tensor(7),
    "none": torch.zeros(0, 4),
}


@pytest.fixture
def store(tmp_path):
    return CacheStore(tmp_path / "cache")


def key_of(number: int, kind: str = "latents") -> str:
    return f"{kind}/{number:032x}"


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def shard_files(store):
    return sorted((store.root / "shards").glob("*.shard"))


def damage_item(store, key, at=-1):
    """Flip a bit of the item in its file."""
    place = store.place(key)
    content = bytearray(place.shard.path.read_bytes())
    content[place.entry.offset + at % place.entry.length] ^= 1
    place.shard.path.write_bytes(content)


def test_there_and_back(store):
    key = key_of(1)
    assert not store.has(key)
    store.put(key, TENSORS, {"path": "a.mp4"})
    for opened in (store, CacheStore(store.root)):
        assert opened.has(key) and len(opened) == 1
        assert same(opened.get(key), TENSORS)
        assert opened.verify(key)
        assert opened.metadata(key) == {"path": "a.mp4"}


def test_put_replaces(store):
    store.put(key_of(1), {"x": torch.zeros(3)})
    mapped = store.get(key_of(1))["x"]
    store.put(key_of(1), {"x": torch.ones(5)})
    for opened in (store, CacheStore(store.root)):
        assert torch.equal(opened.get(key_of(1))["x"], torch.ones(5))
    assert torch.equal(mapped, torch.zeros(3))  # whoever reads the old one still does


def test_the_newest_counts_whatever_the_clocks_say(store, monkeypatch):
    """Two machines fill one store, and the second one's clock is behind."""
    store.put(key_of(1), {"x": torch.zeros(3)})
    store.put(key_of(2), {"x": torch.zeros(3)})
    other = CacheStore(store.root)
    monkeypatch.setattr("utils.data.cache.time.time_ns", lambda: 1)
    other.put(key_of(1), {"x": torch.ones(3)})
    other.remove(key_of(2))
    for opened in (store, other, CacheStore(store.root)):
        opened.refresh()
        assert opened.get(key_of(1))["x"].sum() == 3 and not opened.has(key_of(2))
    other.put(key_of(2), {"x": torch.ones(3)})
    assert store.get(key_of(2))["x"].sum() == 3


def test_missing_lists_what_is_not_there_in_order_and_once(store):
    keys = [key_of(number << 120 | number) for number in range(40)] + [key_of(3, "text")]
    for key in keys[::3]:
        store.put(key, {"x": torch.zeros(1)})
    expected = [key for index, key in enumerate(keys) if index % 3]
    assert store.missing([*keys, *keys]) == expected
    assert CacheStore(store.root).missing(keys) == expected
    store.remove(keys[0])
    assert store.missing(keys)[0] == keys[0]
    store.remove(keys[0])
    assert CacheStore(store.root).missing(keys)[0] == keys[0]


def test_opening_reads_no_items(store, monkeypatch):
    for number in range(50):
        store.put(key_of(number), TENSORS)
    store.flush()
    monkeypatch.setattr(shards.mmap, "mmap", lambda *_, **__: pytest.fail("an item was read"))
    monkeypatch.setattr(shards.Shard, "_scan_tail", lambda *_: pytest.fail("frames were scanned"))
    opened = CacheStore(store.root)
    assert len(opened) == 50 and opened.missing([key_of(number) for number in range(51)]) == [key_of(50)]
    assert sum(item.num_bytes for item in opened.items("latents")) > 50 * 4 * TENSORS["latents"].numel()


@pytest.mark.parametrize("at", [-1, 0, 9, 40])
def test_damaged_items_are_found_removed_and_missing(store, at):
    key = key_of(1)
    for number in range(3):
        store.put(key_of(number), TENSORS)
    damage_item(store, key, at)
    assert CacheStore(store.root).damage(key) == "does not match its checksum"
    assert store.damage(key) == "does not match its checksum"  # also where this process has checked it before
    assert CacheStore(store.root).has(key)
    by_get, by_verify = CacheStore(store.root), CacheStore(store.root)
    with pytest.raises(UserError, match=rf"{key}.*damaged and has been removed.*--cache_only") as caught:
        by_get.get(key)
    assert str(store.root) in str(caught.value)
    assert not by_verify.verify(key) and by_verify.missing([key]) == [key]
    fresh = CacheStore(store.root)
    assert fresh.missing([key_of(number) for number in range(3)]) == [key]
    fresh.put(key, TENSORS)
    assert same(by_get.get(key), TENSORS) and same(by_verify.get(key), TENSORS)


def test_a_shard_cut_short_loses_what_was_cut_and_no_more(store):
    for number in range(5):
        store.put(key_of(number), TENSORS)
    (path,) = shard_files(store)
    path.write_bytes(path.read_bytes()[: store.place(key_of(3)).entry.offset + 100])
    opened = CacheStore(store.root)
    assert opened.missing([key_of(number) for number in range(5)]) == [key_of(3), key_of(4)]
    with pytest.raises(UserError, match="missing or was damaged"):
        store.get(key_of(4))  # opened before the cut
    assert same(store.get(key_of(2)), TENSORS)
    opened.put(key_of(4), TENSORS)
    assert same(CacheStore(store.root).get(key_of(4)), TENSORS)


def test_a_whole_or_missing_item_has_no_damage(store):
    store.put(key_of(1), TENSORS)
    assert CacheStore(store.root).damage(key_of(1)) is None
    assert store.damage(key_of(2)) is None


def test_peeking_never_removes(store):
    store.put(key_of(1), TENSORS)
    store.put(key_of(2), TENSORS)
    assert same(store.peek(key_of(1)), TENSORS)
    damage_item(store, key_of(1))
    with pytest.raises(ValueError, match="checksum"):
        CacheStore(store.root).peek(key_of(1))
    assert CacheStore(store.root).has(key_of(1)) and same(store.peek(key_of(2)), TENSORS)
    with pytest.raises(KeyError):
        store.peek(key_of(3))


def test_all_keys_of_a_kind_are_listed(store):
    assert store.kinds() == [] and list(store.keys("latents")) == []
    keys = sorted(key_of(number << 120 | number) for number in range(20))
    for key in [*keys, key_of(3, "text")]:
        store.put(key, {"x": torch.zeros(1)})
    for other in ("notes.txt", ".x.index.y.tmp", "stray.index"):
        (store.root / "shards" / other).touch()
    for opened in (store, CacheStore(store.root)):
        assert opened.kinds() == ["latents", "text"]
        assert list(opened.keys("latents")) == keys and list(opened.keys("text")) == [key_of(3, "text")]


def test_a_checksum_is_compared_once_per_process(store, monkeypatch):
    store.put(key_of(1), TENSORS)
    opened = CacheStore(store.root)
    calls = []
    original = shards.Shard.is_whole
    monkeypatch.setattr(shards.Shard, "is_whole", lambda *args: calls.append(1) or original(*args))
    for _ in range(3):
        opened.get(key_of(1))
    assert len(calls) == 1
    opened.verify(key_of(1))
    assert len(calls) == 2


def test_an_item_that_is_not_there(store):
    with pytest.raises(UserError, match="missing"):
        store.get(key_of(1))
    assert not store.verify(key_of(1))
    with pytest.raises(KeyError):
        store.metadata(key_of(1))


def test_only_keys_name_items(store):
    with pytest.raises(ValueError, match="not a cache key"):
        store.has("latents/abc")


def test_shards_are_filled_and_gone_on_with(store, monkeypatch):
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 6000)
    store.put(key_of(0), TENSORS)
    store.put(key_of(1), {"x": torch.zeros(10)})
    assert len(shard_files(store)) == 2  # the first one is over its size with one item
    store.flush()
    for number in range(2, 6):
        opened = CacheStore(store.root)
        opened.put(key_of(number), {"x": torch.zeros(10)})
        opened.flush()
    assert len(shard_files(store)) == 2
    busy = CacheStore(store.root)
    busy.put(key_of(7), {"x": torch.zeros(10)})
    store.put(key_of(8), {"x": torch.zeros(10)})  # a shard of its own, because the other one is in use
    assert len(shard_files(store)) == 3
    assert len(CacheStore(store.root)) == 8


@pytest.mark.parametrize(
    ("text", "remedy"),
    [("1\n", "delete "), ("99 of the future", "the version that made it"), ("3", "made it"), ("", "made it")],
)
def test_another_format_is_refused_and_left_alone(store, text, remedy):
    (store.root / "FORMAT").write_text(text)
    with pytest.raises(
        UserError, match=rf"FORMAT: this cache has format .* reads format {STORE_FORMAT}; .*{remedy}"
    ):
        CacheStore(store.root)
    assert (store.root / "FORMAT").read_text() == text


def test_a_store_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        CacheStore(tmp_path / "file" / "cache")


def test_a_failed_put_leaves_nothing(store, monkeypatch):
    store.put(key_of(0), TENSORS)

    def full(*_: object) -> None:
        raise OSError(28, "No space left")

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "pwrite", full)
        with pytest.raises(UserError, match="disk is full"):
            store.put(key_of(1), TENSORS)
    assert not store.has(key_of(1)) and not CacheStore(store.root).has(key_of(1))
    store.put(key_of(1), TENSORS)
    assert same(CacheStore(store.root).get(key_of(1)), TENSORS)


WRITER = """
import sys, torch
from pathlib import Path
from utils.data.cache import CacheStore
store = CacheStore(Path(sys.argv[1]))
for turn in range(3):
    for number in range(40):
        store.put(f"latents/{number:032x}", {"x": torch.full((1000,), float(number))})
        if number % 10 == 9:
            store.flush()
            assert store.get(f"latents/{number - 5:032x}")["x"][0] == number - 5
"""


TAKER = """
import sys, torch
from pathlib import Path
from utils.data.cache import CacheStore
rank = int(sys.argv[2])
sys.stdin.readline()
for turn in range(80):
    store = CacheStore(Path(sys.argv[1]))
    store.put(f"latents/{1000 * rank + turn:032x}", {"x": torch.full((50,), float(turn))})
    store.flush()
"""


def test_processes_that_take_over_each_others_shards_lose_nothing(tmp_path):
    root = tmp_path / "cache"
    writers = [
        subprocess.Popen([sys.executable, "-c", TAKER, str(root), str(rank)], stdin=subprocess.PIPE)
        for rank in range(3)
    ]
    for writer in writers:
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    store = CacheStore(root)
    for rank in range(3):
        for turn in range(80):
            assert store.get(key_of(1000 * rank + turn))["x"].tolist() == [float(turn)] * 50
    assert len(store) == 240 and len(shard_files(store)) <= 3


def test_processes_that_write_the_same_items_do_no_harm(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "cache")]
    writers = [subprocess.Popen(command) for _ in range(2)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    store = CacheStore(tmp_path / "cache")
    assert store.missing(key_of(number) for number in range(40)) == []
    for number in range(40):
        assert torch.equal(store.get(key_of(number))["x"], torch.full((1000,), float(number)))
        assert store.damage(key_of(number)) is None
    names = {path.suffix for path in store.root.rglob("*") if path.is_file()}
    assert names == {".shard", ".index", ""} and len(shard_files(store)) <= 2
