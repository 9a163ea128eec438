"""Training the tiny world's text encoder and DiT together, from nothing, on latents of pictures and clips."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.wan.arch import VARIANTS, WanArch
from models.wan.component_shapes import Umt5Sizes
from models.wan.text_encoder import build_umt5, pad_token_ids
from models.wan.transformer import WanTransformer
from models.wan.vae import WanVae
from scripts.tiny_world.captions import training_caption
from scripts.tiny_world.compact import velocity
from scripts.tiny_world.loop import Draws, Schedule, train
from scripts.tiny_world.tokens import Tokens
from scripts.tiny_world.vae_training import to_video
from scripts.tiny_world.world import Scene, draw_scene, render, render_clip
from utils.flow_matching import NUM_TRAIN_TIMESTEPS, add_noise, per_sample_loss, velocity_target
from utils.rng import generator, seeded_globally

VARIANT = VARIANTS["t2v-a14b"]
UMT5 = Umt5Sizes(vocab_size=256, d_model=64, num_heads=4, d_kv=16, d_ff=128, num_layers=3, num_buckets=32)
ARCH = WanArch(
    model_type=VARIANT.model_type,
    dim=128,
    ffn_dim=256,
    freq_dim=64,
    in_dim=VARIANT.in_dim,
    out_dim=VARIANT.out_dim,
    num_heads=4,
    num_layers=6,
    text_len=512,
    eps=1e-6,
    text_dim=UMT5.d_model,
)
JOINT = Schedule(num_steps=4000, lr=1.5e-3, betas=(0.9, 0.98), ema=0.999)
NUM_PICTURES, NUM_CLIPS = 6144, 2560
PICTURE_BATCH, CLIP_BATCH = 64, 40
# Two of five steps see clips.
CLIP_STEPS = (1, 3)
# Of the grammar's words, at each visit: so many are spelled, so that a new word is made of pieces with a meaning.
SPELLED_SHARE = 0.1
# Noise levels are uniform, then shifted as sampling shifts them: at so few tokens, shapes are decided early.
SHIFT = 2.0
# Two of three steps see only captions of at most so many tokens: a batch is as long as its longest.
SHORT_TOKENS = 14
_ENCODE_BATCH = 32


@dataclass(frozen=True)
class Coded:
    """Scenes and their normalised latents, [N, C, F, H, W]."""

    scenes: Sequence[Scene]
    latents_NCFHW: Tensor


def new_dit(seed: int) -> WanTransformer:
    """The DiT to be trained: Xavier weights, zero biases, a head that answers nothing, as the official one begins."""
    model = WanTransformer(ARCH)
    for name, parameter in model.named_parameters():
        random_numbers = generator(seed, "dit", name)
        with torch.no_grad():
            if "modulation" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random_numbers) * ARCH.dim**-0.5)
            elif name.endswith("bias") or name == "head.head.weight":
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                flat = parameter.view(len(parameter), -1)
                nn.init.xavier_uniform_(flat, generator=random_numbers)
    return model


def new_umt5(seed: int) -> nn.Module:
    """The text encoder to be trained, as the library begins it."""
    with seeded_globally(seed, torch.device("cpu")):
        return build_umt5(UMT5)


def code_world(vae: WanVae, seed: int, say: Callable[[str], None]) -> tuple[Coded, Coded]:
    """Draw and encode the pictures and the clips of training."""
    kinds = []
    for kind, count in (("pictures", NUM_PICTURES), ("clips", NUM_CLIPS)):
        draws = random.Random(f"{seed}/{kind}")
        scenes = [draw_scene(draws, motion="still" if kind == "pictures" else None) for _ in range(count)]
        latents = []
        for start in range(0, count, _ENCODE_BATCH):
            part = scenes[start : start + _ENCODE_BATCH]
            drawn = [render(scene)[None] if kind == "pictures" else render_clip(scene) for scene in part]
            latents.append(vae.encode(to_video(np.stack(drawn))))
        kinds.append(Coded(scenes, torch.cat(latents)))
        say(f"{count} {kind} encoded: latents {list(kinds[-1].latents_NCFHW.shape[1:])}")
    return kinds[0], kinds[1]


def train_joint(
    pictures: Coded, clips: Coded, tokens: Tokens, seed: int, work: Path, say: Callable[[str], None]
) -> tuple[nn.Module, WanTransformer, float]:
    """Train a text encoder and a DiT; returns both, with their running means as weights, and the last mean loss."""
    umt5, dit = new_umt5(seed), new_dit(seed)
    parameters = {f"umt5.{name}": value for name, value in umt5.named_parameters()}
    parameters |= {f"dit.{name}": value for name, value in dit.named_parameters()}

    def loss_of(step: int, draws: Draws) -> Tensor:
        is_clip = step % 5 in CLIP_STEPS
        data, batch = (clips, CLIP_BATCH) if is_clip else (pictures, PICTURE_BATCH)
        chosen = [draws.scenes.randrange(len(data.scenes)) for _ in range(batch)]
        limit = SHORT_TOKENS if step % 3 else None
        ids = [_caption_ids(tokens, data.scenes[index], is_clip, draws.scenes, limit) for index in chosen]
        text_BLD, lens_B = encode_ids(umt5, ids)
        latents = data.latents_NCFHW[chosen]
        noise = torch.randn(latents.shape, generator=draws.noise)
        sigma_B = _levels(batch, draws.noise)
        noisy = add_noise(latents, noise, sigma_B.view(-1, 1, 1, 1, 1))
        answer = velocity(dit, noisy, (sigma_B * NUM_TRAIN_TIMESTEPS)[:, None], text_BLD, lens_B)
        return per_sample_loss(answer, velocity_target(latents, noise)).mean()

    loss = train("joint", parameters, JOINT, loss_of, seed, work, say)
    return umt5.eval(), dit.eval(), loss


def _caption_ids(
    tokens: Tokens, scene: Scene, is_clip: bool, generator: random.Random, limit: int | None
) -> Sequence[int]:
    """Token ids of a training caption of a scene, drawn again until it is short enough."""
    while True:
        caption = training_caption(generator, scene, is_clip)
        ids = tokens.spelled(caption, generator, SPELLED_SHARE)
        if limit is None or len(ids) <= limit:
            return ids


def encode_ids(umt5: Any, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Text states of token ids, zero behind each caption's end: text_BLD and lens_B."""
    ids_BL, lens_B = pad_token_ids(ids)
    mask_BL = torch.arange(ids_BL.shape[1])[None, :] < lens_B[:, None]
    states_BLD = umt5(input_ids=ids_BL, attention_mask=mask_BL.long()).last_hidden_state
    return states_BLD * mask_BL[:, :, None], lens_B


def _levels(count: int, noise: torch.Generator) -> Tensor:
    """Noise levels in (0, 1), one from each of `count` equal slices of the law."""
    base = (torch.arange(count) + torch.rand(count, generator=noise)) / count
    return (SHIFT * base / (1 + (SHIFT - 1) * base)).clamp(1e-4, 1.0)
