"""How far a text encoder's states have moved: the one definition that probes and the budget in training share."""

from collections.abc import Sequence

import torch
from torch import Tensor


def token_cosine(base_LD: Tensor, tuned_LD: Tensor) -> float:
    """Mean over a prompt's tokens of the cosine between the states of both encoders.

    Token by token and not of a mean of the states, because the DiT's cross-attention reads each token's state for itself.
    Two states of zeros have a cosine of 1, a state of zeros and another one 0.

    Args:
        base_LD: states at the prompt's true length.
        tuned_LD: likewise; the token ids are the same.

    Raises:
        ValueError: the shapes differ.
    """
    if base_LD.shape != tuned_LD.shape:
        raise ValueError(f"states are {list(base_LD.shape)} and {list(tuned_LD.shape)}")
    base, tuned = base_LD.double(), tuned_LD.double()
    norms_L = base.norm(dim=-1) * tuned.norm(dim=-1)
    both_zero_L = (base == 0).all(dim=-1) & (tuned == 0).all(dim=-1)
    # Normalised before the product: with equal states the cosine is 1 to the last bits, whatever their length.
    unit_base, unit_tuned = (
        states / states.norm(dim=-1, keepdim=True).clamp_min(1e-300) for states in (base, tuned)
    )
    cosines_L = torch.where(norms_L == 0, both_zero_L.double(), (unit_base * unit_tuned).sum(dim=-1))
    return float(cosines_L.mean())


def drift(cosines: Sequence[float]) -> float:
    """1 - the mean over prompts of `token_cosine`; not below 0, which only rounding would bring about. NaN stays NaN.

    Raises:
        ValueError: there are no prompts.
    """
    if not cosines:
        raise ValueError("no prompts")
    value = 1.0 - sum(cosines) / len(cosines)
    return 0.0 if value < 0 else value
