import random

import pytest

from scripts.tiny_world.proof_statistics import mean_difference, outcomes, recovered, share


def test_share_has_wilsons_interval():
    # Wilson's interval of 8 of 10, and of 10 of 10, as statistics tables have them.
    found = share([[1] * 8 + [0] * 2])
    assert (found.value, found.count) == (0.8, 10)
    assert (round(found.low, 4), round(found.high, 4)) == (0.4902, 0.9433)
    assert share([[1] * 10]).high == 1.0
    assert round(share([[1] * 10]).low, 4) == 0.7225
    assert share([[0] * 5, [0] * 5]).low == 0.0


def test_values_of_seeds_stand_beside_the_pooled_one():
    found = share([[1, 1], [0, 1]])
    assert (found.value, found.by_seed) == (0.75, (1.0, 0.5))
    assert mean_difference([[1, 1], [0, 1]], [[1, 0], [1, 1]]).by_seed == (0.5, -0.5)


def test_pairs_that_never_differ_still_have_a_width():
    found = mean_difference([[1] * 600], [[1] * 600])
    assert found.value == 0.0
    # Nothing seen in 600 leaves up to 0.6 % with 2.5 % on each side.
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 600))
    assert found.low == -found.high


def test_interval_of_a_difference_covers_the_truth_about_as_often_as_it_says():
    generator = random.Random(0)
    hits = 0
    for _ in range(300):
        before = [float(generator.random() < 0.9) for _ in range(216)]
        now = [value if generator.random() > 0.1 else float(generator.random() < 0.5) for value in before]
        found = mean_difference([now], [before])
        hits += found.low <= 0.1 * (0.5 - 0.9) <= found.high
    assert 0.92 <= hits / 300 <= 0.98


def test_half_of_a_loss_that_came_back_is_zero():
    base, damaged = [[1.0] * 10], [[1.0] * 4 + [0.0] * 6]
    assert recovered(base, damaged, [[1.0] * 7 + [0.0] * 3], 0.5).value == pytest.approx(0.0)
    assert recovered(base, damaged, base, 0.5).value == pytest.approx(0.3)
    assert recovered(base, damaged, damaged, 0.5).value == pytest.approx(-0.3)


def test_outcomes_are_in_order_of_the_seeds_and_of_one_arm():
    cell = {"known": {"both": [1]}}
    results = {
        ("a", 1): {"outcomes": {"known": {"both": [0, 1]}}},
        ("b", 0): {"outcomes": cell},
        ("a", 0): {"outcomes": cell},
    }
    assert outcomes(results, "a", "known") == [[1], [0, 1]]
