"""Flow matching as Wan trains it: the law of the noise level, noising, target and loss.

Words: sigma in (0, 1] is the noise level (1 = pure noise), timestep = 1000 * sigma is what the model is told,
noisy = (1 - sigma) * latents + sigma * noise, target velocity = noise - latents.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
NUM_SIGMA_BINS = 10
_NORMAL = NormalDist()


@dataclass(frozen=True)
class SigmaLaw:
    """Distribution of sigma: a base law, shifted, then restricted to [min_t, max_t].

    The restriction truncates the shifted law (quantiles are drawn between those of the two ends), so that inside the
    range the shape of the law is kept and no draw is rejected.
    """

    method: Literal["logit_normal", "uniform"] = "logit_normal"
    sigmoid_scale: float = 1.0
    shift: float = 1.0
    min_t: float = 0.0
    max_t: float = 1.0

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

    def sample(self, generator: torch.Generator) -> float:
        """Draw one sigma inside [min_t, max_t]."""
        return self.restricted_quantile(torch.rand((), generator=generator, dtype=torch.float64).item())

    def restricted_quantile(self, probability: float) -> float:
        """Sigma below which `probability` of the law as it is restricted to [min_t, max_t] lies."""
        low, high = self.probability_below(self.min_t), self.probability_below(self.max_t)
        sigma = self.quantile(low + (high - low) * probability)
        return min(max(sigma, self.min_t, 1e-6), self.max_t)


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Noisy latents at level sigma (scalar, or broadcastable to the latents)."""
    return (1 - sigma) * latents + sigma * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """What the model is asked to predict."""
    return noise - latents


def per_sample_loss(velocity_BCFHW: Tensor, target_BCFHW: Tensor, mask_BFHW: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample, float32 [B].

    Args:
        velocity_BCFHW: what the model answers.
        target_BCFHW: what it should answer.
        mask_BFHW: how much each latent position counts, in [0, 1], the same in all channels, with F = 1 also in all
            frames; somewhere in each sample above 0. The mean is then sum(mask * error^2) / sum(mask), so that a sample
            weighs as much whatever its mask leaves of it. All ones give the same bits as None.
    """
    errors_BCFHW = (velocity_BCFHW.float() - target_BCFHW.float()).square()
    if mask_BFHW is not None:
        weights_BFHW = mask_BFHW / mask_BFHW.flatten(1).mean(1)[:, None, None, None]
        errors_BCFHW = errors_BCFHW * weights_BFHW[:, None]
    return errors_BCFHW.flatten(1).mean(1)


def sigma_bin(sigma: Tensor) -> Tensor:
    """Index of the tenth of [0, 1] that each sigma falls into; 1.0 belongs to the last."""
    return (sigma * NUM_SIGMA_BINS).long().clamp(0, NUM_SIGMA_BINS - 1)
