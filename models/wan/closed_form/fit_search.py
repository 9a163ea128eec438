"""Choosing the ridge: by the error on held-out prompts, and within the caps on how far weights may move."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from models.wan.closed_form.fit_solve import FitPoint, SolvedTarget, Solver
from utils.closed_form import UnsolvableError
from utils.errors import UserError

# In units of the mean eigenvalue of the tokens' second moments. Below, rounding decides; above, hardly anything is restored.
RIDGES = tuple(10.0**power for power in range(-6, 2))
MAX_RIDGE = 1e4
_RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
# A ratio this close below its cap is on it.
_ON_CAP = 0.99
_MAX_ROUNDS = 6
_BISECTIONS = 12
# "Enough" prompts: they restore this share of what all of them do.
ENOUGH = 0.98


@dataclass(frozen=True)
class Caps:
    """Caps on the ratio of every module and on their mean; None is none."""

    max_ratio: float | None = None
    max_mean_ratio: float | None = None

    def excess(self, solved: list[SolvedTarget]) -> float:
        """By what factor the worst of them is exceeded; at most 1 is within."""
        ratios = [one.delta.ratio for one in solved]
        over = [0.0]
        if self.max_ratio is not None:
            over.append(max(ratios) / self.max_ratio)
        if self.max_mean_ratio is not None:
            over.append(sum(ratios) / len(ratios) / self.max_mean_ratio)
        return max(over)


@dataclass(frozen=True)
class CountPoint:
    """The scouts with fewer neutral prompts."""

    num_prompts: int
    recovery: float
    residual: float


@dataclass(frozen=True)
class Fitted:
    """One DiT's adapter, and how it was chosen.

    Attributes:
        solved: every target.
        ridge: the one that was used.
        best_ridge: the one that the held-out error chose, or that was asked for; larger where a cap needed it.
        chosen: means over all targets.
        unbounded: means over the scouts at `best_ridge`, whatever the caps.
        bounded: the same at `ridge`.
        ridges: the scouts at all ridges that were tried.
        ranks: the scouts at `ridge` and all ranks.
        counts: the scouts at `ridge` with fewer prompts.
        full_recovery: the scouts' at `ridge` and full rank.
        is_held_out: whether held-out tokens judged.
    """

    solved: tuple[SolvedTarget, ...]
    ridge: float
    best_ridge: float
    chosen: FitPoint
    unbounded: FitPoint
    bounded: FitPoint
    ridges: tuple[FitPoint, ...]
    ranks: tuple[FitPoint, ...]
    counts: tuple[CountPoint, ...]
    full_recovery: float
    is_held_out: bool

    @property
    def enough(self) -> int | None:
        """The fewest prompts of those that were tried that restore nearly what all do; None: all are needed."""
        *fewer, all_of_them = self.counts
        wanted = ENOUGH * all_of_them.recovery
        return next((one.num_prompts for one in fewer if 0 < wanted <= one.recovery), None)


def fit(
    solver: Solver, ridge: float | None, caps: Caps, on_target: Callable[[], None] = lambda: None
) -> Fitted:
    """Solve for every target.

    Args:
        solver: the problem.
        ridge: None chooses it by the held-out error.
        caps: on the ratios.
        on_target: called behind every target that is solved for at the ridge that is used.

    Raises:
        UserError: `ridge` is None and nothing was held out, the system is singular, or no ridge meets the caps.
    """
    if ridge is None and not solver.judge:
        raise UserError(
            "--ridge auto holds prompts out to choose by, and there are fewer than 4 neutral ones; give more with --prompts, "
            "or a number"
        )
    points = _try_ridges(solver)
    best = choose_ridge(points) if ridge is None else ridge
    used, solved = _within_caps(solver, best, caps, is_given=ridge is not None, on_target=on_target)
    unbounded = solver.scout(best)
    bounded = unbounded if used == best else solver.scout(used)
    tried = {point.ridge: point for point in (*points, unbounded, bounded)}
    width = solver.moments.parts[0].width
    ranks = sorted({rank for rank in (*_RANKS, solver.rank) if rank <= width and rank <= 4 * solver.rank})
    return Fitted(
        tuple(solved),
        used,
        best,
        solver.point(used, solver.rank, solved),
        unbounded,
        bounded,
        tuple(tried[one] for one in sorted(tried)),
        tuple(solver.scout_ranks(used, ranks)),
        tuple(_counts(solver, used, bounded)),
        solver.full_recovery(used),
        solver.judge,
    )


def _try_ridges(solver: Solver) -> list[FitPoint]:
    """The scouts at every ridge, and at the ones beside the best; a ridge with which the system is singular is passed over."""
    points = []
    for ridge in RIDGES:
        try:
            points.append(solver.scout(ridge))
        except UnsolvableError:
            continue
    if not points:
        raise UnsolvableError(
            "the system is singular with every ridge that is tried; give more and more varied prompts"
        )
    best = choose_ridge(points)
    return points + [
        solver.scout(best * factor) for factor in (10**-0.5, 10**0.5) if best * factor >= RIDGES[0]
    ]


def choose_ridge(points: Sequence[FitPoint]) -> float:
    """The largest ridge whose error on held-out prompts is within one standard error of the least.

    What cannot be told from the best is not worth a larger change of the weights (the one-standard-error rule: Breiman et al.,
    "Classification and Regression Trees", 1984).
    """
    least = min(points, key=lambda point: point.loss)
    return max(point.ridge for point in points if point.loss <= least.loss + least.loss_error)


def _within_caps(
    solver: Solver, ridge: float, caps: Caps, *, is_given: bool, on_target: Callable[[], None]
) -> tuple[float, list[SolvedTarget]]:
    """The smallest ridge from `ridge` on with which all targets are within the caps, and the targets."""
    solved = solver.solve_all(solver.problem.factored(ridge), on_target)
    for _ in range(_MAX_ROUNDS):
        excess = caps.excess(solved)
        if excess <= 1:
            return ridge, solved
        if is_given:
            nearest = max(one.delta.ratio for one in solved)
            raise UserError(
                f"--ridge {ridge:g} reaches a largest delta ratio of {nearest:.4g}, {excess:.3g} times what the cap allows; give a "
                "larger --ridge, --ridge auto, or a larger --max_delta_ratio"
            )
        worst = max(solved, key=lambda one: one.delta.ratio)
        ridge = _ridge_for(solver, worst.module, worst.delta.ratio / excess, ridge)
        solved = solver.solve_all(solver.problem.factored(ridge))
    if caps.excess(solved) <= 1:
        return ridge, solved
    raise UserError(
        f"no ridge that was tried meets the caps; the nearest, {ridge:.4g}, exceeds them {caps.excess(solved):.4g} times: raise "
        "--max_delta_ratio a little"
    )


def _ridge_for(solver: Solver, module: str, wanted: float, lowest: float) -> float:
    """The ridge with which one target's ratio is at most `wanted`, by bisection; ratios fall as it rises."""

    def ratio(ridge: float) -> float:
        return solver.solve(solver.problem.factored(ridge), module).delta.ratio

    nearest = ratio(MAX_RIDGE)
    if nearest > wanted:
        raise UserError(
            f"--max_delta_ratio cannot be met: even with the largest ridge, {MAX_RIDGE:g}, {module} moves by a ratio of "
            f"{nearest:.3g}, which is the nearest that can be reached"
        )
    low, high = math.log(max(lowest, RIDGES[0])), math.log(MAX_RIDGE)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        found = ratio(math.exp(middle))
        if found > wanted:
            low = middle
        else:
            high = middle
            if found >= _ON_CAP * wanted:
                break
    return math.exp(high)


def _counts(solver: Solver, ridge: float, with_all: FitPoint) -> list[CountPoint]:
    """The scouts with fewer prompts; too few to solve are left out."""
    counts = []
    for number, num_prompts in enumerate(solver.moments.part_prompts[:-1], start=1):
        try:
            point = solver.scout(ridge, number)
        except UnsolvableError:
            continue
        counts.append(CountPoint(num_prompts, point.recovery, point.residual))
    return [*counts, CountPoint(solver.moments.part_prompts[-1], with_all.recovery, with_all.residual)]
