"""Does a noisy series go down? Medians of its beginning and end, and a slope that outliers do not move. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

CONFIDENCE = 0.95
MIN_POINTS = 10
_MAX_POINTS = 1000
Direction = Literal["falls", "rises", "is level"]


@dataclass(frozen=True)
class Trend:
    """A series' trend.

    Attributes:
        first_median, last_median: of the first and the last fifth of the points.
        slope, low, high: change per 1,000 of x (Theil-Sen) and the ends of its 95 % interval.
        direction: `is level` where the interval holds 0.
        num_points: points that were finite.
    """

    first_median: float
    last_median: float
    slope: float
    low: float
    high: float
    direction: Direction
    num_points: int


def robust_trend(x: Sequence[float], y: Sequence[float]) -> Trend | None:
    """The trend of y over x; None for fewer than 10 finite points.

    The slope is the median of the slopes of all pairs (Theil 1950, Sen 1968), its interval Sen's by the normal law of
    Kendall's statistic (Gilbert 1987, section 16.4.3). Points count as independent of one another. Of a longer series
    medians of up to 1,000 equal stretches are taken first.
    """
    points = np.array([pair for pair in zip(x, y, strict=True) if all(map(math.isfinite, pair))])
    if len(points) < MIN_POINTS:
        return None
    fifth = max(1, len(points) // 5)
    first, last = (float(np.median(part)) for part in (points[:fifth, 1], points[-fifth:, 1]))
    few = points
    if len(points) > _MAX_POINTS:
        few = np.array([np.median(part, axis=0) for part in np.array_split(points, _MAX_POINTS)])
    rows, columns = np.triu_indices(len(few), k=1)
    run = few[columns, 0] - few[rows, 0]
    slopes = np.sort((few[columns, 1] - few[rows, 1])[run > 0] / run[run > 0]) * 1000
    if not len(slopes):
        return None
    count = len(few)
    half = (
        NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * math.sqrt(count * (count - 1) * (2 * count + 5) / 18) / 2
    )
    low = float(slopes[max(0, math.floor(len(slopes) / 2 - half) - 1)])
    high = float(slopes[min(len(slopes) - 1, math.ceil(len(slopes) / 2 + half))])
    direction: Direction = "falls" if high < 0 else "rises" if low > 0 else "is level"
    return Trend(first, last, float(np.median(slopes)), low, high, direction, len(points))
