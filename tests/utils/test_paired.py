"""The interval of a paired difference, against tables and a computation by hand."""

import math
from statistics import stdev

import pytest

from utils.paired import group_difference, paired_difference


@pytest.mark.parametrize(
    ("count", "expected"),  # published tables of Student's t, two-sided 95 %, count - 1 degrees of freedom
    [
        (2, 12.7062),
        (3, 4.3027),
        (4, 3.1824),
        (5, 2.7764),
        (10, 2.2622),
        (31, 2.0423),
        (121, 1.9799),
        (10**5, 1.9600),
    ],
)
def test_the_half_width_is_that_of_the_tables(count: int, expected: float) -> None:
    differences = [float(index % 7) for index in range(count)]
    found = paired_difference(differences, [0.0] * count)
    standard_error = stdev(differences) / math.sqrt(count)
    assert (found.high - found.mean) / standard_error == pytest.approx(expected, abs=5e-5)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_mean_and_interval_by_hand() -> None:
    found = paired_difference([2.0, 3.0, 7.0], [1.0, 1.0, 4.0])  # differences 1, 2, 3: s = 1
    half = 4.302652729749462 / math.sqrt(3)
    assert found.mean == pytest.approx(2.0)
    assert (found.low, found.high) == (pytest.approx(2.0 - half), pytest.approx(2.0 + half))


def test_it_is_paired() -> None:
    """Samples that differ much among each other do not widen the interval of a difference that is the same for all."""
    found = paired_difference([101.0, 1.0, 51.0], [100.0, 0.0, 50.0])
    assert found == paired_difference([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    assert (found.mean, found.low, found.high) == (1.0, 1.0, 1.0)


def test_one_pair_has_no_interval_and_none_is_an_error() -> None:
    found = paired_difference([1.5], [1.0])
    assert (found.mean, found.low, found.high) == (0.5, None, None)
    with pytest.raises(ValueError):
        paired_difference([], [])
    with pytest.raises(ValueError):
        paired_difference([1.0], [1.0, 2.0])


def test_two_groups_by_hand() -> None:
    """Welch's t-test of a textbook's kind: variances 1 and 4, 3 values each."""
    found = group_difference([4.0, 5.0, 6.0], [0.0, 2.0, 4.0])
    error = math.sqrt(1 / 3 + 4 / 3)
    degrees = (1 / 3 + 4 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2)  # 2.941
    assert degrees == pytest.approx(2.941, abs=1e-3)
    # Student's quantile for 2.941 degrees of freedom lies between those for 2 (4.3027) and 3 (3.1824), near the latter.
    assert found.mean == pytest.approx(3.0)
    assert 3.18 < (found.high - found.mean) / error < 3.25
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_groups_without_spread_and_of_one_value() -> None:
    assert group_difference([2.0, 2.0], [1.0, 1.0]) == (same := paired_difference([2.0, 2.0], [1.0, 1.0]))
    assert (same.low, same.high) == (1.0, 1.0)
    found = group_difference([2.0], [1.0, 3.0])
    assert (found.mean, found.low, found.high) == (0.0, None, None)
    with pytest.raises(ValueError):
        group_difference([], [1.0])
