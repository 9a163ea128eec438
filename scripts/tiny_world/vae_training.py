"""Training the tiny world's VAE: on pictures, then its decoder alone, then on clips without changing a picture's latents.

Wan's VAE codes a first frame as a picture: its convolutions see nothing before it, so only their last temporal tap
counts, and pictures train as two-dimensional convolutions. Then the older taps, zero until then, and the convolutions
that halve and double the frame rate are trained alone on clips; pictures never use them.
"""

import random
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.wan.component_shapes import VaeSizes, expected_vae_shapes
from models.wan.names import vae_to_diffusers
from models.wan.vae import LATENT_STATS, build_vae
from scripts.tiny_world.loop import Draws, Schedule, train
from scripts.tiny_world.world import (
    RADIUS,
    SHAPES,
    SIZE,
    Pixels,
    coverage,
    draw_centred,
    draw_scene,
    render,
    render_clip,
)
from utils.rng import generator

SIZES = VaeSizes("2.1", base_dim=8, decoder_base_dim=8)
PICTURES = Schedule(num_steps=1000, lr=2e-3, betas=(0.9, 0.95))
DECODER = Schedule(num_steps=2000, lr=2e-3, betas=(0.9, 0.95))
CLIPS = Schedule(num_steps=200, lr=2e-3, betas=(0.9, 0.95))
PICTURE_BATCH = 32
DECODER_BATCH = 16
# Of the latents' deviation, at most and mostly less: what the DiT makes is not exact.
DECODER_NOISE = 0.5
CLIP_BATCH = 8
CROP = 32
KL_WEIGHT = 2e-3
KL_RAMP = 200
# What a residual branch's end begins with, so that a deep sum starts near its shortcut.
BRANCH_START = 0.3
_FRAME_STRIDE = 4
_LOGVAR = (-30.0, 20.0)


def new_vae(seed: int) -> Any:
    """The VAE to be trained: each output of a convolution starts with the spread of its input, older taps at zero."""
    vae = build_vae(SIZES)
    for name, parameter in vae.named_parameters():
        with torch.no_grad():
            if parameter.ndim < 4 or name.endswith("gamma"):
                parameter.fill_(1.0 if name.endswith("gamma") else 0.0)
                continue
            kernel = parameter[:, :, -1] if parameter.ndim == 5 else parameter
            start = torch.randn(kernel.shape, generator=generator(seed, "vae", name))
            start *= (kernel[0].numel() ** -0.5) * (
                BRANCH_START if name.endswith(("conv2.weight", "proj.weight")) else 1.0
            )
            parameter.zero_()
            kernel.copy_(start)
            if "time_conv" in name:
                _start_time_conv(parameter)
    _speed_up_pictures(vae)
    return vae


def train_coder(seed: int, work: Path, say: Callable[[str], None]) -> Any:
    """The first part: encoder and decoder on pictures. After it a picture's latents are final."""
    vae = new_vae(seed)
    train(
        "vae_pictures",
        _parameters(vae, lambda name: "time_conv" not in name),
        PICTURES,
        lambda step, draws: _picture_loss(vae, step, draws),
        seed,
        work,
        say,
    )
    return vae


def train_decoder(vae: Any, seed: int, work: Path, say: Callable[[str], None]) -> None:
    """The second part: the decoder alone, on the posterior's mean, which is what the DiT learns to make."""
    of_pictures = _parameters(
        vae, lambda name: name.startswith(("decoder.", "post_quant_conv.")) and "time_conv" not in name
    )
    std_C = measure_latents(vae, seed)[1]
    with trained_alone(vae, of_pictures):
        train(
            "vae_decoder",
            of_pictures,
            DECODER,
            lambda _, draws: _decoder_loss(vae, std_C, draws),
            seed,
            work,
            say,
        )


def train_clips(vae: Any, seed: int, work: Path, say: Callable[[str], None]) -> None:
    """The third part: what clips alone use."""
    of_clips = _parameters(vae, lambda name: "time_conv" in name)
    convolutions = {
        name: value
        for name, value in vae.named_parameters()
        if value.ndim == 5 and value.shape[2] > 1 and name not in of_clips
    }
    hooks = [value.register_hook(_without_last_tap) for value in convolutions.values()]
    with trained_alone(vae, of_clips | convolutions):
        train(
            "vae_clips",
            of_clips | convolutions,
            CLIPS,
            lambda _, draws: _clip_loss(vae, draws),
            seed,
            work,
            say,
        )
    for hook in hooks:
        hook.remove()


def finished(vae: Any, seed: int) -> dict[str, Tensor]:
    """float32 weights under official names, with latents of the published statistics."""
    return with_published_statistics(official_state(vae), *measure_latents(vae, seed))


@contextmanager
def trained_alone(vae: Any, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Only these parameters get gradients inside; all of them do behind."""
    for value in vae.parameters():
        value.requires_grad_(False)
    for value in parameters.values():
        value.requires_grad_(True)
    yield
    for value in vae.parameters():
        value.requires_grad_(True)


def _parameters(vae: Any, wanted: Callable[[str], bool]) -> dict[str, nn.Parameter]:
    return {name: value for name, value in vae.named_parameters() if wanted(name)}


def official_state(vae: Any) -> dict[str, Tensor]:
    """The weights under official names, in the published order."""
    names = vae_to_diffusers(expected_vae_shapes(SIZES), SIZES.kind)
    state = vae.state_dict()
    return {official: state[renamed].detach().clone() for official, renamed in names.items()}


def with_published_statistics(state: dict[str, Tensor], mean_C: Tensor, std_C: Tensor) -> dict[str, Tensor]:
    """The same VAE with latents that have the published mean and deviation in each channel.

    The affine map of each channel goes into the 1x1x1 convolutions behind the encoder and before the decoder, so that
    pictures are coded and decoded exactly as before, and the constants in `models/wan/vae.py` hold.
    """
    stats = LATENT_STATS[SIZES.kind]
    wanted_mean, wanted_std = torch.tensor(stats.mean), torch.tensor(stats.std)
    scale_C = wanted_std / std_C
    shift_C = wanted_mean - mean_C * scale_C
    channels = SIZES.latent_channels
    state = dict(state)
    weight, bias = state["conv1.weight"].clone(), state["conv1.bias"].clone()
    weight[:channels] *= scale_C.view(-1, 1, 1, 1, 1)
    bias[:channels] = bias[:channels] * scale_C + shift_C
    bias[channels:] += 2 * scale_C.log()
    state["conv1.weight"], state["conv1.bias"] = weight, bias
    weight = state["conv2.weight"] / scale_C.view(1, -1, 1, 1, 1)
    state["conv2.bias"] = state["conv2.bias"] - (weight[:, :, 0, 0, 0] @ shift_C)
    state["conv2.weight"] = weight
    return state


@torch.no_grad()
def measure_latents(vae: Any, seed: int, count: int = 512) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of the posterior's mean, over the world's pictures."""
    scenes = random.Random(f"{seed}/latents")
    latents = []
    for _ in range(count // 32):
        pictures = np.stack([render(draw_scene(scenes, motion="still"))[None] for _ in range(32)])
        latents.append(encode_clips(vae, to_video(pictures)).chunk(2, dim=1)[0])
    latents_BCFHW = torch.cat(latents)
    return latents_BCFHW.mean(dim=(0, 2, 3, 4)), latents_BCFHW.std(dim=(0, 2, 3, 4))


def to_video(pixels_BFHWC: Pixels) -> Tensor:
    """uint8 frames to float32 [B, 3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels_BFHWC).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def encode_clips(vae: Any, video_BCFHW: Tensor) -> Tensor:
    """Posterior means and log variances [B, 2C, F', H', W'], as the library's `encode` but with gradients wherever asked."""
    vae.clear_cache()
    parts = []
    for start in range(0, video_BCFHW.shape[2], _FRAME_STRIDE):
        part = video_BCFHW[:, :, max(start - _FRAME_STRIDE + 1, 0) : start + 1]
        parts.append(vae.encoder(part, feat_cache=vae._enc_feat_map, feat_idx=[0]))
    vae.clear_cache()
    return vae.quant_conv(torch.cat(parts, dim=2))


def decode_clips(vae: Any, latents_BCFHW: Tensor) -> Tensor:
    """The library's `decode` without its clamp, through which a decoder that leaves [-1, 1] would learn nothing."""
    vae.clear_cache()
    states = vae.post_quant_conv(latents_BCFHW)
    parts = [
        vae.decoder(states[:, :, frame : frame + 1], vae._feat_map, [0], first_chunk=frame == 0)
        for frame in range(states.shape[2])
    ]
    vae.clear_cache()
    return torch.cat(parts, dim=2)


def _picture_loss(vae: Any, step: int, draws: Draws) -> Tensor:
    pictures = np.stack([_training_picture(draws.scenes, index) for index in range(PICTURE_BATCH)])
    video = to_video(pictures[:, None])
    # Without caches nothing of time is touched: what the library does with a first frame.
    mean, logvar = vae.quant_conv(vae.encoder(video)).chunk(2, dim=1)
    latents, kl = _sample(mean, logvar, draws.noise)
    decoded = vae.decoder(vae.post_quant_conv(latents), first_chunk=True)
    return _distance(decoded, video) + KL_WEIGHT * min(1.0, step / KL_RAMP) * kl


def _decoder_loss(vae: Any, std_C: Tensor, draws: Draws) -> Tensor:
    # Every second one is such as the DiT draws.
    drawn = [
        draw_scene(draws.scenes, motion="still") if index % 2 else draw_centred(draws.scenes)
        for index in range(DECODER_BATCH)
    ]
    pictures = np.stack([render(scene) for scene in drawn])
    video = to_video(pictures[:, None])
    with torch.no_grad():
        latents = vae.quant_conv(vae.encoder(video)).chunk(2, dim=1)[0]
        noise = torch.randn(latents.shape, generator=draws.noise) * std_C.view(1, -1, 1, 1, 1)
        level_B = DECODER_NOISE * torch.rand(DECODER_BATCH, generator=draws.noise).square()
        latents = latents + level_B.view(-1, 1, 1, 1, 1) * noise
    decoded = vae.decoder(vae.post_quant_conv(latents), first_chunk=True)
    return _distance(decoded, video)


def _clip_loss(vae: Any, draws: Draws) -> Tensor:
    clips = np.stack([render_clip(draw_scene(draws.scenes)) for _ in range(CLIP_BATCH)])
    video = to_video(_crops(draws.scenes, clips))
    mean, logvar = encode_clips(vae, video).chunk(2, dim=1)
    latents, kl = _sample(mean, logvar, draws.noise)
    return _distance(decode_clips(vae, latents), video) + KL_WEIGHT * kl


def _sample(mean: Tensor, logvar: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """A draw from the posterior, and its KL divergence from a standard normal, per number."""
    logvar = logvar.clamp(*_LOGVAR)
    drawn = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=noise)
    return drawn, 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def _distance(decoded: Tensor, video: Tensor) -> Tensor:
    return F.mse_loss(decoded, video) + 0.3 * F.l1_loss(decoded, video)


def _training_picture(scenes: random.Random, index: int) -> Pixels:
    """A crop of the world, or (every second one) shapes of any colours on a ground of any colour."""
    if index % 2:
        return _crops(scenes, render(draw_scene(scenes, motion="still"))[None, None])[0, 0]
    picture = np.empty((CROP, CROP, 3), dtype=np.float32)
    picture[:] = [scenes.uniform(0, 255) for _ in range(3)]
    for _ in range(scenes.randint(1, 2)):
        radius = scenes.uniform(*RADIUS) * SIZE
        x, y = scenes.uniform(0, CROP), scenes.uniform(0, CROP)
        alpha = coverage(scenes.choice(SHAPES), x, y, radius, CROP)[:, :, None]
        colour = np.array([scenes.uniform(0, 255) for _ in range(3)], dtype=np.float32)
        picture = alpha * colour + (1 - alpha) * picture
    return np.rint(picture).astype(np.uint8)


def _crops(scenes: random.Random, clips_BFHWC: Pixels) -> Pixels:
    """A random square of each clip."""
    corners = [(scenes.randint(0, SIZE - CROP), scenes.randint(0, SIZE - CROP)) for _ in clips_BFHWC]
    return np.stack(
        [
            clip[:, top : top + CROP, left : left + CROP]
            for clip, (top, left) in zip(clips_BFHWC, corners, strict=True)
        ]
    )


def _without_last_tap(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[:, :, -1] = 0
    return gradient


def _start_time_conv(weight: Tensor) -> None:
    """Halving the frame rate begins as a mean of three frames, doubling it as a copy."""
    weight.zero_()
    outputs, inputs = weight.shape[:2]
    same = torch.eye(inputs)
    if outputs == inputs:
        weight[:, :, :, 0, 0] = same[:, :, None] / weight.shape[2]
    else:
        weight[:, :, -1, 0, 0] = torch.cat((same, same))


def _speed_up_pictures(vae: Any) -> None:
    """Let each causal convolution run a single first frame in two dimensions, with its last temporal tap alone."""

    def forward(module: Any, states: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if cache_x is None and states.shape[2] == 1 and module.stride[0] == 1 and module._padding[4] > 0:
            weight = module.weight[:, :, -1]
            padding = (module._padding[2], module._padding[0])
            return F.conv2d(states[:, :, 0], weight, module.bias, module.stride[1:], padding).unsqueeze(2)
        return type(module).forward(module, states, cache_x)

    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
