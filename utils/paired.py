"""Means of differences with a confidence interval, paired or of two groups: Student's t over samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """A mean difference and the ends of its interval, which are None for a single pair."""

    mean: float
    low: float | None
    high: float | None


def paired_difference(now: Sequence[float], before: Sequence[float]) -> Paired:
    """Mean of `now - before` over pairs, with mean +- t * s / sqrt(n) at 95 %.

    s is the standard deviation of the differences (n - 1 in its denominator), t the quantile of Student's law with
    n - 1 degrees of freedom. It takes the pairs as independent of one another.

    Raises:
        ValueError: no pairs, or two lists of different length.
    """
    differences = [after - earlier for after, earlier in zip(now, before, strict=True)]
    if not differences:
        raise ValueError("there is no pair to compare")
    mean, count = fmean(differences), len(differences)
    if count == 1:
        return Paired(mean, None, None)
    from scipy.special import stdtrit

    half = float(stdtrit(count - 1, 0.5 + CONFIDENCE / 2)) * stdev(differences) / math.sqrt(count)
    return Paired(mean, mean - half, mean + half)


def group_difference(one: Sequence[float], other: Sequence[float]) -> Paired:
    """Mean of `one` minus mean of `other`, two independent groups, with Welch's interval at 95 %.

    The ends are None where a group has a single value.

    Raises:
        ValueError: a group is empty.
    """
    if not one or not other:
        raise ValueError("there is nothing to compare")
    mean = fmean(one) - fmean(other)
    if len(one) == 1 or len(other) == 1:
        return Paired(mean, None, None)
    if stdev(one) == stdev(other) == 0.0:
        return Paired(mean, mean, mean)
    from scipy.stats import ttest_ind

    ends = ttest_ind(one, other, equal_var=False).confidence_interval(CONFIDENCE)
    return Paired(mean, float(ends.low), float(ends.high))
