"""Solving for the adapter of one DiT: every target at one ridge, and what it restores, measured on tokens directly."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from models.wan.closed_form.fit_moments import FitMoments, Group
from utils.closed_form import (
    Answers,
    Factored,
    LeastSquares,
    Residual,
    answers_of,
    least_squares,
    residual,
    residual_of,
)
from utils.delta_budget import ModuleDelta, module_delta, weight_norm
from utils.errors import UserError
from utils.lora_targets import split_block_path
from utils.low_rank import TOLERANCE
from utils.tensor_source import TensorSource

# Blocks whose targets stand for all where many ridges are tried.
_NUM_SCOUT_BLOCKS = 2
# What a scout tells is a residual, of which this is far below its error over prompts.
_SCOUT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class SolvedTarget:
    """One target's adapter, and what it does.

    Attributes:
        module: its path.
        up, down: B [O, r] and A [r, D], float32 on the CPU, scale 1.
        delta: how far it moves the weight.
        residuals: by group of tokens.
        padding: |E p| / |W p|, how far the answer to padding moves; rounding alone.
        error: what the search for the leading directions may have missed, see `TopSingular.error`.
    """

    module: str
    up: Tensor
    down: Tensor
    delta: ModuleDelta
    residuals: dict[Group, Residual]
    padding: float
    error: float


@dataclass(frozen=True)
class FitPoint:
    """Targets at one ridge and rank: means over them, on the tokens that judge.

    Attributes:
        ridge, rank: of the adapter.
        recovery, residual: of neutral tokens, see `Residual`.
        shift: how far domain tokens are moved; None where there are none.
        mean_ratio, max_ratio: of the weights' norms.
        loss: what a ridge is chosen by: the objective's data term, relative, with all targets alike.
        loss_error: its standard error over prompts.
    """

    ridge: float
    rank: int
    recovery: float
    residual: float
    shift: float | None
    mean_ratio: float
    max_ratio: float
    loss: float
    loss_error: float


class Solver:
    """One DiT's problem: moments, and weights read one at a time."""

    def __init__(
        self,
        moments: FitMoments,
        source: TensorSource,
        targets: Sequence[str],
        rank: int,
        keep_weight: float,
        device: torch.device,
    ) -> None:
        """Put the least-squares problem together.

        Args:
            moments: of the text.
            source: the DiT's tensors.
            targets: what gets an adapter.
            rank: of each.
            keep_weight: of all kept tokens together; all neutral ones weigh 1.
            device: where it is computed.

        Raises:
            UserError: nothing has changed, or there are fewer independent tokens than `rank`.
        """
        if not any(part.is_changed for part in moments.parts):
            raise UserError(
                "the tuned encoder gives every neutral prompt the states of the base, so there is nothing to do; check that "
                "model.llm_path names the tuned encoder"
            )
        self.moments, self.rank = moments, rank
        self._source, self._targets, self._device = source, targets, device
        self._keep_weight = keep_weight
        self.problem: LeastSquares = self._put_together(None)
        self._norms: dict[str, float] = {}
        blocks = sorted({split_block_path(target)[0] for target in targets})
        chosen = {
            blocks[(2 * index + 1) * len(blocks) // (2 * _NUM_SCOUT_BLOCKS)]
            for index in range(_NUM_SCOUT_BLOCKS)
        }
        self.scouts = [target for target in targets if split_block_path(target)[0] in chosen]
        self._starts: dict[str, Tensor] = {}
        self._known: dict[str, dict[Group, Answers]] = {}

    @property
    def judge(self) -> bool:
        """Whether held-out neutral tokens judge, or, where there are none, those that were fitted on."""
        return ("neutral", True) in self.moments.measured

    def weight(self, module: str) -> Tensor:
        """W of a target, float32 [O, D].

        Raises:
            UserError: it is not finite.
        """
        name = f"{module}.weight"
        found = self._source.get(name).to(device=self._device, dtype=torch.float32, copy=True)
        self._source.release()
        if module not in self._norms:
            norm = weight_norm(found)
            if not norm < float("inf"):
                raise UserError(
                    f"{self._source.files[0]}: {name} holds NaN or infinite values; download it again"
                )
            self._norms[module] = norm
        return found

    def solve(self, factor: Factored, module: str, tolerance: float = TOLERANCE) -> SolvedTarget:
        """Solve for one target, and measure."""
        weight = self.weight(module)
        solution = factor.solve(weight, self.rank, self._starts.get(module), tolerance)
        if module in self.scouts:
            self._starts[module] = solution.singular.block
        up, down = solution.up.float(), solution.down.float()
        padding = self.moments.padding_D
        size = float((weight @ padding).norm())
        moved = float((solution.up @ (solution.down @ padding.double())).norm())
        return SolvedTarget(
            module,
            up.cpu(),
            down.cpu(),
            module_delta(module, down, up, 1.0, self._norms[module]),
            self.measure(module, weight, up, down),
            moved / size if size else 0.0,
            solution.singular.error,
        )

    def solve_all(self, factor: Factored, on_target: Callable[[], None] = lambda: None) -> list[SolvedTarget]:
        """Solve for every target, in order."""
        solved = []
        factor.combine()
        for module in self._targets:
            solved.append(self.solve(factor, module))
            on_target()
        return solved

    def measure(self, module: str, weight: Tensor, up: Tensor, down: Tensor) -> dict[Group, Residual]:
        """Residuals on every group of measured tokens."""
        answers = self._answers(module, weight)
        return {
            group: residual(answers[group], up, down, tokens.tuned_ND)
            for group, tokens in self.moments.measured.items()
        }

    def _answers(self, module: str, weight: Tensor) -> dict[Group, Answers]:
        """Those of scouts, which are measured again and again, are kept."""
        if module in self._known:
            return self._known[module]
        found = {
            group: answers_of(weight, tokens.tuned_ND, None if group[0] == "domain" else tokens.base_ND)
            for group, tokens in self.moments.measured.items()
        }
        if module in self.scouts:
            self._known[module] = found
        return found

    def scout(self, ridge: float, num_parts: int | None = None) -> FitPoint:
        """The scouts at another ridge, or with fewer prompts.

        Raises:
            UserError: the system is singular, or the prompts are too few.
        """
        problem = self.problem if num_parts is None else self._put_together(num_parts)
        factor = problem.factored(ridge)
        return self.point(
            ridge, self.rank, [self.solve(factor, module, _SCOUT_TOLERANCE) for module in self.scouts]
        )

    def scout_ranks(self, ridge: float, ranks: Sequence[int]) -> list[FitPoint]:
        """The scouts at other ranks, each the best of its rank."""
        factor = self.problem.factored(ridge)
        found: dict[int, list[SolvedTarget]] = {rank: [] for rank in ranks}
        for module in self.scouts:
            weight = self.weight(module)
            largest = factor.solve(weight, max(ranks))
            for rank in ranks:
                up, down = (one.float() for one in factor.product_of(largest.singular, rank))
                delta = module_delta(module, down, up, 1.0, self._norms[module])
                measured = self.measure(module, weight, up, down)
                found[rank].append(SolvedTarget(module, up, down, delta, measured, 0.0, 0.0))
        return [self.point(ridge, rank, solved) for rank, solved in found.items()]

    def full_recovery(self, ridge: float) -> float:
        """What no rank could exceed at this ridge: the mean recovery of the scouts at full rank."""
        factor = self.problem.factored(ridge)
        tokens = self.moments.measured["neutral", self.judge]
        found = []
        for module in self.scouts:
            weight = self.weight(module)
            change = factor.full(weight, tokens.tuned_ND)
            answers = self._answers(module, weight)["neutral", self.judge]
            found.append(residual_of(answers, change).recovery)
        return fmean(found)

    def point(self, ridge: float, rank: int, solved: Sequence[SolvedTarget]) -> FitPoint:
        """Means over solved targets."""
        neutral_group: Group = ("neutral", self.judge)
        domain_group: Group = ("domain", self.judge)
        if domain_group not in self.moments.measured:
            domain_group = ("domain", False)
        neutral = [one.residuals[neutral_group] for one in solved]
        kept = [one.residuals[domain_group] for one in solved if domain_group in one.residuals]
        loss, error = self._loss(neutral_group, neutral)
        if kept:
            moved, moved_error = self._loss(domain_group, kept)
            loss += self._keep_weight * moved
            error = math.hypot(error, self._keep_weight * moved_error)
        ratios = [one.delta.ratio for one in solved]
        return FitPoint(
            ridge,
            rank,
            fmean(one.recovery for one in neutral),
            fmean(one.after for one in neutral),
            fmean(one.after for one in kept) if kept else None,
            fmean(ratios),
            max(ratios),
            loss,
            error,
        )

    def _loss(self, group: Group, found: Sequence[Residual]) -> tuple[float, float]:
        """Mean over targets of the squared residual, and its standard error over the prompts of the group."""
        lengths = self.moments.measured[group].lengths
        parts = torch.stack([one.parts_N for one in found]).mean(dim=0)
        of_prompts = torch.stack([part.sum() for part in parts.split(list(lengths))]) * len(lengths)
        error = float(of_prompts.std()) / len(lengths) ** 0.5 if len(lengths) > 1 else 0.0
        return float(of_prompts.mean()), error

    def _put_together(self, num_parts: int | None) -> LeastSquares:
        shares = self.moments.shares(self._keep_weight, num_parts)
        return least_squares(shares, self.moments.padding_D, self.rank)
