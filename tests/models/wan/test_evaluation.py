"""Micro-batches of an evaluation: the same noise each time, at the quantiles of the law, with whole captions."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.wan.arch import VARIANTS
from models.wan.checkpoint import TOKENIZER_DIR
from models.wan.evaluation import WanEvalBatches
from models.wan.stages import TextWire
from utils.config.schema import CaptionAugConfig
from utils.data.buckets import Bucket
from utils.data.manifest import SampleRecord
from utils.data.media import MediaInfo
from utils.data.sampler import MicroBatch, Visit
from utils.rng import generator

BUCKET = Bucket(64, 32, 5)
BOTH = {"need_inputs": True, "need_labels": True}
LATENTS_CFHW = torch.zeros(16, 2, 2, 4)


class MemoryCache:
    def read_latents(self, sample_index):
        return {"latents": LATENTS_CFHW}

    def read_text(self, caption):
        return torch.full((len(caption), 6), 1.0)


@pytest.fixture
def make_batches(tiny_ti2v, make_config):
    def make(mode="dit_lora", quantiles=(0.1, 0.5), model=None, first_frame=None, **top) -> WanEvalBatches:
        sample = SampleRecord(
            sample_id=1000,
            path=Path("clip.mp4"),
            kind="video",
            captions=("a red circle moves to the right", "something else"),
            bucket=BUCKET,
            num_repeats=1.0,
            content_hash="0" * 32,
            clip_start_seconds=0.0,
            info=MediaInfo("video", 64, 32, 48, 24.0, 2.0),
        )
        samples = [sample, replace(sample, sample_id=1001)]
        model = {"expert": "high_noise"} | (model or {})
        config = make_config(mode, model=model, **top)
        tokenizer = tiny_ti2v / TOKENIZER_DIR
        return WanEvalBatches(
            config,
            VARIANTS["t2v-a14b"],
            samples,
            MemoryCache(),
            tokenizer,
            quantiles,
            first_frame=first_frame,
        )

    return make


def noise_of(batches: WanEvalBatches, sample: int, quantile: int) -> tuple[torch.Tensor, float]:
    batch = MicroBatch((Visit(sample, quantile),), BUCKET, 0)
    target_BCFHW, sigma_B, *_ = batches.prepare(batch, 1.0, **BOTH).labels
    return target_BCFHW[0], sigma_B.item()  # the latents are 0, so the target is the noise


def test_noise_has_the_name_of_seed_sample_and_quantile(make_batches):
    noise, _ = noise_of(make_batches(seed=9), 1, 0)
    assert torch.equal(noise, torch.randn(LATENTS_CFHW.shape, generator=generator(9, "eval", 1001, "0.1")))
    # A quantile keeps its noise when others come and go.
    assert torch.equal(noise, noise_of(make_batches(seed=9, quantiles=(0.05, 0.1)), 1, 1)[0])
    for batches, sample, quantile in (
        (make_batches(seed=8), 1, 0),
        (make_batches(seed=9), 0, 0),
        (make_batches(seed=9), 1, 1),
    ):
        assert not torch.equal(noise, noise_of(batches, sample, quantile)[0])


def test_levels_are_quantiles_of_the_law_that_training_draws_from(make_batches):
    """Restricted to the expert's range, as many draws lie below a level as its quantile says."""
    quantiles = (0.1, 0.3, 0.5, 0.9)
    batches = make_batches(quantiles=quantiles, model={"shift": 5.0})
    draws = torch.tensor([batches.sigma_law.sample(generator(0, "x", index)) for index in range(4000)])
    for index, quantile in enumerate(quantiles):
        _, sigma = noise_of(batches, 0, index)
        assert 0.875 <= sigma <= 1.0
        assert (draws <= sigma).float().mean().item() == pytest.approx(quantile, abs=0.03)


@pytest.mark.parametrize(
    ("share", "given", "expected"),
    [(0.0, None, False), (0.7, None, False), (1.0, None, True), (0.7, True, True), (1.0, False, False)],
)
def test_first_frames_are_clean_in_every_visit_or_in_none(share, given, expected, make_batches):
    """Without a word, only where training never sees another one; probes look at samples so."""
    plain, batches = make_batches(), make_batches(model={"first_frame_prob": share}, first_frame=given)
    for quantile in range(2):
        batch = MicroBatch((Visit(0, quantile), Visit(1, quantile)), BUCKET, 0)
        prepared, without = (one.prepare(batch, 1.0, **BOTH) for one in (batches, plain))
        wire, other = TextWire(*prepared.inputs), TextWire(*without.inputs)
        assert wire.timesteps_BT.shape == (2, 2 if expected else 1)
        assert (len(prepared.labels) == 5) is expected
        # The noise of the later frames is the same, so that the two evaluations differ by the condition alone.
        assert torch.equal(wire.latents_BCFHW[:, :, 1:], other.latents_BCFHW[:, :, 1:])
        assert (not wire.latents_BCFHW[:, :, 0].any()) is expected


def test_captions_are_whole_and_the_first_of_several(make_batches):
    aug = CaptionAugConfig(enable=True, keywords=("circle",), single_token=1.0)
    batches = make_batches("encoder_ft", model={"caption_aug": aug}, uncond_fraction=1.0)
    expected = batches.tokenizer("a red circle moves to the right")
    for quantile in range(2):
        batch = MicroBatch((Visit(0, quantile),), BUCKET, 0)
        wire = TextWire(*batches.prepare(batch, 1.0, **BOTH).inputs)
        assert wire.text[0].tolist() == list(expected)
