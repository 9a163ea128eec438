"""The 1F1B schedule as arithmetic: how many micro-batches are in flight on a stage, and how long a step takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_MOST_PLAYED = 256

Pass = tuple[Literal["forward", "backward"], int]


@dataclass(frozen=True)
class StepTiming:
    """One optimizer step over the stages, in the unit of the costs, transfers free.

    Attributes:
        span: from the first forward to the last backward.
        busy: what each stage works in it.
    """

    span: float
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """Share of the stages' time in which they wait."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.span) if self.span else 0.0

    @property
    def speedup(self) -> float:
        """How much faster than one stage that does all the work."""
        return sum(self.busy) / self.span if self.span else 1.0


def in_flight(stage: int, num_stages: int, num_micro_batches: int) -> int:
    """Micro-batches that have been forward and not yet backward on this stage, at most."""
    return min(num_stages - stage, num_micro_batches)


def stage_passes(stage: int, num_stages: int, num_micro_batches: int) -> list[Pass]:
    """The order of passes on one stage: some forwards to fill the pipeline, then one of each, then the rest."""
    ahead = min(num_stages - stage - 1, num_micro_batches)
    order: list[Pass] = [("forward", index) for index in range(ahead)]
    for index in range(num_micro_batches):
        if ahead + index < num_micro_batches:
            order.append(("forward", ahead + index))
        order.append(("backward", index))
    return order


def simulate(forward: Sequence[float], backward: Sequence[float], num_micro_batches: int) -> StepTiming:
    """One step with these costs per micro-batch and stage.

    A stage whose backward costs nothing sends and receives no gradient, so it waits for none.

    Every micro-batch of very many takes as long as the slowest stage needs for it, so only the first ones are played
    through. The span of `M` is at least `M` times that, and at most `M + num_stages - 1` times (forward `i` of a stage
    can end at `i` times it plus the forwards of the stages up to there, backward `i` at `num_stages - stage - 1` times
    it, and its own backward, later; with this every pass finds what it waits for), so both together are off by less
    than `num_stages - 1` micro-batches of the slowest stage.
    """
    slowest = max(f + b for f, b in zip(forward, backward, strict=True))
    busy = tuple(num_micro_batches * (f + b) for f, b in zip(forward, backward, strict=True))
    played = min(num_micro_batches, _MOST_PLAYED)
    return StepTiming(_span(forward, backward, played) + (num_micro_batches - played) * slowest, busy)


def _span(forward: Sequence[float], backward: Sequence[float], num_micro_batches: int) -> float:
    """From the first forward to the last backward."""
    num_stages = len(forward)
    orders = [stage_passes(stage, num_stages, num_micro_batches) for stage in range(num_stages)]
    done: dict[tuple[int, str, int], float] = {}
    position, clock = [0] * num_stages, [0.0] * num_stages

    def awaited(stage: int, kind: str, index: int) -> tuple[int, str, int] | None:
        """The pass of a neighbour whose result this pass needs."""
        if kind == "forward":
            return (stage - 1, kind, index) if stage else None
        if stage == num_stages - 1 or not backward[stage]:
            return None
        return (stage + 1, kind, index)

    while any(position[stage] < len(orders[stage]) for stage in range(num_stages)):
        for stage in range(num_stages):
            while position[stage] < len(orders[stage]):
                kind, index = orders[stage][position[stage]]
                need = awaited(stage, kind, index)
                if need is not None and need not in done:
                    break
                start = max(clock[stage], done[need] if need is not None else 0.0)
                clock[stage] = start + (forward if kind == "forward" else backward)[stage]
                done[stage, kind, index] = clock[stage]
                position[stage] += 1
    return max(clock)
