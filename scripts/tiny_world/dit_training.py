"""Training the tiny world's text encoder and DiT together, from nothing, on latents of pictures."""

import random
from collections.abc import Callable, Mapping, Sequence
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
from scripts.tiny_world.world import Scene, draw_centred, render
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
JOINT = Schedule(num_steps=7000, lr=1.5e-3, betas=(0.9, 0.98), decay=0.6, ema=0.998)
NUM_PICTURES = 6144
BATCH = 64
# On query and key of the cross-attention. At 1, a caption of ten tokens drowns in the zero padding up to 512.
CROSS_ATTENTION_GAIN = 1.7
# Of the grammar's words, at each visit: so many are spelled, so that a new word is made of pieces with a meaning.
SPELLED_SHARE = 0.1
# Noise levels are uniform, then shifted as sampling shifts them: at so few tokens, shapes are decided early.
SHIFT = 2.0
# Two of three steps see only captions of at most so many tokens: a batch is as long as its longest.
SHORT_TOKENS = 14
_ENCODE_BATCH = 32


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
                parameter.fill_(CROSS_ATTENTION_GAIN if "cross_attn" in name else 1.0)
            else:
                flat = parameter.view(len(parameter), -1)
                nn.init.xavier_uniform_(flat, generator=random_numbers)
    return model


def new_umt5(seed: int) -> nn.Module:
    """The text encoder to be trained, as the library begins it."""
    with seeded_globally(seed, torch.device("cpu")):
        return build_umt5(UMT5)


def code_pictures(vae: WanVae, seed: int) -> tuple[list[Scene], Tensor]:
    """Draw and encode the pictures of training: scenes, and their normalised latents [N, C, 1, H, W]."""
    draws = random.Random(f"{seed}/pictures")
    scenes = [draw_centred(draws) for _ in range(NUM_PICTURES)]
    latents = []
    for start in range(0, NUM_PICTURES, _ENCODE_BATCH):
        drawn = [render(scene)[None] for scene in scenes[start : start + _ENCODE_BATCH]]
        latents.append(vae.encode(to_video(np.stack(drawn))))
    return scenes, torch.cat(latents)


def train_joint(
    vae: WanVae, tokens: Tokens, seed: int, work: Path, say: Callable[[str], None]
) -> tuple[nn.Module, WanTransformer, float]:
    """Train a text encoder and a DiT; returns both, with their running means as weights, and the last mean loss."""
    umt5, dit = new_umt5(seed), new_dit(seed)
    scenes, latents_NCFHW = code_pictures(vae, seed)
    say(f"{len(scenes)} pictures coded")
    parameters = {f"umt5.{name}": value for name, value in umt5.named_parameters()}
    parameters |= {f"dit.{name}": value for name, value in dit.named_parameters()}

    def loss_of(step: int, draws: Draws) -> Tensor:
        chosen = [draws.scenes.randrange(len(scenes)) for _ in range(BATCH)]
        limit = SHORT_TOKENS if step % 3 else None
        ids = [_caption_ids(tokens, scenes[index], draws.scenes, limit) for index in chosen]
        text_BLD, lens_B = encode_ids(umt5, ids)
        latents = latents_NCFHW[chosen]
        noise = torch.randn(latents.shape, generator=draws.noise)
        sigma_B = _levels(BATCH, draws.noise)
        noisy = add_noise(latents, noise, sigma_B.view(-1, 1, 1, 1, 1))
        answer = velocity(dit, noisy, (sigma_B * NUM_TRAIN_TIMESTEPS)[:, None], text_BLD, lens_B)
        return per_sample_loss(answer, velocity_target(latents, noise)).mean()

    loss = train("joint", parameters, JOINT, loss_of, seed, work, say, _matrices(parameters))
    return umt5.eval(), dit.eval(), loss


def _matrices(parameters: Mapping[str, Tensor]) -> list[str]:
    """What Muon trains: the DiT's linear layers inside blocks. After equal time they had learned more than with AdamW."""
    return [
        name
        for name, value in parameters.items()
        if name.startswith("dit.blocks.") and value.ndim == 2 and "modulation" not in name
    ]


def _caption_ids(tokens: Tokens, scene: Scene, generator: random.Random, limit: int | None) -> Sequence[int]:
    """Token ids of a training caption of a scene, drawn again until it is short enough."""
    while True:
        caption = training_caption(generator, scene, is_clip=False)
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
