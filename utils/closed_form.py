"""The adapter that makes linear maps answer to changed inputs as they did to the old ones: least squares, no training.

A linear map W gets inputs x; what they were before is x + t. Wanted is a change E of W with

    (W + E) x = W (x + t)      for ordinary tokens,
    (W + E) x = W x            for tokens that are to be kept (t = 0),
    E p = 0                    for a constant input p, exactly,

least squares over all tokens with a ridge on E. With the second moments S = sum of w x x^T and T = sum of w t x^T and
Q = 1 - p p^T / |p|^2, E = W M with M = T Q (Q S Q + ridge)^-1: one matrix for all maps that share their inputs. The
objective of any other E' exceeds that of E by |(E' - E) C|_F^2, C C^T = Q S Q + ridge, so the best change of rank r is the
truncated SVD of E C = W T Q C^-T, times C^-1 (Eckart and Young in the metric of the data).

All sums and factors are float64. The memory is that of the moments, [D, D] each, whatever the number of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.errors import UserError
from utils.low_rank import OVERSAMPLING, TOLERANCE, TopSingular, balanced, top_singular
from utils.rng import generator

# A factor whose pivots differ by more than this has lost what it would divide by.
SINGULAR = 1e-13
_BLOCKS = 4  # of a symmetric sum, of which the upper ones are computed
_FIRST_PASSES = 12


class UnsolvableError(UserError):
    """There are too few independent tokens for what is asked, or for so small a ridge."""


class Moments:
    """Sums over tokens: x x^T and, where there is something to restore, t x^T. Float64, on `device`."""

    def __init__(self, width: int, device: torch.device | None = None, *, is_kept: bool = False) -> None:
        """Nothing yet.

        Args:
            width: D.
            device: where the sums are.
            is_kept: of tokens that are to stay as they are, t = 0.
        """
        self._inputs = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._wanted = None if is_kept else torch.zeros_like(self._inputs)
        self.num_tokens = 0
        self.weight = 0.0

    @property
    def width(self) -> int:
        """D."""
        return self._inputs.shape[0]

    @property
    def is_changed(self) -> bool:
        """Whether any token is to be restored to something else than it is."""
        return self._wanted is not None and bool(self._wanted.any())

    def add(self, inputs_ND: Tensor, wanted_ND: Tensor | None = None, weight: float = 1.0) -> None:
        """Add tokens.

        Args:
            inputs_ND: what the maps get now, x.
            wanted_ND: what they used to get, x + t; None for tokens that are kept.
            weight: how often each of them counts.

        Raises:
            UserError: a value is not finite.
        """
        inputs = inputs_ND.to(self._inputs) * weight**0.5
        if not bool(torch.isfinite(inputs).all()):
            raise UserError(
                "a text state is NaN or infinite behind the text embedding; the encoder or the DiT is damaged"
            )
        step = -(-self.width // _BLOCKS)
        for start in range(0, self.width, step):
            self._inputs[start : start + step, start:].addmm_(
                inputs[:, start : start + step].T, inputs[:, start:]
            )
        if self._wanted is not None and wanted_ND is not None:
            change = wanted_ND.to(self._inputs) * weight**0.5 - inputs
            if not bool(torch.isfinite(change).all()):
                raise UserError(
                    "a base text state is NaN or infinite behind the text embedding; the encoder or the DiT is damaged"
                )
            self._wanted.addmm_(change.T, inputs)
        self.num_tokens += len(inputs)
        self.weight += weight * len(inputs)

    def inputs(self) -> Tensor:
        """Sum of x x^T, [D, D]."""
        upper = self._inputs.triu()
        return upper + upper.triu(1).T

    def wanted(self) -> Tensor | None:
        """Sum of t x^T, [D, D]; None of kept tokens."""
        return self._wanted


@dataclass(frozen=True)
class Share:
    """Moments, and the weight that all their tokens have together."""

    moments: Sequence[Moments]
    weight: float


@dataclass(frozen=True)
class LeastSquares:
    """The problem, whatever the ridge: Q S Q with the constant input's direction filled in, T Q, and the ridge's unit.

    Attributes:
        gram: [D, D].
        cross: [D, D].
        unit: mean eigenvalue of S, so that a ridge is a number without units.
        num_independent: independent directions among the tokens, counted up to what was asked for.
    """

    gram: Tensor
    cross: Tensor
    unit: float
    num_independent: int

    def factored(self, ridge: float) -> "Factored":
        """With a ridge, in units of the mean eigenvalue.

        Raises:
            UnsolvableError: the system is singular.
        """
        system = self.gram.clone()
        system.diagonal().add_(ridge * self.unit)
        factor, failed = torch.linalg.cholesky_ex(system)
        pivots = factor.diagonal()
        if int(failed) or not float(pivots.min()) ** 2 > SINGULAR * float(pivots.max()) ** 2:
            raise UnsolvableError(
                f"with --ridge {ridge:g} the system of {len(pivots)} equations is singular: the prompts' tokens do not reach "
                "all directions; give a larger --ridge, or more and more varied prompts"
            )
        return Factored(self, ridge, factor)


def least_squares(shares: Sequence[Share], pinned_D: Tensor | None, num_needed: int) -> LeastSquares:
    """Put moments together.

    Args:
        shares: of ordinary tokens first; shares of no weight or no token do not count.
        pinned_D: the constant input that must not move; None is none.
        num_needed: independent directions among the ordinary tokens that there must be: the rank of what is solved for.

    Raises:
        UnsolvableError: there are fewer.
    """
    counted = [(share, sum(one.weight for one in share.moments)) for share in shares]
    used = [(share, count) for share, count in counted if count and share.weight]
    width = used[0][0].moments[0].width
    gram = torch.zeros_like(used[0][0].moments[0].inputs())
    cross = torch.zeros_like(gram)
    for share, count in used:
        for one in share.moments:
            gram += one.inputs() * (share.weight / count)
            wanted = one.wanted()
            if wanted is not None:
                cross += wanted * (share.weight / count)
    found = _independent(gram, num_needed)
    if found < num_needed:
        raise UnsolvableError(
            f"the prompts hold {found} independent tokens, and rank {num_needed} needs at least as many; give more and more "
            "varied prompts with --prompts, or a lower --rank"
        )
    unit = float(gram.trace()) / width
    if pinned_D is not None and bool(pinned_D.any()):  # 0 does not move anyway
        axis = (pinned_D / pinned_D.norm()).to(gram)
        moved = gram @ axis
        gram += torch.outer(axis, axis) * (float(axis @ moved) + unit)
        gram -= torch.outer(axis, moved) + torch.outer(moved, axis)
        cross -= torch.outer(cross @ axis, axis)
    return LeastSquares(gram, cross, unit, found)


def _independent(gram: Tensor, limit: int) -> int:
    """Independent directions of a positive semidefinite matrix, counted up to `limit`: those of a random sketch of it."""
    width = gram.shape[0]
    size = min(limit + OVERSAMPLING, width)
    sketch = torch.randn(width, size, dtype=gram.dtype, generator=generator(0, "independent")).to(gram.device)
    values = torch.linalg.svdvals(gram @ sketch)
    if not float(values[0]):
        return 0
    return min(int((values > values[0] * width * torch.finfo(gram.dtype).eps).sum()), limit)


@dataclass(frozen=True)
class Solution:
    """The change of one map: E = up @ down, float64.

    Attributes:
        down: [r, D].
        up: [O, r].
        singular: [O, r], [r] and [D, k] of E C: see `TopSingular`.
    """

    down: Tensor
    up: Tensor
    singular: TopSingular


class Factored:
    """The problem with a ridge, ready to be solved for any map."""

    def __init__(self, problem: LeastSquares, ridge: float, factor: Tensor) -> None:
        self.ridge = ridge
        self._cross = problem.cross
        self._factor = factor
        self._combined: Tensor | None = None
        self._common: Tensor | None = None

    def combine(self) -> "Factored":
        """The same, ready for many maps: T Q C^-T as one matrix, [D, D] more memory and a third less work for each."""
        self._combined = torch.linalg.solve_triangular(self._factor, self._cross.T, upper=False).T
        return self

    def solve(
        self, weight_OD: Tensor, rank: int, start: Tensor | None = None, tolerance: float = TOLERANCE
    ) -> Solution:
        """The best change of at most `rank` for a map.

        Args:
            weight_OD: W.
            rank: at most D and O.
            start: a block of directions of a map that is alike, [D, k].
            tolerance: as of `top_singular`.
        """
        weight = weight_OD.to(self._cross)
        block = self._start(rank) if start is None or start.shape[1] < rank else start
        found = top_singular(
            lambda x: weight @ self._map(x),
            lambda y: self._map_transposed(weight.T @ y),
            block,
            rank,
            tolerance,
        )
        up, down = self.product_of(found, rank)
        return Solution(down, up, found)

    def product_of(self, found: TopSingular, rank: int) -> tuple[Tensor, Tensor]:
        """up and down of the leading `rank` directions, of one size."""
        down = torch.linalg.solve_triangular(self._factor.T, found.right[:, :rank], upper=True).T
        return balanced(found.left[:, :rank] * found.values[:rank], down)

    def full(self, weight_OD: Tensor, inputs_ND: Tensor) -> Tensor:
        """E x of the change of full rank, [N, O] float64."""
        solved = torch.cholesky_solve(inputs_ND.to(self._cross).T, self._factor)
        return (weight_OD.to(self._cross) @ (self._cross @ solved)).T

    def _map(self, x: Tensor) -> Tensor:
        if self._combined is not None:
            return self._combined @ x
        return self._cross @ torch.linalg.solve_triangular(self._factor.T, x, upper=True)

    def _map_transposed(self, y: Tensor) -> Tensor:
        if self._combined is not None:
            return self._combined.T @ y
        return torch.linalg.solve_triangular(self._factor, self._cross.T @ y, upper=False)

    def _start(self, rank: int) -> Tensor:
        """The leading directions of T Q C^-T, which all maps share; taken once."""
        width = len(self._factor)
        size = min(rank + OVERSAMPLING, width)
        if self._common is None or self._common.shape[1] < size:
            drawn = torch.randn(width, size, dtype=torch.float64, generator=generator(0, "low_rank"))
            self._common = top_singular(
                self._map,
                self._map_transposed,
                drawn.to(self._cross.device),
                size,
                tolerance=1e-3,
                max_passes=_FIRST_PASSES,
            ).block
        return self._common


@dataclass(frozen=True)
class Residual:
    """How far a map's answers are from the wanted ones, relative to these: before the change and after it.

    Of kept tokens `before` is 0 and `after` how far they were moved.

    Attributes:
        before, after: norms over all tokens.
        parts_N: what each token has of `after` squared; they add up to it.
    """

    before: float
    after: float
    parts_N: Tensor

    @property
    def recovery(self) -> float:
        """1 - after / before: 1 where everything is restored, below 0 where it became worse; 0 where nothing was lost."""
        return 1.0 - self.after / self.before if self.before else 0.0


@dataclass(frozen=True)
class Answers:
    """What a map answers to tokens, before any change of it.

    Attributes:
        size: squared norm of the wanted answers.
        missing_NO: wanted answers less those that are given; None of kept tokens, where it is 0.
    """

    size: float
    missing_NO: Tensor | None


def answers_of(weight_OD: Tensor, inputs_ND: Tensor, wanted_ND: Tensor | None) -> Answers:
    """Ask the map; products in the dtype of `weight_OD`.

    Args:
        weight_OD: W.
        inputs_ND: what the map gets now.
        wanted_ND: what it used to get; None for tokens that are kept. Their answers are not all 0.
    """
    inputs = inputs_ND.to(weight_OD)
    wanted = inputs if wanted_ND is None else wanted_ND.to(weight_OD)
    size = float((wanted @ weight_OD.T).double().square().sum())
    return Answers(size, None if wanted_ND is None else (wanted - inputs) @ weight_OD.T)


def residual(answers: Answers, up: Tensor, down: Tensor, inputs_ND: Tensor) -> Residual:
    """Measure a change, [O, r] times [r, D], on the tokens of `answers`; products in the dtype of `inputs_ND`."""
    return residual_of(answers, (inputs_ND @ down.to(inputs_ND).T) @ up.to(inputs_ND).T)


def residual_of(answers: Answers, change_NO: Tensor) -> Residual:
    """The same where E x is there already."""
    missing = answers.missing_NO
    before = 0.0 if missing is None else float(missing.double().square().sum() / answers.size) ** 0.5
    left = change_NO if missing is None else missing - change_NO.to(missing)
    parts = left.double().square().sum(dim=1) / answers.size
    return Residual(before, float(parts.sum()) ** 0.5, parts.cpu())
