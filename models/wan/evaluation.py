"""Micro-batches of a dataset that is evaluated: fixed noise levels, fixed noise, the first caption of each file, whole."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from models.wan.arch import VariantInfo
from models.wan.batches import WanBatches
from models.wan.caching import WanCache
from utils.config.schema import TrainConfig
from utils.data.manifest import SampleRecord
from utils.rng import generator
from utils.sigma_law import SigmaLaw


class WanEvalBatches(WanBatches):
    """As in training, but visit q of a sample is its quantile q of the noise law, with noise of its own, always the same.

    No caption is left out or shortened; of several captions the first is used. First frames of videos are clean in every
    visit or in none.
    """

    def __init__(
        self,
        config: TrainConfig,
        variant: VariantInfo,
        samples: Sequence[SampleRecord],
        cache: WanCache,
        tokenizer_dir: Path,
        quantiles: Sequence[float],
        *,
        first_frame: bool | None = None,
    ) -> None:
        """`first_frame`: whether videos are image-conditioned; None: only if every visit of the training is."""
        self.first_frame = config.model.first_frame_prob == 1 if first_frame is None else first_frame
        model = replace(config.model, caption_aug=None, first_frame_prob=float(self.first_frame))
        plain = replace(config, uncond_fraction=0.0, model=model)
        super().__init__(plain, variant, samples, cache, tokenizer_dir)
        self._quantiles = tuple(quantiles)
        self.sigmas = tuple(self.sigma_law.restricted_quantile(quantile) for quantile in quantiles)

    def _noise_of(self, sample_id: int, visit: int, law: SigmaLaw) -> tuple[torch.Generator, float]:
        # By the quantile's value: it keeps its noise when other quantiles come and go.
        name = repr(self._quantiles[visit])
        return generator(self._config.seed, "eval", sample_id, name), self.sigmas[visit]

    def _one_of(self, sample: SampleRecord, visit: int) -> str:
        return sample.captions[0]
