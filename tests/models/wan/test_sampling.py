"""Sampling against diffusers' own pipelines: the same weights, noise, text and scheduler give the same latents."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image
from torch.nn import functional as F

from models.wan.arch import VARIANTS, load_arch
from models.wan.caching import first_frame_condition
from models.wan.checkpoint import VAE_FILES, open_sharded
from models.wan.sampling import ModuleDenoiser, Trajectory, draw_noise, sample_latents
from models.wan.sampling_settings import official_settings
from models.wan.schedulers import build_scheduler, build_solver
from models.wan.transformer import WanTransformer
from models.wan.vae import load_vae
from tests.helpers.diffusers_wan import build_transformer, exact_timesteps
from utils.data.media import scale_frames

STEPS = 6
# Relative L2 error of the final latents after 6 guided steps. Measured: 0 (bit-equal) for T2V, 1.0e-6 for I2V (diffusers
# multiplies by 1 / std), 1.1e-6 to 1.3e-6 for TI2V (diffusers has a timestep per token).
PARITY = 1e-5
# With diffusers' own float32 sinusoid of the timestep. Measured: 3.8e-6.
PARITY_FLOAT32_SINUSOID = 1e-4


def load_both(folder):
    """A DiT of a checkpoint as ours and as diffusers'."""
    source = open_sharded(folder)
    arch = load_arch(folder / "config.json", source.shapes)
    state = {name: source.get(name).float().clone() for name in source.shapes}
    with torch.device("meta"):
        ours = WanTransformer(arch)
    ours.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, strict=True, assign=True)
    return ours.requires_grad_(False), build_transformer(arch, state), arch


@pytest.fixture
def exact_sinusoid(monkeypatch):
    """Timesteps in float64 on diffusers' side, so that sampling is compared and not the timestep's rounding."""
    monkeypatch.setattr("diffusers.models.embeddings.Timesteps.forward", exact_timesteps)


class Case:
    """A checkpoint as both programs have it, with text states, settings and the scheduler of both."""

    def __init__(self, root, variant, solver, num_frames=5):
        folders = (
            [root / "high_noise_model", root / "low_noise_model"] if VARIANTS[variant].boundary else [root]
        )
        loaded = [load_both(folder) for folder in folders]
        self.ours = [one[0] for one in loaded]
        self.theirs = [one[1] for one in loaded]
        official = official_settings(VARIANTS[variant])
        multiple = official.variant.pixel_multiple
        self.settings = replace(
            official,
            width=3 * multiple,
            height=2 * multiple,
            num_frames=num_frames,
            steps=STEPS,
            solver=solver,
        )
        width = loaded[0][2].text_dim
        generator = torch.Generator().manual_seed(8)
        self.texts = [torch.randn(length, width, generator=generator) for length in (4, 9)]
        self.negative = torch.randn(6, width, generator=generator)
        self.root = root

    def pipeline(self, kind, **extra):
        second = self.theirs[1] if len(self.theirs) == 2 else None
        settings = self.settings
        scheduler = build_scheduler(settings.solver, settings.steps, settings.shift)
        scheduler.set_timesteps = lambda *args, **kwargs: None  # the official grid stays
        pipeline = kind(
            tokenizer=None,
            text_encoder=None,
            scheduler=scheduler,
            transformer=self.theirs[0],
            transformer_2=second,
            boundary_ratio=settings.variant.boundary,
            expand_timesteps=settings.variant.model_type == "ti2v",
            **extra,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def diffusers_latents(self, pipeline, **extra):
        def padded(states):
            return torch.stack([F.pad(one, (0, 0, 0, 512 - len(one))) for one in states])

        settings = self.settings
        return pipeline(
            prompt_embeds=padded(self.texts),
            negative_prompt_embeds=padded([self.negative] * 2),
            height=settings.height,
            width=settings.width,
            num_frames=settings.num_frames,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            guidance_scale_2=settings.guidance_low_noise,
            latents=draw_noise([1, 2], settings),
            output_type="latent",
            return_dict=False,
            **extra,
        )[0]

    def our_latents(self, condition=None):
        trajectory = Trajectory(self.texts, [1, 2], self.settings, self.negative, condition)
        if len(self.ours) == 1:
            trajectory.advance(ModuleDenoiser(self.ours[0]))
        else:
            trajectory.advance(ModuleDenoiser(self.ours[0]), expert="high_noise")
            assert 0 < trajectory.steps_left < STEPS  # both experts work
            trajectory.advance(ModuleDenoiser(self.ours[1]), expert="low_noise")
        return trajectory.result()


PARITY_CASES = [
    ("tiny_ti2v", "ti2v-5b", "unipc", 5),
    ("tiny_ti2v", "ti2v-5b", "euler", 1),
    ("tiny_t2v", "t2v-a14b", "unipc", 5),
    ("tiny_t2v", "t2v-a14b", "dpm++", 1),
]


@pytest.mark.parametrize(("fixture", "variant", "solver", "num_frames"), PARITY_CASES)
def test_diffusers_text_pipeline_gives_the_same_latents(
    fixture, variant, solver, num_frames, request, exact_sinusoid, relative_error
):
    case = Case(request.getfixturevalue(fixture), variant, solver, num_frames)
    theirs = case.diffusers_latents(case.pipeline(WanPipeline, vae=None))
    ours = case.our_latents()
    error = relative_error(theirs, ours)
    print(f"{variant} {solver} {num_frames}: {error:.2e}")
    assert error <= PARITY
    assert relative_error(draw_noise([1, 2], case.settings), ours) > 0.1


def test_and_with_its_own_sinusoid_nearly_the_same(tiny_ti2v, relative_error):
    case = Case(tiny_ti2v, "ti2v-5b", "unipc")
    error = relative_error(case.diffusers_latents(case.pipeline(WanPipeline, vae=None)), case.our_latents())
    print(f"float32 sinusoid: {error:.2e}")
    assert error <= PARITY_FLOAT32_SINUSOID


@pytest.mark.parametrize(("fixture", "variant"), [("tiny_i2v", "i2v-a14b"), ("tiny_ti2v", "ti2v-5b")])
def test_diffusers_image_pipeline_gives_the_same_latents(
    fixture, variant, request, exact_sinusoid, relative_error
):
    case = Case(request.getfixturevalue(fixture), variant, "unipc")
    settings = case.settings
    vae = load_vae(case.root / VAE_FILES[settings.variant.vae_kind], torch.float32, torch.device("cpu"))
    pixels = np.random.default_rng(0).integers(0, 256, (settings.height, settings.width, 3), dtype=np.uint8)
    frame = scale_frames(pixels[None])
    pipeline = case.pipeline(WanImageToVideoPipeline, vae=vae._module)
    theirs = case.diffusers_latents(pipeline, image=Image.fromarray(pixels), image_embeds=None)
    if variant == "i2v-a14b":
        video = F.pad(frame, (0, 0, 0, 0, 0, settings.num_frames - 1))
        condition = first_frame_condition(video[None], vae)
    else:
        condition = vae.encode(frame[None])
    ours = case.our_latents(condition)
    error = relative_error(theirs, ours)
    print(f"{variant} image: {error:.2e}")
    assert error <= PARITY
    if variant == "ti2v-5b":
        torch.testing.assert_close(ours[0, :, :1], condition[0], rtol=0, atol=0)


def test_the_official_grid_of_noise_levels():
    # The official FlowUniPC with 40 steps: 26 of T2V's (shift 12) and 15 of I2V's (shift 5) are the high-noise expert's.
    for variant, high in (("t2v-a14b", 26), ("i2v-a14b", 15)):
        settings = official_settings(VARIANTS[variant])
        for solver in ("unipc", "euler", "dpm++"):
            timesteps = build_solver(solver, settings.steps, settings.shift).timesteps
            assert [settings.expert_at(t) for t in timesteps].count("high_noise") == high
    sigmas = build_solver("unipc", 3, 5.0).sigmas
    expected = [5 * s / (1 + 4 * s) for s in (0.999, 0.666, 0.333)] + [0.0]
    np.testing.assert_allclose(sigmas, expected, rtol=0, atol=1e-6)


class Straight:
    """A model that knows the answer: the velocity that leads to `target` from wherever the latents are."""

    def __init__(self, settings, target, seeds):
        self.velocity = draw_noise(seeds, settings) - target
        self.calls = []

    def velocities(self, latents, timesteps_BT, texts):
        self.calls.append((tuple(timesteps_BT.shape), [tuple(text.shape) for text in texts]))
        return [self.velocity.clone() for _ in texts]

    def keeping(self, texts):
        return nullcontext()


@pytest.mark.parametrize("solver", ["unipc", "euler", "dpm++"])
def test_a_straight_path_is_followed_to_its_end(solver):
    settings = replace(
        official_settings(VARIANTS["ti2v-5b"]), width=64, height=32, num_frames=5, steps=5, solver=solver
    )
    target = torch.randn(2, *settings.latent_shape, generator=torch.Generator().manual_seed(5))
    model = Straight(settings, target, [4, 5])
    steps = []
    texts = [torch.zeros(3, 8), torch.zeros(7, 8)]
    result = sample_latents(
        model, texts, [4, 5], settings, negative_states=torch.zeros(2, 8), on_step=lambda: steps.append(1)
    )
    # The grid begins at 0.9998 instead of 1, and the noise stands for both.
    torch.testing.assert_close(result, target, rtol=0, atol=2e-3)
    assert len(steps) == 5
    assert model.calls == [((2, 1), [(2, 7, 8), (2, 2, 8)])] * 5


def test_a_seed_means_the_same_in_every_batch(tiny_ti2v):
    case = Case(tiny_ti2v, "ti2v-5b", "unipc")
    both = sample_latents(case.ours[0], case.texts, [1, 2], case.settings, negative_states=case.negative)
    alone = sample_latents(case.ours[0], case.texts[1:], [2], case.settings, negative_states=case.negative)
    # Measured: 2.5e-5; products of other sizes round otherwise, and the steps add it up.
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4)
    again = sample_latents(case.ours[0], case.texts, [1, 2], case.settings, negative_states=case.negative)
    assert torch.equal(both, again)
    expected = torch.randn(case.settings.latent_shape, generator=torch.Generator("cpu").manual_seed(2))
    assert torch.equal(draw_noise([1, 2], case.settings)[1], expected)


def test_guidance_of_1_makes_one_pass():
    settings = replace(
        official_settings(VARIANTS["ti2v-5b"]), width=32, height=32, num_frames=1, steps=2, guidance=1.0
    )
    model = Straight(settings, torch.zeros(1, *settings.latent_shape), [0])
    sample_latents(model, [torch.zeros(3, 8)], [0], settings)
    assert model.calls == [((1, 1), [(1, 3, 8)])] * 2


def test_each_expert_has_its_own_guidance():
    settings = official_settings(VARIANTS["t2v-a14b"])
    assert [settings.guidance_at(t) for t in (1000.0, 875.0, 874.9)] == [4.0, 4.0, 3.0]


def test_misuse_is_refused():
    settings = replace(official_settings(VARIANTS["i2v-a14b"]), width=32, height=32, num_frames=5)
    text = torch.zeros(3, 8)
    with pytest.raises(ValueError, match="1 texts, but 2 seeds"):
        Trajectory([text], [0, 1], settings, text)
    with pytest.raises(ValueError, match="needs negative_states"):
        Trajectory([text], [0], settings)
    with pytest.raises(ValueError, match="a condition is missing"):
        Trajectory([text], [0], settings, text)
