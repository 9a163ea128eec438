"""Shards: what a killed or crashed writer leaves is known for what it is, and never read as an item."""

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data import shards
from utils.data.frames import ALIGNMENT
from utils.data.shards import Shard, ShardWriter, has_room, kind_of, shard_paths

DIGESTS = [bytes([number]) * 16 for number in range(6)]
PAYLOADS = [bytes([number]) * (number * 37) for number in range(6)]


@pytest.fixture
def written(tmp_path):
    """A shard of six items of different lengths, the first of them empty, and its entries."""
    writer = ShardWriter.create(tmp_path, "latents")
    entries = [writer.append(digest, payload) for digest, payload in zip(DIGESTS, PAYLOADS, strict=True)]
    writer.close()
    return writer.path, entries


def read(path):
    shard = Shard(path)
    return shard, shard.refresh()


def test_there_and_back(written):
    path, entries = written
    shard, found = read(path)
    assert found == entries and [entry.digest for entry in found] == DIGESTS
    for entry, payload in zip(found, PAYLOADS, strict=True):
        assert bytes(shard.payload(entry)) == payload and shard.is_whole(entry)
        assert entry.offset % ALIGNMENT == 0
    assert shard.end == path.stat().st_size and shard.refresh() == []
    assert kind_of(path) == "latents" and list(shard_paths(path.parent)) == [path]


def test_an_index_is_a_shortcut_and_no_more(written):
    path, entries = written
    path.with_suffix(".index").unlink()
    assert read(path)[1] == entries


@pytest.mark.parametrize("kept", range(7))
def test_what_the_index_lacks_is_read_from_the_shard(written, kept):
    path, entries = written
    index = path.with_suffix(".index")
    index.write_bytes(index.read_bytes()[: 64 * kept + 17 * (kept % 2)])  # a record torn in the middle
    assert read(path)[1] == entries


@settings(max_examples=60)
@given(data=st.data())
def test_a_torn_tail_is_never_an_item(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("torn")
    writer = ShardWriter.create(folder, "latents")
    entries = [writer.append(digest, payload) for digest, payload in zip(DIGESTS, PAYLOADS, strict=True)]
    writer.close()
    path, index = writer.path, writer.path.with_suffix(".index")
    size = data.draw(st.integers(0, path.stat().st_size))
    index_size = data.draw(st.integers(0, 6 * 64))
    os.truncate(path, size)
    os.truncate(index, index_size)
    whole = [entry for entry in entries if entry.end <= size]
    # A frame counts with or without its padding where the index vouches for it.
    vouched = [entry for entry in entries[: index_size // 64] if entry.offset + entry.length <= size]
    shard, found = read(path)
    assert found == max(whole, vouched, key=len)
    assert all(shard.is_whole(entry) for entry in found if entry.end <= size)
    adopted = ShardWriter.adopt(path)
    assert adopted is not None
    more = adopted.append(b"n" * 16, b"new")
    adopted.close()
    assert read(path)[1] == [*found, more]
    assert index.stat().st_size == 64 * (len(found) + 1)


@pytest.mark.parametrize("place", [0, 20, 40, 56])
def test_a_damaged_index_record_is_not_believed(written, place):
    path, entries = written
    index = path.with_suffix(".index")
    content = bytearray(index.read_bytes())
    content[64 * 2 + place] ^= 4
    index.write_bytes(content)
    assert read(path)[1] == entries


def test_a_flipped_bit_in_an_item_is_found(written):
    path, entries = written
    content = bytearray(path.read_bytes())
    content[entries[3].offset] ^= 1
    path.write_bytes(content)
    shard, found = read(path)
    assert [shard.is_whole(entry) for entry in found] == [True, True, True, False, True, True]
    path.with_suffix(".index").unlink()
    # Without the index the damaged frame is not known for an item, and all others are.
    assert read(path)[1] == entries[:3] + entries[4:]
    content[entries[3].offset - 64] ^= 1  # its header as well
    path.write_bytes(content)
    assert read(path)[1] == entries[:3] + entries[4:]
    adopted = ShardWriter.adopt(path)
    assert adopted is not None
    adopted.close()
    assert read(path)[1] == entries[:3] + entries[4:]


def test_a_shard_has_one_writer(written):
    path, _ = written
    first = ShardWriter.adopt(path)
    assert first is not None and ShardWriter.adopt(path) is None
    first.close()
    assert ShardWriter.adopt(path) is not None


def test_a_new_shard_is_locked_before_anybody_can_see_it(tmp_path, monkeypatch):
    lock = shards._lock

    def adopted_by_others_meanwhile(file) -> bool:
        assert [ShardWriter.adopt(path) for path in shard_paths(tmp_path)] == []
        return lock(file)

    monkeypatch.setattr(shards, "_lock", adopted_by_others_meanwhile)
    writer = ShardWriter.create(tmp_path, "latents")
    monkeypatch.undo()
    assert list(shard_paths(tmp_path)) == [writer.path] and ShardWriter.adopt(writer.path) is None
    assert {path.suffix for path in tmp_path.iterdir()} == {".shard", ".index"}


def test_a_writer_that_is_forgotten_gives_its_shard_free(written):
    path, _ = written
    ShardWriter.adopt(path)
    adopted = ShardWriter.adopt(path)
    assert adopted is not None
    adopted.close()


def test_without_locks_every_writer_has_a_shard_of_its_own(written, monkeypatch):
    path, _ = written

    def unsupported(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(shards.fcntl, "flock", unsupported)
    assert ShardWriter.adopt(path) is None
    ShardWriter.create(path.parent, "latents").close()
    assert len(list(shard_paths(path.parent))) == 2


def test_a_reader_sees_what_a_writer_adds(tmp_path):
    writer = ShardWriter.create(tmp_path, "text")
    shard = Shard(writer.path)
    assert shard.refresh() == []
    first = writer.append(DIGESTS[1], PAYLOADS[1])
    assert shard.refresh() == [first]
    mapped = shard.payload(first)
    second = writer.append(DIGESTS[2], PAYLOADS[2])
    third = writer.append(DIGESTS[2], b"", is_tombstone=True)
    assert shard.refresh() == [second, third] and third.is_tombstone
    assert bytes(shard.payload(second)) == PAYLOADS[2] and bytes(mapped) == PAYLOADS[1]
    # A frame whose record has not been written yet is found as well, once.
    index = writer.path.with_suffix(".index")
    fourth = writer.append(DIGESTS[4], PAYLOADS[4])
    record = index.read_bytes()
    os.truncate(index, len(record) - 64)
    assert shard.refresh() == [fourth]
    index.write_bytes(record)
    fifth = writer.append(DIGESTS[5], PAYLOADS[5])
    assert shard.refresh() == [fifth]


@pytest.mark.parametrize("failing_write", [0, 1, 2, 3])
def test_a_failed_write_leaves_both_files_as_they_were(written, monkeypatch, failing_write):
    path, entries = written
    writer = ShardWriter.adopt(path)
    assert writer is not None
    before = path.read_bytes(), path.with_suffix(".index").read_bytes()
    calls = []
    pwrite = os.pwrite

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > failing_write:
            pwrite(descriptor, data[: len(data) // 2], offset)
            raise OSError(28, "No space left")
        return pwrite(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            writer.append(DIGESTS[0], b"x" * 1000)
    assert (path.read_bytes(), path.with_suffix(".index").read_bytes()) == before
    assert writer.append(DIGESTS[0], b"x").digest == DIGESTS[0]
    assert len(read(path)[1]) == len(entries) + 1


def test_a_shard_that_is_gone_is_an_error_that_says_so(written):
    path, entries = written
    shard, _ = read(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        shard.payload(entries[1])
    assert ShardWriter.adopt(path) is None


MANY = """
import resource, sys
from pathlib import Path
from utils.data.shards import Shard, ShardWriter, shard_paths
from utils.errors import UserError
root, hard = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
for number in range(100):
    writer = ShardWriter.create(root, "latents")
    writer.append(bytes([number]) * 16, b"x")
    writer.close()
try:
    kept = [(shard := Shard(path), shard.payload(shard.refresh()[0])) for path in shard_paths(root)]
    print(len(kept))
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(("hard", "answer"), [(4096, "100\n"), (64, "may open no more than 64 files")])
def test_more_shards_than_files_may_be_open(tmp_path, hard, answer):
    command = [sys.executable, "-c", MANY, str(tmp_path), str(hard)]
    assert answer in subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_shards_have_a_largest_size(monkeypatch):
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 1000)
    assert has_room(0, 5000) and has_room(500, 400) and not has_room(500, 600)
