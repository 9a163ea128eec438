"""Slopes and intervals of noisy series whose trend is known."""

import math

import numpy as np
import pytest

from utils.trend import MIN_POINTS, robust_trend


def test_a_straight_line() -> None:
    found = robust_trend(range(1, 51), [5 - 0.002 * x for x in range(1, 51)])
    assert found is not None
    assert (found.slope, found.low, found.high) == pytest.approx((-2.0, -2.0, -2.0))
    assert found.direction == "falls"
    assert found.first_median == pytest.approx(5 - 0.002 * 5.5)
    assert found.last_median == pytest.approx(5 - 0.002 * 45.5)


def test_outliers_do_not_turn_it() -> None:
    x = np.arange(100)
    y = 1.0 + 0.01 * x
    y[[3, 50, 97]] = (1e6, -1e6, -1e9)
    found = robust_trend(x.tolist(), y.tolist())
    assert found is not None and found.direction == "rises"
    assert found.slope == pytest.approx(10.0, rel=0.01)


def test_the_interval_holds_the_true_slope_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    x, hits, level = np.arange(60), 0, 0
    for _ in range(400):
        found = robust_trend(x.tolist(), (0.002 * x + rng.normal(size=60)).tolist())
        flat = robust_trend(x.tolist(), rng.normal(size=60).tolist())
        assert found is not None and flat is not None
        hits += found.low <= 2.0 <= found.high
        level += flat.direction == "is level"
    assert 0.92 <= hits / 400 <= 0.98
    assert 0.92 <= level / 400 <= 0.98


def test_a_long_series_is_shortened() -> None:
    rng = np.random.default_rng(1)
    x = np.arange(20_000)
    found = robust_trend(x.tolist(), (3 - 1e-4 * x + rng.normal(size=len(x))).tolist())
    assert found is not None and found.num_points == 20_000
    assert found.low <= -0.1 <= found.high
    assert found.direction == "falls"


def test_too_little_to_say() -> None:
    few = list(range(MIN_POINTS - 1))
    assert robust_trend(few, few) is None
    assert robust_trend([*few, 100], [*few, math.nan]) is None
    assert robust_trend([1] * 20, range(20)) is None
