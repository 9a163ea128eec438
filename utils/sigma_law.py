"""The law of the noise level: how often training visits which sigma. No torch, so that a plan can tell it.

sigma in (0, 1] is the noise level (1 = pure noise), timestep = 1000 * sigma is what the model is told.
"""

import math
import struct
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

NUM_TRAIN_TIMESTEPS = 1000
NUM_SIGMA_BINS = 10
_NORMAL = NormalDist()


@dataclass(frozen=True)
class SigmaLaw:
    """Distribution of sigma: a base law, shifted, then restricted to [min_t, max_t].

    The restriction truncates the shifted law (quantiles are drawn between those of the two ends), so that inside the
    range the shape of the law is kept and no draw is rejected. With `is_open_above` a draw lies below max_t also as the
    float32 timestep that the model is told: what lies at a boundary belongs to the range above it.
    """

    method: Literal["logit_normal", "uniform"] = "logit_normal"
    sigmoid_scale: float = 1.0
    shift: float = 1.0
    min_t: float = 0.0
    max_t: float = 1.0
    is_open_above: bool = False

    def quantile(self, probability: float) -> float:
        """Sigma below which `probability` of the unrestricted, shifted law lies."""
        if self.method == "uniform":
            base = probability
        else:
            normal = _NORMAL.inv_cdf(min(max(probability, 1e-12), 1 - 1e-12))
            base = 1 / (1 + math.exp(-self.sigmoid_scale * normal))
        return self.shift * base / (1 + (self.shift - 1) * base)

    def probability_below(self, sigma: float) -> float:
        """Share of the unrestricted, shifted law below `sigma`; the inverse of `quantile`."""
        if sigma <= 0:
            return 0.0
        if sigma >= 1:
            return 1.0
        if self.method == "uniform":
            return sigma / (self.shift - (self.shift - 1) * sigma)
        # In logit space the shift is an offset; written so, it is finite for every sigma strictly between 0 and 1.
        logit = math.log(sigma) - math.log1p(-sigma) - math.log(self.shift)
        return _NORMAL.cdf(logit / self.sigmoid_scale)

    def share_between(self, low: float, high: float) -> float:
        """Share of draws from `low` to below `high` (1 included), of the law as it is restricted to [min_t, max_t]."""
        start, end = self.probability_below(self.min_t), self.probability_below(self.max_t)
        if end <= start:
            # So far out in the law's tail that all draws fall on the end of the range that is nearer to the law.
            only = min(max(self.quantile(start), self.min_t), self.max_t)
            return float(low <= only < high or only == high == 1)
        below_low, below_high = (min(max(self.probability_below(sigma), start), end) for sigma in (low, high))
        return (below_high - below_low) / (end - start)

    def sample(self, generator: "torch.Generator") -> float:
        """Draw one sigma inside [min_t, max_t]."""
        import torch

        return self.restricted_quantile(torch.rand((), generator=generator, dtype=torch.float64).item())

    def restricted_quantile(self, probability: float) -> float:
        """Sigma below which `probability` of the law as it is restricted to [min_t, max_t] lies."""
        low, high = self.probability_below(self.min_t), self.probability_below(self.max_t)
        sigma = self.quantile(low + (high - low) * probability)
        return min(max(sigma, self.min_t, 1e-6), self._highest)

    @cached_property
    def _highest(self) -> float:
        return last_below(self.max_t) if self.is_open_above else self.max_t


@dataclass(frozen=True)
class SigmaBin:
    """Share of draws with a noise level from `low` to `high`: as configured, and without any restriction."""

    low: float
    high: float
    share: float
    unrestricted_share: float

    def __str__(self) -> str:
        return f"{self.low:.1f}-{self.high:.1f}"


def sigma_histogram(law: SigmaLaw) -> list[SigmaBin]:
    """Shares of the noise level per tenth."""
    free = replace(law, min_t=0.0, max_t=1.0, is_open_above=False)
    edges = [index / NUM_SIGMA_BINS for index in range(NUM_SIGMA_BINS + 1)]
    return [
        SigmaBin(low, high, law.share_between(low, high), free.share_between(low, high))
        for low, high in pairwise(edges)
    ]


def last_below(sigma: float) -> float:
    """The highest float32 sigma whose timestep, a float32 too, is below that of `sigma`, which is above 0."""
    below, limit = _float32(sigma), _float32(_float32(sigma) * NUM_TRAIN_TIMESTEPS)
    # Multiplying rounds, so the next number below may still have the timestep of the boundary itself.
    while below >= sigma or _float32(below * NUM_TRAIN_TIMESTEPS) >= min(limit, sigma * NUM_TRAIN_TIMESTEPS):
        below = _previous_float32(below)
    return below


def _float32(value: float) -> float:
    """The nearest float32, by the same rounding as torch's."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _previous_float32(value: float) -> float:
    """The float32 below a positive one."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return float(struct.unpack("<f", struct.pack("<I", bits - 1))[0])
