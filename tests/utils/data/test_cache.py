import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from utils.data import cache as cache_module
from utils.data.buckets import Bucket, MediaRules
from utils.data.cache import CacheStore, latent_key, text_key
from utils.data.media import MediaInfo
from utils.errors import UserError

RULES = MediaRules(fps=16.0, pixel_multiple=16)
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


def test_latent_key_changes_exactly_when_it_must(make_record, monkeypatch):
    record = make_record()
    key = latent_key(record, RULES, "vae", "float32")
    assert key.startswith("latents/")
    assert key == latent_key(make_record(), MediaRules(16.0, 16), "vae", "float32", {})
    unaffected = [
        make_record(captions=("another",)),
        make_record(path=Path("elsewhere/b.mov")),
        make_record(sample_id=2),
        make_record(num_repeats=3.0),
    ]
    assert {latent_key(other, RULES, "vae", "float32") for other in unaffected} == {key}
    # What these two do to the pixels is in the bucket already.
    assert latent_key(record, MediaRules(16.0, 32, 8), "vae", "float32") == key
    others = [
        latent_key(make_record(content_hash="1" * 32), RULES, "vae", "float32"),
        latent_key(make_record(bucket=Bucket(64, 64, 9)), RULES, "vae", "float32"),
        latent_key(make_record(bucket=Bucket(64, 48, 5)), RULES, "vae", "float32"),
        latent_key(make_record(clip_start_seconds=0.5), RULES, "vae", "float32"),
        latent_key(record, replace(RULES, fps=24.0), "vae", "float32"),
        latent_key(record, RULES, "other vae", "float32"),
        latent_key(record, RULES, "vae", "bfloat16"),
        latent_key(record, RULES, "vae", "float32", {"tiling": True}),
    ]
    monkeypatch.setattr(cache_module, "PREPROCESSING_VERSION", 0)
    others.append(latent_key(record, RULES, "vae", "float32"))
    assert len({key, *others}) == 1 + len(others)


def test_latent_key_of_an_image_knows_no_frame_rate(make_record):
    image = make_record(kind="image", bucket=Bucket(64, 64, 1), info=MediaInfo("image", 64, 64))
    assert latent_key(image, RULES, "vae", "float32") == latent_key(
        image, replace(RULES, fps=24.0), "vae", "float32"
    )


def test_text_key_changes_exactly_when_it_must():
    arguments = ["a circle", "encoder", "tokenizer", "bfloat16", {"attention": "sdpa", "max_tokens": 512}]
    key = text_key(*arguments)
    assert key.startswith("text/")
    assert key == text_key(*arguments[:4], {"max_tokens": 512, "attention": "sdpa"})
    others = [
        text_key(*[value if index != place else other for index, value in enumerate(arguments)])
        for place, other in enumerate(
            ["a circle ", "tuned", "x", "float32", {"attention": "eager", "max_tokens": 512}]
        )
    ]
    # Moving a boundary between two parts does not give the same text to hash.
    others.append(text_key("a circlee", "ncoder", *arguments[2:]))
    assert len({key, *others}) == 7


def test_there_and_back(store):
    key = key_of(1)
    assert not store.has(key)
    store.put(key, TENSORS, {"path": "a.mp4"})
    for opened in (store, CacheStore(store.root)):
        assert opened.has(key)
        assert same(opened.get(key), TENSORS)
        assert opened.verify(key)
    assert store.metadata(key) == {"path": "a.mp4"}
    assert same(load_file(store.path(key)), TENSORS)  # an ordinary safetensors file


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
)
def test_there_and_back_for_all_shapes(tmp_path_factory, shape, dtype):
    store = CacheStore(tmp_path_factory.getbasetemp() / "shapes")
    tensors = {"x": (torch.rand(shape) * 100).to(dtype)}
    store.put(key_of(0), tensors)
    assert same(CacheStore(store.root).get(key_of(0)), tensors)


def test_strided_tensors_and_gradients_are_stored_plain(store):
    strided = torch.randn(4, 6, requires_grad=True).T[::2]
    store.put(key_of(1), {"x": strided, "y": strided})
    assert same(store.get(key_of(1)), {"x": strided.detach(), "y": strided.detach()})


def test_put_replaces(store):
    store.put(key_of(1), {"x": torch.zeros(3)})
    mapped = store.get(key_of(1))["x"]
    store.put(key_of(1), {"x": torch.ones(5)})
    assert torch.equal(store.get(key_of(1))["x"], torch.ones(5))
    assert torch.equal(mapped, torch.zeros(3))  # whoever reads the old one still does


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


def test_missing_does_not_ask_for_each_file(store, monkeypatch):
    keys = [key_of(number) for number in range(500)]  # all in one folder
    store.put(keys[0], {"x": torch.zeros(1)})
    listed = []
    original = cache_module.os.scandir
    monkeypatch.setattr(cache_module.os, "scandir", lambda path: listed.append(path) or original(path))
    monkeypatch.setattr(Path, "stat", lambda *_args, **_keys: pytest.fail("stat"))
    assert len(store.missing(keys)) == 499
    assert len(listed) == 1


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "header", "other_item"])
def test_damaged_items_are_found_removed_and_missing(store, damage):
    key = key_of(1)
    store.put(key, TENSORS)
    path = store.path(key)
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[-20] ^= 1
    elif damage == "header":
        data[:8] = b"\xff" * 8
    elif damage == "other_item":
        store.put(key_of(2), TENSORS)
        data = bytearray(store.path(key_of(2)).read_bytes())
    path.write_bytes(data[: {"cut": len(data) // 2, "empty": 0}.get(damage, len(data))])
    words = {"bit": "checksum", "other_item": "another item"}.get(damage, "not a whole safetensors file")
    assert words in CacheStore(store.root).damage(key)
    assert words in store.damage(key)  # also where this process has checked the item before
    assert path.exists()
    by_get, by_verify = CacheStore(store.root), CacheStore(store.root)
    content = path.read_bytes()
    assert not by_verify.verify(key)
    assert not path.exists()
    assert by_verify.missing([key]) == [key]
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged and has been removed.*--cache_only") as caught:
        by_get.get(key)
    assert str(path) in str(caught.value)
    assert not path.exists()


def test_a_whole_or_missing_item_has_no_damage(store):
    store.put(key_of(1), TENSORS)
    assert CacheStore(store.root).damage(key_of(1)) is None
    assert store.damage(key_of(2)) is None


def test_all_keys_of_a_kind_are_listed(store):
    assert store.kinds() == [] and list(store.keys("latents")) == []
    keys = sorted(key_of(number << 120 | number) for number in range(20))
    for key in [*keys, key_of(3, "text")]:
        store.put(key, {"x": torch.zeros(1)})
    folder = store.path(keys[0]).parent
    for other in ("notes.txt", f".{'0' * 32}.safetensors.x.tmp", "ff" + "0" * 30 + ".safetensors"):
        (folder / other).touch()
    (store.root / "items" / "latents" / "stray").touch()
    assert store.kinds() == ["latents", "text"]
    assert list(store.keys("latents")) == keys
    assert list(store.keys("text")) == [key_of(3, "text")]


def test_a_checksum_is_compared_once_per_process(store, monkeypatch):
    store.put(key_of(1), TENSORS)
    opened = CacheStore(store.root)
    calls = []
    original = cache_module._checksum
    monkeypatch.setattr(cache_module, "_checksum", lambda tensors: calls.append(1) or original(tensors))
    for _ in range(3):
        opened.get(key_of(1))
    assert len(calls) == 1
    opened.verify(key_of(1))
    assert len(calls) == 2


def test_an_item_that_is_not_there(store):
    with pytest.raises(UserError, match="missing"):
        store.get(key_of(1))
    assert not store.verify(key_of(1))


@pytest.mark.parametrize(
    "key", ["latents/abc", "../" + "0" * 32, "0" * 32, "latents/" + "G" * 32, "a/b/" + "0" * 32]
)
def test_only_keys_name_items(store, key):
    with pytest.raises(ValueError, match="not a cache key"):
        store.has(key)


@pytest.mark.parametrize("text", ["2\n", "99 of the future", ""])
def test_another_format_is_refused_and_left_alone(store, text):
    (store.root / "FORMAT").write_text(text)
    with pytest.raises(UserError, match=r"FORMAT: this cache has format .* reads format 1"):
        CacheStore(store.root)
    assert (store.root / "FORMAT").read_text() == text


def test_a_store_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        CacheStore(tmp_path / "file" / "cache")


def test_a_failed_put_leaves_nothing(store, monkeypatch):
    monkeypatch.setattr(
        "utils.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(UserError, match="disk is full"):
        store.put(key_of(1), TENSORS)
    assert not [path for path in store.root.rglob("*") if path.is_file() and path.name != "FORMAT"]
    assert not store.has(key_of(1))


WRITER = """
import sys, torch
from pathlib import Path
from utils.data.cache import CacheStore
store = CacheStore(Path(sys.argv[1]))
for turn in range(3):
    for number in range(40):
        store.put(f"latents/{number:032x}", {"x": torch.full((1000,), float(number))})
"""


def test_processes_that_write_the_same_items_do_no_harm(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "cache")]
    writers = [subprocess.Popen(command) for _ in range(2)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    store = CacheStore(tmp_path / "cache")
    assert store.missing(key_of(number) for number in range(40)) == []
    for number in range(40):
        assert torch.equal(store.get(key_of(number))["x"], torch.full((1000,), float(number)))
    assert {path.suffix for path in store.root.rglob("*") if path.is_file()} == {".safetensors", ""}


def test_keys_are_stable_over_versions(make_record):
    # A change here makes every cache in use worthless: make it knowingly.
    assert latent_key(make_record(), RULES, "vae", "float32") == "latents/ef2c474c7971cd2ce4a8ccce9ce4437d"
    assert text_key("a circle", "e", "t", "float32") == "text/194d2fc557df4abe81cc127ca7c9820c"
