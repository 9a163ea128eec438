"""Caption augmentation: which part of a caption a visit sees, and that it depends on (seed, sample, visit) alone."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.config.schema import CaptionAugConfig, CaptionMix
from utils.data.caption_aug import CaptionAug, build_caption_aug

CAPTION = "a wide quiet scene in which one red circle moves slowly to the right over a dark ground"
NUM_VISITS = 4000
# Four standard deviations of a share of that many visits, at most.
TOLERANCE = 4 * 0.5 / NUM_VISITS**0.5


def build(keywords=("circle",), **values) -> CaptionAug:
    law = (
        {"single_token": 0.3, "trim_prob": 0.5}
        if not {"mix", "single_token", "trim_prob"} & set(values)
        else {}
    )
    aug = build_caption_aug(CaptionAugConfig(enable=True, keywords=tuple(keywords), **(law | values)))
    assert aug is not None
    return aug


def seen(aug: CaptionAug, caption: str = CAPTION, visits: int = NUM_VISITS, seed: int = 0) -> list[str]:
    return [aug.augment(caption, seed, 11, visit) for visit in range(visits)]


def single(keywords, caption: str, **values) -> set[str]:
    """What visits see that see the keyword alone."""
    return set(seen(build(keywords, single_token=1.0, **values), caption, 60))


def window(caption: str, words: int, keyword: str = "circle") -> str:
    (only,) = set(seen(build((keyword,), trim_prob=1.0, trim_window_words=words), caption, 5))
    return only


@pytest.mark.parametrize(
    ("single_token", "trim_prob"), [(0.3, 0.5), (0.0, 0.2), (0.7, None), (None, 1.0), (1.0, 1.0)]
)
def test_the_law_holds_in_the_long_run(single_token, trim_prob) -> None:
    counts = Counter(seen(build(single_token=single_token, trim_prob=trim_prob, trim_window_words=3)))
    one, trim = single_token or 0.0, trim_prob or 0.0
    expected = {
        "circle": one,
        "red circle moves": (1 - one) * trim,
        CAPTION: (1 - one) * (1 - trim),
    }
    assert set(counts) == {text for text, share in expected.items() if share}
    for text, share in expected.items():
        assert counts[text] / NUM_VISITS == pytest.approx(share, abs=TOLERANCE)


def test_mix_is_another_way_to_write_the_same() -> None:
    mix = CaptionMix(single=0.3, short=0.35, verbose=0.35)
    assert seen(build(mix=mix)) == seen(build(single_token=0.3, trim_prob=0.5))
    assert seen(build(mix=mix)) != seen(build(mix=CaptionMix(single=0.35, short=0.3, verbose=0.35)))


def test_it_is_a_function_of_seed_sample_and_visit() -> None:
    aug, again = build(), build()
    forwards = [aug.augment(CAPTION, 5, sample, visit) for sample in range(20) for visit in range(20)]
    backwards = [
        again.augment(CAPTION, 5, sample, visit)
        for sample in reversed(range(20))
        for visit in reversed(range(20))
    ]
    assert forwards == backwards[::-1]
    assert seen(aug, visits=50) != seen(aug, visits=50, seed=1)
    by_sample = [[aug.augment(CAPTION, 0, sample, visit) for visit in range(50)] for sample in (1, 2)]
    assert by_sample[0] != by_sample[1]


@given(
    before=st.lists(st.sampled_from(["a", "red", "dark,", "wide"]), max_size=12),
    after=st.lists(st.sampled_from(["moves", "up.", "slowly"]), max_size=12),
    keyword=st.sampled_from(["circle", "blue square", "five-pointed star"]),
    words=st.integers(1, 9),
)
def test_a_window_holds_the_keyword_and_has_its_length(before, after, keyword, words) -> None:
    caption = " ".join([*before, keyword, *after])
    short = window(caption, words, keyword)
    assert keyword in short and short in caption
    own = len(keyword.split())
    assert len(short.split()) == min(max(words, own), len(caption.split()))
    start = caption.index(short)
    left = len(caption[:start].split())
    right = len(caption[start + len(short) :].split())
    shown_left = len(before) - left
    shown_right = len(after) - right
    # In the middle, unless one of the caption's ends is reached.
    assert abs(shown_left - shown_right) <= 1 or left == 0 or right == 0


def test_a_window_keeps_what_stands_at_the_keyword_and_the_spacing() -> None:
    assert window("one  (circle),  two three", 2) == "(circle),  two"
    assert window("circle", 5) == "circle"
    assert window("one two circle", 2) == "two circle"


@pytest.mark.parametrize("caption", ["", "a blue square", "circles", "semicircle", "circle_2", "a Circle"])
def test_a_caption_without_a_keyword_stays_whole(caption) -> None:
    aug = build(single_token=1.0, case_insensitive=False)
    assert set(seen(aug, caption, 20)) == {caption}


def test_case_and_spaces_of_the_caption_are_kept() -> None:
    assert single(["circle"], "a Circle, a CIRCLE") == {"Circle", "CIRCLE"}
    assert single(["Blue  Square"], "a blue\n square here") == {"blue\n square"}
    assert single(["Circle"], "a Circle, a circle", case_insensitive=False) == {"Circle"}


def test_the_longest_keyword_counts_and_the_order_of_the_list_does_not() -> None:
    words = ["circle", "red circle", "red"]
    caption = "a red circle and a red square"
    assert single(words, caption) == {"red circle", "red"}
    aug, turned = build(words), build(words[::-1])
    assert seen(aug, caption, 200) == seen(turned, caption, 200)
    assert aug.keywords_digest == turned.keywords_digest != build(words[:2]).keywords_digest


def test_each_place_is_as_likely() -> None:
    counts = Counter(seen(build(["circle", "square"], single_token=1.0), "a circle, a square"))
    assert counts["circle"] / NUM_VISITS == pytest.approx(0.5, abs=TOLERANCE)


def test_signs_in_a_keyword_are_plain_text() -> None:
    assert single(["c++ (2d)", "a.b"], "c++ (2d) and axb") == {"c++ (2d)"}


def test_a_file_is_another_way_to_give_the_keywords(tmp_path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("square\ncircle\n")
    from_file = build((), keywords_file=str(path))
    assert seen(from_file, visits=100) == seen(build(["circle", "square"]), visits=100)
    assert from_file.keywords_digest == build(["circle", "square"]).keywords_digest
    assert str(path) not in from_file.pattern.pattern


def test_nothing_where_there_is_no_section_or_it_is_off() -> None:
    assert build_caption_aug(None) is None
    assert build_caption_aug(CaptionAugConfig(enable=False, keywords=("circle",), single_token=1.0)) is None


def test_captions_with_a_keyword_are_counted() -> None:
    assert build().num_with_keyword(["a circle", "circles", "Circle", ""]) == 2
