"""Timing for benchmarks: several variants in turn in one run, so that a machine whose speed drifts slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant, in the order in which they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure to quote."""
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        """The fastest."""
        return min(self.seconds)

    @property
    def high(self) -> float:
        """The slowest."""
        return max(self.seconds)


def take_turns(
    variants: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, Timing]:
    """Run each variant `repeats` times, A B A B ..., after `warmup` rounds that are not counted.

    Only for work that is finished when the call returns: on a GPU a variant has to synchronise itself.
    """
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + repeats):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            seconds = time.perf_counter() - started
            if turn >= warmup:
                taken[name].append(seconds)
    return {name: Timing(tuple(seconds)) for name, seconds in taken.items()}


def ratios(numerator: Timing, denominator: Timing) -> Timing:
    """The ratio turn by turn; its median is steadier than the ratio of the medians."""
    pairs = zip(numerator.seconds, denominator.seconds, strict=True)
    return Timing(tuple(above / below for above, below in pairs))
