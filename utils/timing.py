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

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper one; of a single value that value twice."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return lower, upper

    @property
    def spread(self) -> float:
        """The distance between the quartiles over the median."""
        lower, upper = self.quartiles
        return (upper - lower) / self.median


def take_turns(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warmup: int = 1,
    wait: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, Timing]:
    """Run each variant `repeats` times, A B, B A, A B, ..., after `warmup` rounds that are not counted.

    Args:
        variants: what to time, by name.
        repeats: counted rounds.
        warmup: rounds before them.
        wait: waits until work that a call only started is done; called before and after each.
        clock: what time is read from, in seconds.
        measure: runs a variant and returns its seconds, in the place of `wait` and `clock`.
    """

    def by_clock(work: Callable[[], object]) -> float:
        wait()
        started = clock()
        work()
        wait()
        return clock() - started

    run = measure or by_clock
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + repeats):
        for name in list(variants)[:: 1 if turn % 2 == 0 else -1]:
            seconds = run(variants[name])
            if turn >= warmup:
                taken[name].append(seconds)
    return {name: Timing(tuple(seconds)) for name, seconds in taken.items()}


def ratios(numerator: Timing, denominator: Timing) -> Timing:
    """The ratio turn by turn; its median is steadier than the ratio of the medians."""
    pairs = zip(numerator.seconds, denominator.seconds, strict=True)
    return Timing(tuple(above / below for above, below in pairs))
