"""The budget of a run: how far training may move an adapter's weights or an encoder's states, and what happens beyond.

Ratios and drift are measured every `every_n_steps`, after the optimizer step. `project` scales an adapter back onto its
caps then, on every copy and stage alike. How often a run saves must not change what it computes, so nothing is projected
for a save's sake: what is exported is scaled as it is written, and training goes on from what it had.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from utils.config.schema import BudgetConfig
from utils.delta_budget import CAP_TOLERANCE, ModuleDelta, over_cap, summarise
from utils.distributed import gather_objects
from utils.errors import TrainingStoppedError
from utils.layers import TrainableModel
from utils.pipeline import Pipeline

# A warning is repeated where it has become so much worse since the last one.
_WORSE = 2.0


class Drift(Protocol):
    """Measures how far an encoder has moved (`models.wan.neutral_drift.NeutralDrift`)."""

    def begin(self, pipeline: Pipeline) -> None:
        """Remember the encoder as it was before any training."""
        ...

    def measure(self, pipeline: Pipeline) -> float:
        """The drift of now, the same on every rank."""
        ...


class Budget:
    """Measures, projects, warns and stops. Every rank makes the same calls and comes to the same result."""

    def __init__(
        self,
        config: BudgetConfig,
        model: TrainableModel,
        pipeline: Pipeline,
        drift: Drift | None,
        announce: Callable[[str], None],
    ) -> None:
        """Watch `pipeline`; `drift` is there where an encoder is trained, `announce` speaks on one rank."""
        self._config = config
        self._model = model
        self._pipeline = pipeline
        self._drift = drift
        self._announce = announce
        self._problem: tuple[float, str] | None = None  # how many times its cap, and in words
        self._warned = 0.0

    def measure(self, row: dict[str, Any], *, is_last: bool, saves: bool) -> None:
        """If it is due after this step: measure, project where that is the action, and put the numbers into `row`.

        Args:
            row: the step's metrics.
            is_last: the run ends with this step.
            saves: something is saved after it.
        """
        self._problem = None
        is_due = row["step"] % self._config.every_n_steps == 0
        # Where nothing is changed, looking more often is free of consequences: no save is ever over a cap that stops.
        if not (is_due or is_last or (saves and self._config.action == "stop")):
            return
        if self._drift is not None:
            self._measure_drift(self._drift, row)
        else:
            self._measure_deltas(row, may_project=is_due)

    def act(self, step: int, what_is_left: Callable[[], str]) -> None:
        """Warn or stop about what the last `measure` found.

        Raises:
            TrainingStoppedError: the action is to stop.
        """
        if self._problem is None:
            return
        excess, problem = self._problem
        message = f"step {step}: {problem}"
        if self._config.action == "stop":
            raise TrainingStoppedError(
                f"{message}. budget.action = 'stop'; {what_is_left()}. Lower optimizer.lr, train for fewer steps, or raise "
                "the cap on purpose"
            )
        if excess > self._warned * _WORSE:
            self._warned = excess
            self._announce(f"warning: {message}")

    def projected(self, trained: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is written of an adapter whose action is to project: scaled onto its caps. Changes `trained` in place.

        Args:
            trained: every trained parameter by global name, apart from those that are trained on.
        """
        if self._config.action == "project":
            self._project(trained, self._model.deltas(trained))
        return trained

    def _measure_drift(self, drift: Drift, row: dict[str, Any]) -> None:
        value, cap = drift.measure(self._pipeline), self._config.max_neutral_drift
        row["neutral_drift"] = value if math.isfinite(value) else None
        if cap is not None and not value <= cap:
            reason = (
                f"the encoder's states of the neutral prompts have drifted by {value:.4f} (1 - mean cosine), more than "
                f"budget.max_neutral_drift = {cap:g}"
            )
            self._problem = (value / cap if math.isfinite(value) else math.inf, reason)

    def _measure_deltas(self, row: dict[str, Any], *, may_project: bool) -> None:
        deltas = self._all_deltas()
        if not deltas:
            return
        if self._config.action == "project" and may_project:
            factors = self._project(self._pipeline.parameters, deltas)
            row["projected_modules"] = len(factors)
            if factors:
                before = summarise(deltas).overall
                row["max_delta_ratio_before_projection"] = _plain(before.max_ratio)
                deltas = self._all_deltas()
        overall = summarise(deltas).overall
        row["max_delta_ratio"] = _plain(overall.max_ratio)
        row["mean_delta_ratio"] = _plain(overall.mean_ratio)
        if self._config.action != "project" or may_project:
            self._problem = cap_problem(deltas, self._config)  # of `project`: what no factor mends

    def _all_deltas(self) -> list[ModuleDelta]:
        """Of all stages, in the order of the modules' names, so that sums over them are the same in every layout."""
        shares = gather_objects(self._model.deltas(self._pipeline.parameters))
        found = {delta.module: delta for share in shares for delta in share}
        return [found[module] for module in sorted(found)]

    def _project(self, parameters: Mapping[str, Tensor], deltas: Sequence[ModuleDelta]) -> dict[str, float]:
        factors = projection_factors(deltas, self._config.max_delta_ratio, self._config.max_mean_delta_ratio)
        if factors:
            self._model.scale_adapters(parameters, factors)
        return factors


def cap_problem(deltas: Sequence[ModuleDelta], budget: BudgetConfig) -> tuple[float, str] | None:
    """How many times its cap the worst of an adapter is, and in words; None within all caps."""
    cap, mean_cap = budget.max_delta_ratio, budget.max_mean_delta_ratio
    over = over_cap(deltas, cap)
    if over:
        reason = (
            f"{len(over)} adapted module(s) move their weights by more than budget.max_delta_ratio = {cap:g}; the most "
            f"is {over[0].module} with {over[0].ratio:.4f}"
        )
        return over[0].ratio / cap if math.isfinite(over[0].ratio) else math.inf, reason
    mean = summarise(deltas).overall.mean_ratio
    if mean_cap is not None and not mean <= mean_cap * (1 + CAP_TOLERANCE):
        reason = (
            f"the adapted modules move their weights by {mean:.4f} on average, more than "
            f"budget.max_mean_delta_ratio = {mean_cap:g}"
        )
        return mean / mean_cap, reason
    return None


def projection_factors(
    deltas: Sequence[ModuleDelta], max_ratio: float, max_mean_ratio: float | None
) -> dict[str, float]:
    """By what to multiply B of each module so that all caps are kept; modules that stay as they are are left out.

    First each module above `max_ratio` goes onto it; if the mean is still above `max_mean_ratio`, all modules are scaled by
    one factor, which keeps their relations. The norm is linear in B, so the result lies on the cap, and a second projection
    has nothing to do. A ratio that is not finite has no factor, because no number would mend it, and no part in the mean.
    """
    finite = [delta for delta in deltas if math.isfinite(delta.ratio)]
    factors = {delta.module: max_ratio / delta.ratio for delta in finite if delta.is_over(max_ratio)}
    if max_mean_ratio is None or not finite:
        return factors
    mean = math.fsum(delta.ratio * factors.get(delta.module, 1.0) for delta in finite) / len(finite)
    if mean <= max_mean_ratio * (1 + CAP_TOLERANCE):
        return factors
    return {delta.module: factors.get(delta.module, 1.0) * max_mean_ratio / mean for delta in finite}


def _plain(number: float) -> float | None:
    """A base weight that is all zeros makes a ratio infinite, which JSON cannot say."""
    return number if math.isfinite(number) else None
