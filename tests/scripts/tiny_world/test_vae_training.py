from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.wan.component_shapes import expected_vae_shapes
from models.wan.vae import load_vae
from scripts.tiny_world import vae_training
from scripts.tiny_world.vae_training import (
    SIZES,
    decode_clips,
    encode_clips,
    finished,
    measure_latents,
    new_vae,
    official_state,
    to_video,
    train_clips,
    train_decoder,
)
from scripts.tiny_world.world import draw_scene, render_clip


@pytest.fixture(scope="module")
def video():
    import random

    generator = random.Random(0)
    return to_video(np.stack([render_clip(draw_scene(generator)) for _ in range(2)]))


def awake(seed: int = 0):
    """A VAE in which the older taps count too."""
    vae = new_vae(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return vae


def short(name: str, monkeypatch) -> None:
    monkeypatch.setattr(vae_training, name, replace(getattr(vae_training, name), num_steps=2))


def test_coding_with_gradients_is_what_the_library_does(video):
    vae = awake()
    with torch.no_grad():
        for clip in (video, video[:, :, :1]):
            posterior = vae.encode(clip).latent_dist
            mean, logvar = encode_clips(vae, clip).chunk(2, dim=1)
            assert torch.allclose(mean, posterior.mean, atol=1e-5)
            assert torch.allclose(logvar.clamp(-30, 20), posterior.logvar, atol=1e-5)
            decoded = decode_clips(vae, mean)
            assert torch.allclose(decoded.clamp(-1, 1), vae.decode(mean).sample, atol=1e-5)
    assert encode_clips(vae, video).requires_grad


def test_pictures_in_two_dimensions_are_those_of_the_stock_convolutions(video):
    vae = awake()
    fast = encode_clips(vae, video[:, :, :1])
    for module in vae.modules():
        module.__dict__.pop("forward", None)
    stock = encode_clips(vae, video[:, :, :1])
    assert torch.allclose(fast, stock, atol=1e-5)
    assert fast.std() > 0.1


def test_the_published_statistics_hold_and_nothing_else_changes(tmp_path, video):
    vae = awake()
    save_file(finished(vae, 0), tmp_path / "vae.safetensors")
    loaded = load_vae(tmp_path / "vae.safetensors", torch.float32, torch.device("cpu"))
    mean_C, std_C = measure_latents(vae, 0)
    shape = (1, -1, 1, 1, 1)
    with torch.no_grad():
        own = vae.encode(video).latent_dist.mode()
        decoded = vae.decode(own).sample
    expected = (own - mean_C.view(shape)) / std_C.view(shape)
    assert torch.allclose(loaded.encode(video), expected, atol=1e-3)
    assert torch.allclose(loaded.decode(loaded.encode(video)), decoded, atol=1e-4)


def test_names_and_shapes_are_the_official_ones():
    found = {name: tuple(value.shape) for name, value in official_state(new_vae(0)).items()}
    assert found == expected_vae_shapes(SIZES)


def test_the_decoder_and_clips_leave_a_pictures_latents_alone(tmp_path, monkeypatch, video):
    for name in ("DECODER", "CLIPS"):
        short(name, monkeypatch)
    vae = new_vae(0)
    with torch.no_grad():
        before = vae.encode(video[:, :, :1]).latent_dist.mode()
        drawn, clip = vae.decode(before).sample, vae.encode(video).latent_dist.mode()
    train_decoder(vae, 0, tmp_path, lambda _: None)
    with torch.no_grad():
        assert torch.equal(vae.encode(video).latent_dist.mode(), clip)
        sharpened = vae.decode(before).sample
        assert not torch.allclose(sharpened, drawn, atol=1e-3)
    train_clips(vae, 0, tmp_path, lambda _: None)
    with torch.no_grad():
        assert torch.allclose(vae.encode(video[:, :, :1]).latent_dist.mode(), before, atol=1e-5)
        assert torch.allclose(vae.decode(before).sample, sharpened, atol=1e-5)
        assert not torch.allclose(vae.encode(video).latent_dist.mode(), clip, atol=1e-4)
