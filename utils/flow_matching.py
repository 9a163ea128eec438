"""Flow matching as Wan trains it: noising, target and loss; the law of the noise level is in `utils.sigma_law`.

Words: sigma in (0, 1] is the noise level (1 = pure noise), timestep = 1000 * sigma is what the model is told,
noisy = (1 - sigma) * latents + sigma * noise, target velocity = noise - latents.
"""

from torch import Tensor

from utils.sigma_law import NUM_SIGMA_BINS, NUM_TRAIN_TIMESTEPS, SigmaLaw

__all__ = [
    "NUM_SIGMA_BINS",
    "NUM_TRAIN_TIMESTEPS",
    "SigmaLaw",
    "add_noise",
    "per_sample_loss",
    "sigma_bin",
    "velocity_target",
]


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
