import json
import os
import shutil

import pytest
import xxhash

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


def known_set(root):
    """Two old files and a memo beside them that knows both."""
    root.mkdir(parents=True)
    paths = [make_old(root / name, f"content of {name}") for name in ("a.png", "b.png")]
    memo = HashMemo(root / ".cache" / "hashes.jsonl")
    for path in paths:
        memo.media_info(path)
        memo.content_hash(path)
    memo.save()
    return paths, [content_hash(path) for path in paths]


def test_trust_takes_a_known_size_for_an_unchanged_file_and_writes_nothing_down(tmp_path, reads):
    (one, other), (digest, _) = known_set(tmp_path / "set")
    memo_path = tmp_path / "set" / ".cache" / "hashes.jsonl"
    before = memo_path.read_bytes()
    os.utime(one, ns=(OLD_NS + 1, OLD_NS + 1))
    reads.clear()
    memo = HashMemo(memo_path, trust_sizes=True)
    for _ in range(2):
        assert memo.media_info(one) == MediaInfo("image", 64, 64)
        assert memo.content_hash(one) == digest
    assert memo.content_hash(other) == content_hash(other)
    assert (reads, memo.num_trusted, memo.num_read) == ([], 1, 0)
    memo.save()
    assert memo_path.read_bytes() == before
    # A later run without trust looks again.
    assert HashMemo(memo_path).content_hash(one) == digest
    assert reads == ["hash a.png"]


def test_trust_knows_files_that_were_copied_together_with_their_memo(tmp_path, reads):
    _, digests = known_set(tmp_path / "here" / "set")
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copyfile)
    shutil.rmtree(tmp_path / "here")
    reads.clear()
    paths = [tmp_path / "there" / "set" / name for name in ("a.png", "b.png")]
    memo_path = tmp_path / "there" / "set" / ".cache" / "hashes.jsonl"
    memo = HashMemo(memo_path, trust_sizes=True)
    assert [memo.content_hash(path) for path in paths] == digests
    assert (reads, memo.num_trusted, memo.num_read) == ([], 2, 0)
    assert [HashMemo(memo_path).content_hash(path) for path in paths] == digests
    assert reads == ["hash a.png", "hash b.png"]


def test_trust_ends_where_the_size_or_the_name_is_another_or_the_caller_says_so(tmp_path, reads):
    (one, other), (_, digest) = known_set(tmp_path / "set")
    make_old(one, "longer than it was before")
    make_old(other, "CONTENT OF B.PNG")
    os.utime(other, ns=(OLD_NS + 1, OLD_NS + 1))
    renamed = make_old(tmp_path / "set" / "c.png", "content of b.png")
    reads.clear()
    memo = HashMemo(tmp_path / "set" / ".cache" / "hashes.jsonl", trust_sizes=True)
    assert memo.content_hash(one) == content_hash(one)
    assert memo.content_hash(renamed) == content_hash(renamed) == digest
    assert memo.content_hash(other) == digest  # what is risked: its content is another by now
    assert memo.content_hash(other, compare_time=True) == content_hash(other) != digest
    assert reads == ["hash a.png", "hash c.png", "hash b.png"]
    assert memo.num_read == 2  # the last was none of those that could have been trusted


def test_a_memo_of_the_format_before_is_still_read(tmp_path, reads):
    (one, _), (digest, _) = known_set(tmp_path / "set")
    memo_path = tmp_path / "set" / ".cache" / "hashes.jsonl"
    lines = [json.loads(line) for line in memo_path.read_text().splitlines()[1:]]
    body = "".join(json.dumps({k: v for k, v in line.items() if k != "relative"}) + "\n" for line in lines)
    memo_path.write_text(f"hash-memo 1 {xxhash.xxh3_128_hexdigest(body.encode())}\n{body}")
    reads.clear()
    assert HashMemo(memo_path).content_hash(one) == digest
    assert reads == []


def test_files_are_found_by_their_content(tmp_path):
    paths = [
        make_old(tmp_path / "a.pth"),
        make_old(tmp_path / "b.pth"),
        make_old(tmp_path / "c.pth", "other"),
    ]
    memo = HashMemo(tmp_path / "memo")
    digests = [memo.content_hash(path) for path in paths]
    memo.save()
    again = HashMemo(tmp_path / "memo", read_only=True)
    assert again.paths_of(digests[0]) == [str(paths[0]), str(paths[1])]
    assert again.paths_of(digests[2]) == [str(paths[2])] and again.paths_of("unknown") == []


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
