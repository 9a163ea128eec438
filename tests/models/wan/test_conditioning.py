"""What the DiT sees of a first frame, against what diffusers' own image-to-video pipeline gives its transformer.

The pipeline runs as a person runs it, from a picture to the transformer's inputs, which a stand-in for the transformer
keeps. Ours come the way of training: a clip decoded, encoded into a cache, read back and noised by `WanBatches`.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from torch import Tensor

from models.wan.arch import VARIANTS
from models.wan.batches import WanBatches
from models.wan.caching import WanCache, WeightHashes
from models.wan.checkpoint import find_checkpoint
from models.wan.media import media_rules
from models.wan.stages import TextWire
from tests.helpers.diffusers_wan import VAE_CONFIGS, published_vae_names
from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.data.cache import CacheStore
from utils.data.manifest import build_manifest
from utils.data.media import load_frames
from utils.data.memo import HashMemo
from utils.data.sampler import MicroBatch, Visit
from utils.distributed import Processes
from utils.rng import generator

KEYS = Path(__file__).resolve().parents[2] / "assets" / "keys"
ALONE = Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
WIDTH, HEIGHT, FRAMES = 96, 64, 9
STEPS, SHIFT = 3, 5.0
# Measured: at most 2.4e-7, in latents of the first frame; noise, masks and timesteps are equal.
TOLERANCE = 5e-6


class KeepsItsInputs(WanTransformer3DModel):
    """A transformer that keeps what the pipeline gives it, and answers with something that moves the latents."""

    def forward(self, hidden_states, timestep, **_):
        self.seen.append((hidden_states.clone(), timestep.clone()))
        return (hidden_states[:, : self.config.out_channels] * 0.3 - 0.1,)


class AtLevel(WanBatches):
    """Visits whose noise level is given, instead of drawn."""

    level = 1.0

    def _noise_of(self, sample_id: int, visit: int, *_):
        return generator(0, "noise", sample_id, visit), self.level


class Case(NamedTuple):
    """A sample in its cache, its first frame as a picture, and diffusers' pipeline around the same VAE."""

    batches: AtLevel
    picture: Image.Image
    pipeline: WanImageToVideoPipeline
    latents_CFHW: Tensor


@pytest.fixture(scope="module", params=["ti2v-5b", "i2v-a14b"])
def variant(request):
    return VARIANTS[request.param]


@pytest.fixture(scope="module")
def case(variant, request, tiny_dataset, make_config, tmp_path_factory) -> Case:
    root = tmp_path_factory.mktemp("conditioning")
    folder = root / "media"
    folder.mkdir()
    shutil.copy(tiny_dataset / "video_00.mp4", folder)
    (folder / "video_00.txt").write_text("a red circle moves to the right")
    dataset = DatasetConfig(
        size_buckets=((WIDTH, HEIGHT, FRAMES),), directory=(DirectoryConfig(path=str(folder)),)
    )
    is_5b = variant.model_type == "ti2v"
    checkpoint = request.getfixturevalue("tiny_ti2v" if is_5b else "tiny_i2v")
    own = {"first_frame_prob": 1.0} if is_5b else {"expert": "high_noise"}
    config = make_config("encoder_ft", model={"ckpt_path": str(checkpoint), **own})
    paths = find_checkpoint(config.model)
    manifest = build_manifest(dataset, media_rules(variant), HashMemo())
    cache = WanCache(
        manifest, CacheStore(root / "cache"), WeightHashes("vae", "t5", "t"), config.model, variant
    )
    cache.fill_latents(paths, ALONE, False, lambda done, total: None)
    frames_FHWC = load_frames(manifest.samples[0], media_rules(variant))
    assert frames_FHWC.shape == (FRAMES, HEIGHT, WIDTH, 3)
    return Case(
        AtLevel(config, variant, manifest.samples, cache, paths.tokenizer_dir),
        Image.fromarray(frames_FHWC[0]),
        build_pipeline(variant, paths.vae),
        cache.read_latents(0)["latents"],
    )


def build_pipeline(variant, vae_path: Path) -> WanImageToVideoPipeline:
    """diffusers' modules alone, the VAE's names by the published list."""
    kind = variant.vae_kind
    names = published_vae_names(kind)
    state = torch.load(vae_path, weights_only=True)
    vae = AutoencoderKLWan(**VAE_CONFIGS[kind])
    vae.load_state_dict({names[name]: tensor for name, tensor in state.items()}, strict=True)
    transformer = KeepsItsInputs(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=variant.in_dim,
        out_channels=variant.out_dim,
        text_dim=8,
        ffn_dim=8,
        num_layers=1,
    )
    transformer.seen = []
    pipeline = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        transformer=transformer,
        expand_timesteps=variant.model_type == "ti2v",
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def theirs(case) -> list[tuple[Tensor, Tensor]]:
    """What the transformer got in each step: input [1, C, F, H, W] and timestep, [1] or one per token."""
    noise = torch.randn(case.latents_CFHW.shape, generator=case.batches._noise_of(case_id(case), 0)[0])
    with torch.no_grad():
        case.pipeline(
            image=case.picture,
            prompt_embeds=torch.zeros(1, 4, 8),
            height=HEIGHT,
            width=WIDTH,
            num_frames=FRAMES,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            latents=noise.unsqueeze(0),
            output_type="latent",
        )
    seen = case.pipeline.transformer.seen
    assert len(seen) == STEPS
    return seen


def case_id(case: Case) -> int:
    return case.batches._samples[0].sample_id


def ours(case: Case, level: float):
    """Wire and labels of a training visit at this noise level."""
    case.batches.level = level
    batch = MicroBatch((Visit(0, 0),), case.batches._samples[0].bucket, 0)
    prepared = case.batches.prepare(batch, 1.0, need_inputs=True, need_labels=True)
    return TextWire(*prepared.inputs), prepared.labels


def per_token(timesteps_BT: Tensor, latents_BCFHW: Tensor) -> Tensor:
    """One timestep per token, as diffusers' transformer takes it: tokens are 2 x 2 latent positions, frame by frame."""
    _, _, frames, height, width = latents_BCFHW.shape
    return timesteps_BT.expand(-1, frames).repeat_interleave(height // 2 * (width // 2), dim=1)


def test_pure_noise_and_the_condition_are_the_whole_input(case, theirs, variant):
    """The first step of sampling, noise level 1, is a training visit of that level: all channels and frames alike."""
    inputs_BCFHW, timestep = theirs[0]
    wire, _ = ours(case, 1.0)
    assert (
        wire.latents_BCFHW.shape == inputs_BCFHW.shape == (1, variant.in_dim, 3, *case.latents_CFHW.shape[2:])
    )
    error = (wire.latents_BCFHW - inputs_BCFHW).abs().max().item()
    print(f"{variant.name}: largest error {error:.1e}")
    assert error <= TOLERANCE
    channels = variant.out_dim
    later = slice(1, None) if variant.model_type == "ti2v" else slice(None)
    assert torch.equal(wire.latents_BCFHW[:, :channels, later], inputs_BCFHW[:, :channels, later])
    told = (
        per_token(wire.timesteps_BT, wire.latents_BCFHW)
        if variant.model_type == "ti2v"
        else wire.timesteps_BT[:, 0]
    )
    assert torch.equal(told, timestep)


def test_the_condition_is_the_same_at_every_noise_level(case, theirs, variant):
    """In later steps the noisy part is the sampler's own; what the condition says of it, and the timesteps, are not."""
    for inputs_BCFHW, timestep in theirs:
        level = timestep.max().item() / 1000
        wire, labels = ours(case, level)
        if variant.model_type == "ti2v":
            theirs_BCHW, ours_BCHW = inputs_BCFHW[:, :, 0], wire.latents_BCFHW[:, :, 0]
            torch.testing.assert_close(per_token(wire.timesteps_BT, wire.latents_BCFHW), timestep)
            assert (timestep == 0).float().mean().item() == pytest.approx(1 / 3)  # the first of three frames
            # Put back in each step, the first frame has no velocity to learn.
            assert labels[4][0, :, 0, 0].tolist() == [0.0, 1.0, 1.0]
        else:
            theirs_BCHW, ours_BCHW = inputs_BCFHW[:, 16:], wire.latents_BCFHW[:, 16:]
            torch.testing.assert_close(wire.timesteps_BT[:, 0], timestep)
            assert (
                theirs_BCHW.shape[1] == 20
                and theirs_BCHW[:, :4, 0].all()
                and not theirs_BCHW[:, :4, 1:].any()
            )
            assert torch.equal(theirs_BCHW[:, :4], ours_BCHW[:, :4])
            assert len(labels) == 4  # every frame counts
        torch.testing.assert_close(ours_BCHW, theirs_BCHW, rtol=0, atol=TOLERANCE)
        assert theirs_BCHW.abs().max() > 0.5
    assert len({timestep.max().item() for _, timestep in theirs}) == STEPS


def test_a_picture_alone_has_the_latents_of_the_first_frame_of_its_clip(case, variant):
    """The VAE is causal: what makes the first frame of a clip's own latents the condition, whatever comes behind it."""
    picture = case.pipeline.video_processor.preprocess(case.picture, HEIGHT, WIDTH)
    channels = variant.out_dim
    with torch.no_grad():
        _, condition_BCFHW, *mask = case.pipeline.prepare_latents(
            picture, 1, channels, HEIGHT, WIDTH, FRAMES, torch.float32, torch.device("cpu")
        )
    if variant.model_type == "ti2v":
        assert condition_BCFHW.shape[2] == 1 and mask[0][0, 0, :, 0, 0].tolist() == [0.0, 1.0, 1.0]
    first_CHW = condition_BCFHW[0, -channels:, 0]
    torch.testing.assert_close(case.latents_CFHW[:, 0], first_CHW, rtol=0, atol=TOLERANCE)
    assert (case.latents_CFHW[:, 1] - first_CHW).abs().max() > 0.1
