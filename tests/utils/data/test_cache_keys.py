"""A key changes exactly when the item would."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.data import cache_keys
from utils.data.buckets import Bucket, MediaRules
from utils.data.cache_keys import LATENTS, TEXT, latent_parts, make_key, split_key, text_parts
from utils.data.media import MediaInfo

RULES = MediaRules(fps=16.0, pixel_multiple=16)


def latent_key(*arguments) -> str:
    return make_key(LATENTS, latent_parts(*arguments))


def text_key(*arguments) -> str:
    return make_key(TEXT, text_parts(*arguments))


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
    monkeypatch.setattr(cache_keys, "PREPROCESSING_VERSION", 0)
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


words = st.text(max_size=6)


@given(left=st.tuples(words, words, words, words), right=st.tuples(words, words, words, words))
def test_keys_are_equal_exactly_where_all_parts_are(left, right):
    assert (text_key(*left) == text_key(*right)) == (left == right)


def test_a_key_falls_into_kind_and_digest():
    key = text_key("a circle", "e", "t", "float32")
    assert split_key(key) == ("text", bytes.fromhex(key[5:]))


@pytest.mark.parametrize(
    "key", ["latents/abc", "../" + "0" * 32, "0" * 32, "latents/" + "G" * 32, "a/b/" + "0" * 32]
)
def test_only_keys_name_items(key):
    with pytest.raises(ValueError, match="not a cache key"):
        split_key(key)


def test_keys_are_stable_over_versions(make_record):
    # A change here makes every cache in use worthless: make it knowingly.
    assert latent_key(make_record(), RULES, "vae", "float32") == "latents/ef2c474c7971cd2ce4a8ccce9ce4437d"
    assert text_key("a circle", "e", "t", "float32") == "text/194d2fc557df4abe81cc127ca7c9820c"
