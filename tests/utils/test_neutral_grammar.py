"""The grammar of neutral captions: how many, how varied, always the same, and in good order."""

import hashlib
import re

from utils.neutral_grammar import NUM_CAPTIONS, neutral_captions

# What the captions are is part of what a solved adapter follows from: a change of the grammar is meant, and seen here.
FIRST_100 = "f7a7679d9869322b"


def test_they_are_several_thousand_different_ones():
    captions = neutral_captions()
    assert len(set(captions)) == len(captions) == NUM_CAPTIONS >= 3000
    assert len({word for caption in captions for word in re.findall(r"\w+", caption)}) > 380
    lengths = [len(caption.split()) for caption in captions]
    assert min(lengths) <= 4 and max(lengths) >= 25


def test_they_are_the_same_every_time():
    assert neutral_captions(50) == neutral_captions(200)[:50]
    digest = hashlib.sha256("\n".join(neutral_captions(100)).encode()).hexdigest()
    assert digest[:16] == FIRST_100


def test_they_are_plain_sentences():
    for caption in neutral_captions(2000):
        assert re.fullmatch(r"[a-z][a-z ,-]*[a-z]", caption), caption
        assert "{" not in caption and "  " not in caption
        assert not re.search(r"\ba (?=[aeiou])", caption) and not re.search(r"\ban (?![aeiou])", caption)
