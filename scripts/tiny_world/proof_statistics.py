"""Shares, losses and recoveries of the proof with their intervals, over the prompts of all seeds.

Intervals are over prompts, which differ between the seeds, and take the trainings as they are: how far trainings differ is
seen in the values by seed, which stand beside them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Any

from utils.paired import CONFIDENCE, paired_difference

Results = Mapping[tuple[str, int], Mapping[str, Any]]
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


@dataclass(frozen=True)
class Estimate:
    """A value, the ends of its interval at 95 %, how many prompts it is over, and the value of each seed."""

    value: float
    low: float
    high: float
    count: int
    by_seed: tuple[float, ...] = ()

    def shown(self, factor: float = 100.0, sign: str = "") -> str:
        """Value and interval for people, by default in percent or points."""
        one, low, high = (f"{factor * number:{sign}.1f}" for number in (self.value, self.low, self.high))
        return f"{one} [{low}, {high}]"


def outcomes(results: Results, arm: str, cell: str, what: str = "both") -> list[list[float]]:
    """The outcomes of an arm, a list for each seed in order."""
    return [
        list(result["outcomes"][cell][what]) for (name, _), result in sorted(results.items()) if name == arm
    ]


def share(by_seed: Sequence[Sequence[float]]) -> Estimate:
    """A share with Wilson's interval (E. B. Wilson 1927), which stays in [0, 1] and has a width at 0 and 1 too."""
    values = [value for one in by_seed for value in one]
    count, mean = len(values), fmean(values)
    middle = (mean + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(mean * (1 - mean) / count + _Z**2 / (4 * count**2))
    # Rounding must not put the value outside its own interval.
    low, high = max(0.0, min(mean, middle - half)), min(1.0, max(mean, middle + half))
    return Estimate(mean, low, high, count, tuple(fmean(one) for one in by_seed))


def mean_difference(now: Sequence[Sequence[float]], before: Sequence[Sequence[float]]) -> Estimate:
    """Mean of now - before over prompts that are the same from the same noise.

    Student's interval. Where no prompt differs that has no width; then it is what could have been missed: a share of
    prompts p that differ stays unseen in n with probability (1 - p)^n = 0.025.
    """
    ours, theirs = ([value for one in side for value in one] for side in (now, before))
    found = paired_difference(ours, theirs)
    low, high = found.low, found.high
    if low is None or high is None or low == high:
        unseen = 1 - ((1 - CONFIDENCE) / 2) ** (1 / len(ours))
        low, high = found.mean - unseen, found.mean + unseen
    by_seed = tuple(fmean(a) - fmean(b) for a, b in zip(now, before, strict=True))
    return Estimate(found.mean, low, high, len(ours), by_seed)


def recovered(
    base: Sequence[Sequence[float]],
    damaged: Sequence[Sequence[float]],
    mended: Sequence[Sequence[float]],
    part: float,
) -> Estimate:
    """Mean of mended - damaged - part * (base - damaged): at least 0 where that part of the loss came back."""
    wanted = [
        [was + part * (whole - was) for whole, was in zip(one, other, strict=True)]
        for one, other in zip(base, damaged, strict=True)
    ]
    return mean_difference(mended, wanted)
