"""Shares, losses and recoveries of the proof with their intervals, over texts.

Pictures of one text are not independent of one another, in whatever seed and noise they were drawn: each text counts once, by
the mean of its pictures. The trainings and the words are taken as they are: how far those differ is seen in the values by
seed and by word, which stand beside the intervals.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

from utils.paired import CONFIDENCE, Paired, paired_difference

Results = Mapping[tuple[str, int], Mapping[str, Any]]
# With fewer texts no target counts as settled: Student's interval leans on the mean of as many being nearly normal, which
# for outcomes of 0 and 1 it is not.
FEWEST_TEXTS = 10


@dataclass(frozen=True)
class Estimate:
    """A value, the ends of its interval at 95 %, how many texts and pictures it is over, and the value of each seed.

    Where `num_texts` is 0 the ends are no interval over texts.
    """

    value: float
    low: float
    high: float
    num_texts: int
    num_pictures: int
    by_seed: tuple[float, ...] = ()

    def shown(self, factor: float = 100.0, sign: str = "") -> str:
        """Value and interval for people, by default in percent or points."""
        one, low, high = (f"{factor * number:{sign}.1f}" for number in (self.value, self.low, self.high))
        return f"{one} [{low}, {high}]"


@dataclass(frozen=True)
class Outcomes:
    """What came of the pictures of an arm: for each seed in order, the text of each picture and its outcome."""

    texts: tuple[tuple[str, ...], ...]
    values: tuple[tuple[float, ...], ...]

    def by_text(self) -> dict[str, float]:
        """The mean of each text over its seeds and noise."""
        return _by_text(chain.from_iterable(self.texts), chain.from_iterable(self.values))

    def by_seed(self) -> tuple[float, ...]:
        """The mean over the texts of each seed."""
        return tuple(fmean(_by_text(*one).values()) for one in zip(self.texts, self.values, strict=True))

    def mean(self) -> float:
        """The mean over texts."""
        return fmean(self.by_text().values())

    def with_word(self, word: str) -> "Outcomes":
        """Those pictures whose text has a word."""
        kept = [
            [
                (text, value)
                for text, value in zip(*one, strict=True)
                if word in text.replace(",", " ").split()
            ]
            for one in zip(self.texts, self.values, strict=True)
        ]
        return Outcomes(
            tuple(tuple(text for text, _ in one) for one in kept),
            tuple(tuple(value for _, value in one) for one in kept),
        )


def outcomes(results: Results, arm: str, cells: str | Sequence[str], what: str = "both") -> Outcomes:
    """The outcomes of an arm in one cell, or in several together."""
    names = (cells,) if isinstance(cells, str) else cells
    found = [result["outcomes"] for (name, _), result in sorted(results.items()) if name == arm]

    def joined(key: str) -> tuple[tuple[Any, ...], ...]:
        return tuple(tuple(value for cell in names for value in one[cell][key]) for one in found)

    return Outcomes(joined("text"), joined(what))


def share(found: Outcomes) -> Estimate:
    """Mean share of the texts with Student's interval over them, cut to [0, 1].

    Where all texts have the same share, or there is one, the interval is what could have been missed (`_unseen`).
    """
    return _estimate(found, 0.0, 1.0)


def mean_difference(now: Outcomes, before: Outcomes) -> Estimate:
    """Mean over texts of now - before, of pictures that have the same text and noise, with Student's interval.

    Where no text differs from another, or there is one, the interval is what could have been missed (`_unseen`).

    Raises:
        ValueError: the two are not of the same texts in the same order.
    """
    differences = combined(now, before, lambda after, earlier: after - earlier)
    return _estimate(differences, -math.inf, math.inf)


def recovered(base: Outcomes, damaged: Outcomes, mended: Outcomes, part: float) -> Estimate:
    """Mean of mended - damaged - part * (base - damaged): at least 0 where that part of the loss came back."""
    wanted = combined(base, damaged, lambda whole, was: was + part * (whole - was))
    return mean_difference(mended, wanted)


def combined(one: Outcomes, other: Outcomes, function: Callable[[float, float], float]) -> Outcomes:
    """A function of two outcomes, picture by picture.

    Raises:
        ValueError: the two are not of the same texts in the same order.
    """
    if one.texts != other.texts:
        raise ValueError("the two are of different texts, and cannot be held against each other")
    pairs = zip(one.values, other.values, strict=True)
    return Outcomes(one.texts, tuple(tuple(map(function, *pair)) for pair in pairs))


def _estimate(found: Outcomes, least: float, most: float) -> Estimate:
    means = list(found.by_text().values())
    mean = fmean(means)
    low, high = _interval(paired_difference(means, [0.0] * len(means)), mean, len(means))
    # Rounding must not put the value outside its own interval.
    low, high = max(min(least, mean), min(mean, low)), min(max(most, mean), max(mean, high))
    return Estimate(mean, low, high, len(means), sum(map(len, found.values)), found.by_seed())


def _interval(found: Paired, mean: float, count: int) -> tuple[float, float]:
    if found.low is not None and found.high is not None and found.high > found.low:
        return found.low, found.high
    return mean - _unseen(count), mean + _unseen(count)


def _unseen(count: int) -> float:
    """What could have been missed: a share p of texts that differ stays unseen in n with probability (1 - p)^n = 0.025."""
    return float(1 - ((1 - CONFIDENCE) / 2) ** (1 / count))


def _by_text(texts: Iterable[str], values: Iterable[float]) -> dict[str, float]:
    own: dict[str, list[float]] = {}
    for text, value in zip(texts, values, strict=True):
        own.setdefault(text, []).append(value)
    return {text: fmean(some) for text, some in own.items()}
