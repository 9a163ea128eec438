"""Pictures and clips drawn by the tiny Wan, many prompts at a time: Euler steps with guidance, as flow matching defines it.

Only for measuring: hundreds of prompts share each forward pass, and padding is taken as one row (`compact.py`). What
users sample with is the project's sampler.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from scripts.tiny_world.asset import TinyWan
from scripts.tiny_world.compact import velocity
from scripts.tiny_world.dit_training import encode_ids
from scripts.tiny_world.world import SIZE, Pixels
from utils.flow_matching import NUM_TRAIN_TIMESTEPS
from utils.rng import generator

_BATCH = 72


@dataclass(frozen=True)
class Drawing:
    """How to sample. `guidance` 1 is without; `shift` as in flow-matching schedulers."""

    num_steps: int
    guidance: float
    shift: float

    def levels(self) -> list[float]:
        """Noise levels from 1 to 0, one more than steps."""
        base = [1 - index / self.num_steps for index in range(self.num_steps + 1)]
        return [self.shift * level / (1 + (self.shift - 1) * level) for level in base]


@torch.no_grad()
def draw(model: TinyWan, prompts: Sequence[str], drawing: Drawing, seed: int, num_frames: int = 1) -> Pixels:
    """Draw each prompt, uint8 [N, num_frames, 48, 48, 3]; the noise depends on the seed and the prompt's place in the list."""
    frames = model.dit.arch.variant.latent_frames(num_frames)
    stride = model.vae.stride[1]
    shape = (model.vae.latent_channels, frames, SIZE // stride, SIZE // stride)
    parts = []
    for start in range(0, len(prompts), _BATCH):
        part = prompts[start : start + _BATCH]
        latents = torch.stack(
            [
                torch.randn(shape, generator=generator(seed, "draw", start + place))
                for place in range(len(part))
            ]
        )
        latents = _denoise(model, part, latents, drawing)
        video = model.vae.decode(latents)
        parts.append(((video + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy())
    return np.concatenate(parts)


def _denoise(model: TinyWan, prompts: Sequence[str], latents: Tensor, drawing: Drawing) -> Tensor:
    count = len(prompts)
    text, lens = encode_ids(model.umt5, [model.tokens(prompt) for prompt in [*prompts, ""]])
    levels = drawing.levels()
    for level, following in pairwise(levels):
        times = torch.full((count, 1), level * NUM_TRAIN_TIMESTEPS)
        answer = velocity(model.dit, latents, times, text[:count], lens[:count])
        if drawing.guidance != 1:
            empty_text, empty_lens = text[count:].expand(count, -1, -1), lens[count:].expand(count)
            without = velocity(model.dit, latents, times, empty_text[:, : int(lens[count])], empty_lens)
            answer = without + drawing.guidance * (answer - without)
        latents = latents + (following - level) * answer
    return latents
