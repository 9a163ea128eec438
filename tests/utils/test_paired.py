"""The interval of a paired difference, against tables and a computation by hand."""

import math

import pytest

from utils.paired import paired_difference, student_t_quantile


@pytest.mark.parametrize(
    ("degrees", "expected"),  # published tables of Student's t, two-sided 95 %
    [
        (1, 12.7062),
        (2, 4.3027),
        (3, 3.1824),
        (4, 2.7764),
        (9, 2.2622),
        (30, 2.0423),
        (120, 1.9799),
        (10**6, 1.9600),
    ],
)
def test_quantiles_are_those_of_the_tables(degrees: int, expected: float) -> None:
    assert student_t_quantile(0.975, degrees) == pytest.approx(expected, abs=5e-5)


def test_the_change_to_the_normal_law_is_smooth() -> None:
    assert student_t_quantile(0.975, 2999) == pytest.approx(student_t_quantile(0.975, 3000), rel=5e-4)


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
