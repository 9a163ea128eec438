"""The loss of a step: what the last stage computes, and each sample's share in it for the metrics."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.flow_matching import NUM_SIGMA_BINS, NUM_TRAIN_TIMESTEPS, per_sample_loss, sigma_bin


@dataclass(frozen=True)
class _Record:
    losses_B: Tensor
    sigma_B: Tensor
    weight_B: Tensor
    sample_index_B: Tensor


class LossRecorder:
    """The loss function of the last stage; remembers each sample's loss for the metrics of the step."""

    def __init__(self) -> None:
        self._records: list[_Record] = []

    def __call__(self, velocity_BCFHW: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
        """Sum of weight * mean squared error over the micro-batch, a scalar."""
        target_BCFHW, sigma_B, weight_B, sample_index_B, *mask_BFHW = labels
        losses_B = per_sample_loss(velocity_BCFHW, target_BCFHW, *mask_BFHW)
        self._records.append(_Record(losses_B.detach(), sigma_B, weight_B, sample_index_B))
        return (losses_B * weight_B).sum()

    def clear(self) -> None:
        """Forget the last step."""
        self._records.clear()

    def totals(self) -> np.ndarray:
        """Sums and counts over samples with weight: [loss, count, loss per sigma bin..., count per bin...], float64."""
        totals = np.zeros(2 + 2 * NUM_SIGMA_BINS)
        for record in self._records:
            counted = record.weight_B.cpu() > 0
            losses = record.losses_B.cpu().double().numpy()[counted.numpy()]
            bins = sigma_bin(record.sigma_B.cpu()).numpy()[counted.numpy()]
            totals[0] += losses.sum()
            totals[1] += len(losses)
            np.add.at(totals, 2 + bins, losses)
            np.add.at(totals, 2 + NUM_SIGMA_BINS + bins, 1.0)
        return totals

    def timestep_range(self) -> tuple[float, float]:
        """Lowest and highest timestep of the samples with weight; (inf, -inf) where there are none."""
        low, high = math.inf, -math.inf
        for record in self._records:
            timesteps = record.sigma_B.cpu()[record.weight_B.cpu() > 0] * NUM_TRAIN_TIMESTEPS
            if timesteps.numel():
                low, high = min(low, timesteps.min().item()), max(high, timesteps.max().item())
        return low, high

    def sample_losses(self) -> list[float]:
        """Each sample's loss, in the order in which they came."""
        return [loss for record in self._records for loss in record.losses_B.tolist()]

    def non_finite_samples(self) -> list[int]:
        """Indices of samples of this step whose loss is not finite."""
        found: list[int] = []
        for record in self._records:
            bad = ~torch.isfinite(record.losses_B.cpu())
            found += record.sample_index_B.cpu()[bad].tolist()
        return found


def loss_by_bin(totals: np.ndarray) -> dict[str, float]:
    """Mean loss of each tenth of the noise range that the step visited."""
    sums, counts = totals[2 : 2 + NUM_SIGMA_BINS], totals[2 + NUM_SIGMA_BINS :]
    return {
        f"{index / NUM_SIGMA_BINS:.1f}-{(index + 1) / NUM_SIGMA_BINS:.1f}": float(
            np.float32(sums[index] / counts[index])
        )
        for index in range(NUM_SIGMA_BINS)
        if counts[index] > 0
    }
