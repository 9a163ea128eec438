import random
from collections.abc import Sequence
from itertools import count

import pytest

from scripts.tiny_world.proof_statistics import Outcomes, mean_difference, outcomes, recovered, share

WORDS = ("zorp", "blicket", "daxen")


def told(*seeds: Sequence[float]) -> Outcomes:
    """Every picture with a text of its own, in all seeds the same texts."""
    return Outcomes(
        tuple(tuple(str(index) for index in range(len(one))) for one in seeds), tuple(map(tuple, seeds))
    )


def repeated(means: Sequence[float], times: int) -> Outcomes:
    """A text for each mean, of as many pictures with that outcome."""
    texts = tuple(f"text {index}" for index in range(len(means)) for _ in range(times))
    return Outcomes((texts,), (tuple(mean for mean in means for _ in range(times)),))


def test_share_is_students_interval_over_the_texts():
    # Mean 0.8, s = 0.2739, t = 2.7764 at 4 degrees of freedom (tables): 0.8 +- 0.34, cut at 1.
    found = share(repeated((1.0, 0.5, 1.0, 0.5, 1.0), 8))
    assert (found.value, found.num_texts, found.num_pictures) == (pytest.approx(0.8), 5, 40)
    assert found.low == pytest.approx(0.8 - 2.7764 * 0.27386 / 5**0.5, abs=1e-4)
    assert found.high == 1.0


def test_one_word_of_three_that_fails_completely_gives_a_wide_interval():
    texts = tuple(word for _ in range(24) for word in WORDS)
    one = tuple(float(word != "zorp") for word in texts)
    found = share(Outcomes((texts,) * 3, (one,) * 3))
    assert (found.value, found.num_texts, found.num_pictures) == (pytest.approx(2 / 3), 3, 216)
    # t = 4.3027 at 2 degrees of freedom: +- 1.43, which says nothing.
    assert (found.low, found.high) == (0.0, 1.0)
    # As if the 216 pictures were independent, it would have been 60 to 73 %.
    paired = mean_difference(Outcomes((texts,), (one,)), Outcomes((texts,), ((1.0,) * 72,)))
    assert paired.low == pytest.approx(-1 / 3 - 4.3027 / 3, abs=1e-3)
    assert paired.high == pytest.approx(-1 / 3 + 4.3027 / 3, abs=1e-3)


def test_more_pictures_of_the_same_texts_do_not_narrow_the_interval():
    few, many = (share(repeated((1.0, 0.2, 0.6, 0.4), times)) for times in (2, 50))
    assert (few.low, few.high) == pytest.approx((many.low, many.high))
    assert many.num_pictures == 25 * few.num_pictures


def test_a_text_counts_once_however_often_it_was_drawn():
    found = Outcomes((("a", "a", "a", "b"), ("b", "c")), ((1, 1, 1, 0), (0, 1)))
    assert found.by_text() == {"a": 1, "b": 0, "c": 1}
    assert share(found).value == pytest.approx(2 / 3)
    assert share(found).by_seed == (0.5, 0.5)


def test_where_all_texts_are_alike_or_one_the_interval_is_what_could_have_been_missed():
    found = mean_difference(told([1] * 600), told([1] * 600))
    assert found.value == 0.0
    # Nothing seen in 600 leaves up to 0.6 % with 2.5 % on each side.
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 600))
    assert found.low == -found.high
    assert share(told([1] * 10)).high == 1.0
    assert share(told([1] * 10)).low == pytest.approx(0.025**0.1)
    assert (share(told([1])).low, share(told([0])).high) == pytest.approx((0.025, 0.975))
    # Repeats of one text are one text.
    assert share(repeated((1.0,), 500)).low == pytest.approx(0.025)


def test_intervals_cover_the_truth_about_as_often_as_they_say_though_texts_are_repeated():
    """Texts differ in how well they are drawn (by +- 0.2), and each is drawn twelve times."""
    generator = random.Random(0)
    hits = pooled = 0
    for _ in range(300):
        means = [0.6 + generator.choice((-0.2, 0.2)) for _ in range(24)]
        drawn = [float(generator.random() < mean) for mean in means for _ in range(12)]
        texts = tuple(str(index) for index in range(24) for _ in range(12))
        found = share(Outcomes((texts,), (tuple(drawn),)))
        hits += found.low <= 0.6 <= found.high
        numbers = count()
        alone = share(Outcomes((tuple(str(next(numbers)) for _ in drawn),), (tuple(drawn),)))
        pooled += alone.low <= 0.6 <= alone.high
    assert 0.92 <= hits / 300 <= 0.98
    # As if all pictures were independent, the interval would be too narrow: the test can fail.
    assert pooled / 300 < 0.9


def test_interval_of_a_difference_covers_the_truth_about_as_often_as_it_says():
    generator = random.Random(0)
    hits = 0
    for _ in range(300):
        before = [float(generator.random() < 0.9) for _ in range(216)]
        now = [value if generator.random() > 0.1 else float(generator.random() < 0.5) for value in before]
        found = mean_difference(told(now), told(before))
        hits += found.low <= 0.1 * (0.5 - 0.9) <= found.high
    assert 0.92 <= hits / 300 <= 0.98


def test_values_of_seeds_stand_beside_the_whole():
    found = share(told([1, 1], [0, 1]))
    assert (found.value, found.by_seed, found.num_texts) == (0.75, (1.0, 0.5), 2)
    assert mean_difference(told([1, 1], [0, 1]), told([1, 0], [1, 1])).by_seed == (0.5, -0.5)


def test_different_texts_cannot_be_held_against_each_other():
    with pytest.raises(ValueError, match="different texts"):
        mean_difference(repeated((1.0, 0.0), 2), told([1, 1, 0, 0]))


def test_half_of_a_loss_that_came_back_is_zero():
    base, damaged = told([1.0] * 10), told([1.0] * 4 + [0.0] * 6)
    assert recovered(base, damaged, told([1.0] * 7 + [0.0] * 3), 0.5).value == pytest.approx(0.0)
    assert recovered(base, damaged, base, 0.5).value == pytest.approx(0.3)
    assert recovered(base, damaged, damaged, 0.5).value == pytest.approx(-0.3)


def test_outcomes_are_in_order_of_the_seeds_and_of_one_arm():
    def cell(*right: int):
        return {"text": [f"text {index}" for index in range(len(right))], "both": list(right)}

    results = {
        ("a", 1): {"outcomes": {"known": cell(0, 1), "short": cell(1)}},
        ("b", 0): {"outcomes": {"known": cell(1)}},
        ("a", 0): {"outcomes": {"known": cell(1), "short": cell(0)}},
    }
    assert outcomes(results, "a", "known") == Outcomes((("text 0",), ("text 0", "text 1")), ((1,), (0, 1)))
    assert outcomes(results, "a", ("known", "short")).values == ((1, 0), (0, 1, 1))


def test_pictures_of_one_word():
    found = Outcomes((("one zorp", "it is zorp, here"), ("one daxen", "zorps")), ((1, 0), (1, 1)))
    assert found.with_word("zorp") == Outcomes((("one zorp", "it is zorp, here"), ()), ((1, 0), ()))
