"""Pictures drawn by the tiny Wan with the project's sampler, many prompts at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from models.wan.pictures import to_frames
from models.wan.sampling import sample_latents
from models.wan.sampling_settings import SamplingSettings, SolverName
from scripts.tiny_world.asset import TinyWan
from scripts.tiny_world.compact import CompactDit
from scripts.tiny_world.dit_training import VARIANT, encode_ids
from scripts.tiny_world.world import SIZE, Pixels
from utils.rng import derive_seed

_BATCH = 72


@dataclass(frozen=True)
class Drawing:
    """How to sample: as the flags of `scripts/sample.py`, with the empty caption as negative prompt."""

    steps: int
    guidance: float
    shift: float
    solver: SolverName = "euler"

    def settings(self, num_frames: int = 1) -> SamplingSettings:
        """The sampler's settings for the world's pictures."""
        return SamplingSettings(
            VARIANT, SIZE, SIZE, num_frames, self.steps, self.shift, self.guidance, solver=self.solver
        )


@torch.no_grad()
def draw(model: TinyWan, prompts: Sequence[str], drawing: Drawing, seed: int) -> Pixels:
    """Draw each prompt, uint8 [N, 48, 48, 3]; the noise depends on the seed and the prompt's place in the list."""
    (empty,) = text_states(model, [""])
    dit = CompactDit(model.dit)
    drawn = []
    for start in range(0, len(prompts), _BATCH):
        part = prompts[start : start + _BATCH]
        latents = sample_latents(
            dit,
            text_states(model, part),
            [derive_seed(seed, "draw", start + place) for place in range(len(part))],
            drawing.settings(),
            negative_states=empty,
        )
        drawn += [to_frames(video)[0] for video in model.vae.decode(latents)]
    return np.stack(drawn)


def text_states(model: TinyWan, prompts: Sequence[str]) -> list[torch.Tensor]:
    """Text states of each prompt at its true length."""
    text_BLD, lens_B = encode_ids(model.umt5, [model.tokens(prompt) for prompt in prompts])
    return [text[:length] for text, length in zip(text_BLD, lens_B.tolist(), strict=True)]
