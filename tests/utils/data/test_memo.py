import os

import pytest

from utils.data import memo as memo_module
from utils.data.media import MediaInfo
from utils.data.memo import HashMemo
from utils.errors import UserError
from utils.files import content_hash

OLD_NS = 1_600_000_000_000_000_000


@pytest.fixture
def reads(monkeypatch):
    """Which files were really read."""
    names = []

    def hashing(path):
        names.append(f"hash {path.name}")
        return content_hash(path)

    def probing(path):
        names.append(f"probe {path.name}")
        return MediaInfo("image", 64, 64)

    monkeypatch.setattr(memo_module, "content_hash", hashing)
    monkeypatch.setattr(memo_module, "probe_media", probing)
    return names


def make_old(path, text="content"):
    path.write_text(text)
    os.utime(path, ns=(OLD_NS, OLD_NS))
    return path


def test_unchanged_files_are_read_once_over_all_runs(tmp_path, reads):
    path = make_old(tmp_path / "a.png")
    for _ in range(3):
        memo = HashMemo(tmp_path / "cache" / "hashes.jsonl")
        for _ in range(2):
            assert memo.content_hash(path) == content_hash(path)
            assert memo.media_info(path) == MediaInfo("image", 64, 64)
        memo.save()
    assert reads == ["hash a.png", "probe a.png"]


def test_a_changed_file_is_read_again_and_others_are_not(tmp_path, reads):
    paths = [make_old(tmp_path / name) for name in ("a.png", "b.png", "c.png")]
    memo = HashMemo(tmp_path / "hashes.jsonl")
    for path in paths:
        memo.content_hash(path)
    memo.save()
    reads.clear()
    paths[0].write_text("other and longer")  # another size
    make_old(paths[1], "CONTENT")
    os.utime(paths[1], ns=(OLD_NS + 1, OLD_NS + 1))  # the same size, another time
    memo = HashMemo(tmp_path / "hashes.jsonl")
    assert [memo.content_hash(path) for path in paths] == [content_hash(path) for path in paths]
    assert reads == ["hash a.png", "hash b.png"]


def test_a_file_that_has_just_been_written_is_not_trusted_next_time(tmp_path, reads):
    path = tmp_path / "a.png"
    path.write_text("fresh")
    for _ in range(2):
        memo = HashMemo(tmp_path / "hashes.jsonl")
        memo.content_hash(path)
        memo.save()
    assert reads == ["hash a.png"] * 2


@pytest.mark.parametrize("damage", ["flip", "cut", "binary", "format", "empty"])
def test_a_damaged_memo_is_made_anew(tmp_path, reads, damage):
    path, memo_path = make_old(tmp_path / "a.png"), tmp_path / "hashes.jsonl"
    memo = HashMemo(memo_path)
    digest = memo.content_hash(path)
    memo.save()
    text = memo_path.read_text()
    assert digest in text
    other = "0" * 32
    changed = {
        "flip": text.replace(digest, other).encode(),
        "cut": text[:-10].encode(),
        "binary": b"\xff\xfe\x00",
        "format": text.replace("hash-memo 2", "hash-memo 0").encode(),
        "empty": b"",
    }
    memo_path.write_bytes(changed[damage])
    memo = HashMemo(memo_path)
    assert memo.content_hash(path) == digest
    assert reads == ["hash a.png"] * 2
    memo.save()
    assert memo_path.read_text() == text


def test_nothing_new_writes_nothing(tmp_path, reads):
    memo_path = tmp_path / "hashes.jsonl"
    HashMemo(memo_path).save()
    assert not memo_path.exists()
    HashMemo().save()
    memo = HashMemo(memo_path)
    memo.content_hash(make_old(tmp_path / "a.png"))
    memo.save()
    memo_path.unlink()
    memo.save()
    assert not memo_path.exists()


def test_names_that_are_not_utf_8_survive(tmp_path, reads):
    path = make_old(tmp_path / os.fsdecode(b"a\xff\nb.png"))
    for _ in range(2):
        memo = HashMemo(tmp_path / "hashes.jsonl")
        memo.content_hash(path)
        memo.save()
    assert len(reads) == 1


def test_failures_are_not_remembered(tmp_path):
    path = make_old(tmp_path / "a.png", "no picture")
    memo = HashMemo(tmp_path / "hashes.jsonl")
    for _ in range(2):
        with pytest.raises(UserError, match=r"a\.png"):
            memo.media_info(path)
    with pytest.raises(OSError, match="No such file"):
        memo.content_hash(tmp_path / "gone.png")


def test_a_read_only_memo_knows_what_there_is_and_writes_nothing(tmp_path, reads):
    known, new = tmp_path / "known.png", tmp_path / "new.png"
    for path in (known, new):
        path.write_bytes(b"content")
        os.utime(path, ns=(OLD_NS, OLD_NS))
    memo = HashMemo(tmp_path / "memo")
    memo.content_hash(known)
    memo.save()
    before = (tmp_path / "memo").read_bytes()
    reads.clear()
    memo = HashMemo(tmp_path / "memo", read_only=True)
    assert memo.content_hash(known) == memo.content_hash(new)
    memo.save()
    assert reads == ["hash new.png"]
    assert (tmp_path / "memo").read_bytes() == before
