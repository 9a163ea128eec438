"""How far a text encoder's states of one prompt moved: the one definition that the probe and the budget share.

The measure of a prompt is the mean over its tokens of the cosine between the base's and the tuned encoder's state of
that token. Cross-attention reads tokens one by one, so a mean over tokens sees what the DiT sees; the cosine of the
mean-pooled states, which is reported beside it, hides tokens that moved in opposite directions. Cosines do not see
lengths: those are in the norm ratio.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor


@dataclass(frozen=True)
class StateDrift:
    """One prompt's states against the base's.

    Attributes:
        cosine: mean over tokens of the cosine of the two states, in [-1, 1]; exactly 1 where no token moved.
        pooled_cosine: cosine of the two means over tokens.
        norm_ratio: mean over tokens of ||tuned|| / ||base||.
        distance: ||tuned - base||_F / ||base||_F over all tokens.
    """

    cosine: float
    pooled_cosine: float
    norm_ratio: float
    distance: float


def compare_states(base_LD: Tensor, tuned_LD: Tensor) -> StateDrift:
    """Compare the states of one prompt's true tokens (without padding), both [L, D], L at least 1; in float64.

    Raises:
        ValueError: the shapes differ, or there is no token.
    """
    if base_LD.shape != tuned_LD.shape or base_LD.ndim != 2 or not len(base_LD):
        raise ValueError(
            f"states of the shapes {tuple(base_LD.shape)} and {tuple(tuned_LD.shape)} do not compare"
        )
    if torch.equal(base_LD, tuned_LD):
        return StateDrift(1.0, 1.0, 1.0, 0.0)
    base, tuned = base_LD.double(), tuned_LD.double()
    base_norms, tuned_norms = base.norm(dim=1), tuned.norm(dim=1)
    base_norm = float(base_norms.norm())
    distance = float((tuned - base).norm())
    return StateDrift(
        cosine=float(row_cosines(base, tuned).mean()),
        pooled_cosine=float(row_cosines(base.mean(0, keepdim=True), tuned.mean(0, keepdim=True))),
        norm_ratio=float(torch.where(tuned_norms == base_norms, 1.0, tuned_norms / base_norms).mean()),
        distance=distance / base_norm if base_norm else float("inf"),
    )


def row_cosines(base_LD: Tensor, tuned_LD: Tensor) -> Tensor:
    """Cosine of each pair of rows, float64 [L]: exactly 1 for equal rows, 0 where only one of the two is zero."""
    base, tuned = base_LD.double(), tuned_LD.double()
    lengths = base.norm(dim=1) * tuned.norm(dim=1)
    cosines = (base * tuned).sum(dim=1) / lengths.clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where((base == tuned).all(dim=1), 1.0, cosines.clamp(-1.0, 1.0))


def mean_drift(drifts: Iterable[StateDrift]) -> float:
    """1 - mean over prompts of `cosine`: what `max_neutral_drift` caps, over the neutral prompts. 0 if nothing moved.

    Raises:
        ValueError: there are no prompts.
    """
    cosines = [drift.cosine for drift in drifts]
    if not cosines:
        raise ValueError("there is no prompt to compare")
    return 1.0 - fmean(cosines)


def drift_of(base: Sequence[Tensor], tuned: Sequence[Tensor]) -> float:
    """`mean_drift` of the states of several prompts, in the same order, each [L, D] at its true length."""
    return mean_drift(compare_states(*pair) for pair in zip(base, tuned, strict=True))
