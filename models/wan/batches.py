"""From sample visits to the tensors of a micro-batch: read the cache, noise, target, text."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from models.wan.arch import VariantInfo
from models.wan.caching import EMPTY_CAPTION, WanCache
from models.wan.layers import Workload
from models.wan.media import time_rows, video_tokens
from models.wan.noise import build_sigma_law
from models.wan.stages import TextWire
from models.wan.text_encoder import WanTokenizer, pad_token_ids
from utils.config.experts import alternates, expert_of_turn, side_config, sides_of
from utils.config.guardrails import mode_of
from utils.config.schema import TrainConfig
from utils.data.caption_aug import CaptionAug, build_caption_aug
from utils.data.manifest import SampleRecord
from utils.data.sampler import MicroBatch
from utils.flow_matching import NUM_TRAIN_TIMESTEPS, SigmaLaw, add_noise, velocity_target
from utils.layers import PreparedBatch
from utils.rng import derive_seed, generator


@dataclass(frozen=True)
class _NoisedSample:
    """One visit: what the DiT sees [C, F, H, W] (I2V: with conditioning channels), what it should answer, how noisy.

    With `clean_first` the first latent frame of `inputs_CFHW` has no noise, whatever `sigma` says of the others.
    """

    inputs_CFHW: Tensor
    target_CFHW: Tensor
    sigma: float
    clean_first: bool


class WanBatches:
    """Makes micro-batches. Every draw is named by (seed, sample, visit), so who asks and when does not matter."""

    def __init__(
        self,
        config: TrainConfig,
        variant: VariantInfo,
        samples: Sequence[SampleRecord],
        cache: WanCache,
        tokenizer_dir: Path,
    ) -> None:
        self._config = config
        self._mode = mode_of(config)
        self._variant = variant
        self._samples = samples
        self._cache = cache
        self._tokenizer_dir = tokenizer_dir
        # Only where captions are encoded at each visit; in dit_lora the cache has whole ones alone.
        self.caption_aug: CaptionAug | None = (
            build_caption_aug(config.model.caption_aug) if self._mode == "encoder_ft" else None
        )
        # Where the experts take turns, this is the whole law, and each step draws from its expert's part.
        self.sigma_law = build_sigma_law(config.model, variant)
        self._laws = {
            expert: build_sigma_law(side_config(config, expert).model, variant) for expert in sides_of(config)
        }

    @cached_property
    def tokenizer(self) -> WanTokenizer:
        """The tokenizer, loaded on first use."""
        return WanTokenizer(self._tokenizer_dir)

    def describe_captions(self) -> list[str]:
        """How captions are augmented, for people; nothing where they are not."""
        aug = self.caption_aug
        if aug is None:
            return []
        captions = [caption for sample in self._samples for caption in sample.captions]
        found, total = aug.num_with_keyword(captions), len(captions)
        lines = [
            f"captions: the keyword alone at {aug.single:.1%} of visits, {aug.window_words} words round it at "
            f"{aug.short:.1%}, else whole; {found} of {total} captions hold a keyword, the others stay whole"
        ]
        if not found:
            lines.append(
                "warning: no caption holds a keyword, so caption_aug changes nothing; keywords are whole words, check "
                "them and case_insensitive"
            )
        return lines

    def describe_first_frame(self) -> list[str]:
        """What becomes of first frames, for people; nothing where all are noised."""
        share = self._config.model.first_frame_prob
        if share == 0:
            return []
        videos = sum(self._has_later_frames(sample) for sample in self._samples)
        if not videos:
            return [
                f"warning: first_frame_prob = {share:g} changes nothing: no sample has more than one latent frame"
            ]
        return [
            f"first frame: clean, at timestep 0 and left out of the loss at {share:.1%} of visits of {videos} of "
            f"{len(self._samples)} samples; images never"
        ]

    @cached_property
    def workload(self) -> Workload:
        """The dataset's mean sample."""
        video = [self._sample_tokens(sample) for sample in self._samples]
        text = [
            fmean(len(self.tokenizer(caption)) for caption in sample.captions) for sample in self._samples
        ]
        share = self._config.model.first_frame_prob
        rows = [time_rows(self._variant, sample.bucket, share) for sample in self._samples]
        return Workload(fmean(video), fmean(text), fmean(rows))

    def prepare(
        self, batch: MicroBatch, weight: float, *, need_inputs: bool, need_labels: bool
    ) -> PreparedBatch:
        """Read, noise and label one micro-batch; see `TrainableModel.prepare`. A stage that needs neither reads nothing."""
        if not (need_inputs or need_labels):
            return PreparedBatch(None, None)
        law = self._law_of(batch)
        noised = [self._noised(visit.sample_index, visit.visit, law) for visit in batch.visits]
        sigma_B = torch.tensor([sample.sigma for sample in noised], dtype=torch.float32)
        inputs = None
        if need_inputs:
            text, lens_B = self._text(batch)
            inputs = TextWire(
                text=text,
                lens_B=lens_B,
                latents_BCFHW=torch.stack([sample.inputs_CFHW for sample in noised]),
                timesteps_BT=_timesteps(noised, sigma_B),
                seed=torch.tensor([self._micro_batch_seed(batch)], dtype=torch.int64),
            )
        labels = None
        if need_labels:
            targets_BCFHW = torch.stack([sample.target_CFHW for sample in noised])
            indices_B = torch.tensor([visit.sample_index for visit in batch.visits], dtype=torch.int64)
            labels = (
                targets_BCFHW,
                sigma_B,
                torch.full_like(sigma_B, weight),
                indices_B,
                *self._masks(batch, noised),
            )
        return PreparedBatch(None if inputs is None else tuple(inputs), labels)

    def num_tokens(self, batch: MicroBatch) -> int:
        """Video tokens of a micro-batch."""
        return sum(self._sample_tokens(self._samples[visit.sample_index]) for visit in batch.visits)

    def describe_sample(self, sample_index: int) -> str:
        """The sample's file, and where in it a clip begins if not at the beginning."""
        sample = self._samples[sample_index]
        place = f" (clip from {sample.clip_start_seconds:.2f} s)" if sample.clip_start_seconds else ""
        return f"{sample.path}{place}"

    def _law_of(self, batch: MicroBatch) -> SigmaLaw:
        """The law that a step draws from."""
        if not alternates(self._config):
            return self.sigma_law
        return self._laws[expert_of_turn(self._config.seed, batch.turn)]

    def _noised(self, sample_index: int, visit: int, law: SigmaLaw) -> _NoisedSample:
        item = self._cache.read_latents(sample_index)
        latents = item["latents"].float()
        random, sigma = self._noise_of(self._samples[sample_index].sample_id, visit, law)
        noise = torch.randn(latents.shape, generator=random)
        inputs = add_noise(latents, noise, sigma)
        clean_first = self._is_conditioned(self._samples[sample_index], visit)
        if clean_first:
            inputs[:, 0] = latents[:, 0]
        if "cond" in item:
            inputs = torch.cat((inputs, item["cond"].float()))
        return _NoisedSample(inputs, velocity_target(latents, noise), sigma, clean_first)

    def _noise_of(self, sample_id: int, visit: int, law: SigmaLaw) -> tuple[torch.Generator, float]:
        """What the noise of a visit is drawn from, and its level sigma."""
        seed = self._config.seed
        return generator(seed, "noise", sample_id, visit), law.sample(
            generator(seed, "sigma", sample_id, visit)
        )

    def _has_later_frames(self, sample: SampleRecord) -> bool:
        return self._variant.latent_frames(sample.bucket.num_frames) > 1

    def _is_conditioned(self, sample: SampleRecord, visit: int) -> bool:
        """Whether a visit keeps the first latent frame clean. Never of an image, which has nothing behind it to learn."""
        share = self._config.model.first_frame_prob
        if share == 0 or not self._has_later_frames(sample):
            return False
        draw = torch.rand((), generator=generator(self._config.seed, "first_frame", sample.sample_id, visit))
        return draw.item() < share

    def _masks(self, batch: MicroBatch, noised: Sequence[_NoisedSample]) -> tuple[Tensor] | tuple[()]:
        """How much each latent position counts, mask_BFHW; F is 1 where no first frame is left out.

        Nothing where all of the micro-batch counts whole.
        """
        masks = [self._samples[visit.sample_index].mask for visit in batch.visits]
        conditioned = any(sample.clean_first for sample in noised)
        if not conditioned and all(mask is None for mask in masks):
            return ()
        _, frames, height, width = noised[0].target_CFHW.shape
        rows = []
        for mask, sample in zip(masks, noised, strict=True):
            row_HW = torch.ones(height, width) if mask is None else torch.from_numpy(mask.grid.weights_HW())
            row_FHW = row_HW.repeat(frames if conditioned else 1, 1, 1)
            if sample.clean_first:
                row_FHW[0] = 0.0
            rows.append(row_FHW)
        return (torch.stack(rows),)

    def _text(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Token ids (encoder_ft) or cached states (dit_lora) of the micro-batch, padded with zeros, and true lengths."""
        captions = [self._caption(visit.sample_index, visit.visit) for visit in batch.visits]
        if self._mode == "encoder_ft":
            return pad_token_ids([self.tokenizer(caption) for caption in captions])
        states = [self._cache.read_text(caption) for caption in captions]
        lens_B = torch.tensor([len(rows) for rows in states], dtype=torch.int64)
        return nn.utils.rnn.pad_sequence(states, batch_first=True), lens_B

    def _caption(self, sample_index: int, visit: int) -> str:
        """The caption that a visit sees: the empty one, or one of the sample's, all equally likely."""
        sample = self._samples[sample_index]
        if self._config.uncond_fraction > 0:
            draw = torch.rand((), generator=generator(self._config.seed, "uncond", sample.sample_id, visit))
            if draw.item() < self._config.uncond_fraction:
                return EMPTY_CAPTION
        caption = self._one_of(sample, visit)
        if self.caption_aug is None:
            return caption
        return self.caption_aug.augment(caption, self._config.seed, sample.sample_id, visit)

    def _one_of(self, sample: SampleRecord, visit: int) -> str:
        """The caption of this visit, of a file that has several."""
        if len(sample.captions) == 1:
            return sample.captions[0]
        random = generator(self._config.seed, "caption", sample.sample_id, visit)
        return sample.captions[int(torch.randint(len(sample.captions), (), generator=random))]

    def _micro_batch_seed(self, batch: MicroBatch) -> int:
        names = "/".join(f"{self._samples[v.sample_index].sample_id}:{v.visit}" for v in batch.visits)
        return derive_seed(self._config.seed, "micro_batch", names)

    def _sample_tokens(self, sample: SampleRecord) -> int:
        return video_tokens(self._variant, sample.bucket)


def _timesteps(noised: Sequence[_NoisedSample], sigma_B: Tensor) -> Tensor:
    """What the model is told, [B, 1]; where a first frame of the micro-batch is clean, [B, F] with 0 for that frame."""
    timesteps_B1 = (sigma_B * NUM_TRAIN_TIMESTEPS).unsqueeze(1)
    clean_B = torch.tensor([sample.clean_first for sample in noised])
    if not clean_B.any():
        return timesteps_B1
    timesteps_BF = timesteps_B1.repeat(1, noised[0].target_CFHW.shape[1])
    timesteps_BF[clean_B, 0] = 0.0
    return timesteps_BF
