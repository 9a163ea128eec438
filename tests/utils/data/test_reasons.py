"""Why items are made anew, from what they were made of before."""

import json

import pytest

from utils.data.cache_keys import LATENTS, TEXT
from utils.data.reasons import MadeOf, Want, caption_identity, describe


def latents(number: int, **parts: object) -> Want:
    made_of = {"content": "a", "bucket": [64, 64, 1], "weights": "vae", "settings": {"x": 1}, **parts}
    return Want(LATENTS, f"latents/{number}{json.dumps(made_of)}", str(number), made_of)


def text(caption: str, samples: tuple[str, ...] = ("1",), **parts: object) -> Want:
    made_of = {"caption": caption, "weights": "encoder", "tokenizer": "t", **parts}
    return Want(TEXT, f"text/{caption}{json.dumps(made_of)}", caption_identity(caption), made_of, samples)


@pytest.fixture
def path(tmp_path):
    MadeOf(tmp_path / "made_of.json").remember([latents(1), latents(2), text("a circle"), text("", ())])
    return tmp_path / "made_of.json"


@pytest.mark.parametrize(
    ("want", "reason"),
    [
        (latents(3), "new"),
        (latents(1), "removed or damaged"),
        (latents(1, content="b"), "file changed"),
        (latents(1, bucket=[64, 64, 5]), "bucket changed"),
        (latents(1, weights="other"), "VAE changed"),
        (latents(1, weights="other", content="b"), "file changed and VAE changed"),
        (latents(1, settings={"x": 2}), "settings changed"),
        (text("a circle", weights="other"), "text encoder changed"),
        (text("a circle", tokenizer="other"), "tokenizer changed"),
        (text("a square"), "caption changed"),
        (text("a square", ("7",)), "new"),
        (text("", ()), "removed or damaged"),
    ],
)
def test_each_reason_is_found(path, want, reason):
    assert MadeOf(path).reasons([want, want, latents(2)], {want.key}) == {reason: 1}


def test_only_what_is_missing_is_counted(path):
    assert not MadeOf(path).reasons([latents(1), latents(5)], set())


def test_the_last_time_counts_and_others_stay(path):
    MadeOf(path).remember([latents(1, content="b")])
    again = MadeOf(path)
    assert again.reasons([latents(1, content="b")], {latents(1, content="b").key}) == {
        "removed or damaged": 1
    }
    assert again.reasons([latents(2, content="b")], {latents(2, content="b").key}) == {"file changed": 1}


def test_what_is_known_is_told_by_identity(path):
    known = MadeOf(path).known(TEXT)
    assert known.keys() == {caption_identity("a circle"), caption_identity("")}
    assert known[caption_identity("a circle")] == {"weights": "encoder", "tokenizer": "t"}


def test_nothing_new_is_not_written(path):
    before = path.stat().st_mtime_ns, path.read_text()
    MadeOf(path).remember([latents(1), text("a circle")])
    assert (path.stat().st_mtime_ns, path.read_text()) == before


def test_captions_are_not_written(path):
    assert "circle" not in path.read_text()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 2}', '{"format": 1, "latents": 3}'])
def test_another_or_damaged_file_counts_as_empty(path, content):
    path.write_text(content)
    assert MadeOf(path).reasons([latents(1)], {latents(1).key}) == {"new": 1}
    MadeOf(path).remember([latents(1)])
    assert MadeOf(path).reasons([latents(1)], {latents(1).key}) == {"removed or damaged": 1}


def test_reasons_in_words():
    assert describe({"new": 2, "file changed": 5, "asked for": 0}) == "5 file changed, 2 new"
