"""Pictures drawn by the tiny Wan with the project's sampler, many prompts at a time."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from models.wan.pictures import to_frames
from models.wan.sampling import ModuleDenoiser, Trajectory
from models.wan.sampling_settings import SamplingSettings, SolverName
from scripts.tiny_world.asset import TinyWan
from scripts.tiny_world.compact import CompactDit
from scripts.tiny_world.dit_training import VARIANT, encode_ids
from scripts.tiny_world.world import SIZE, Pixels
from utils.config.schema import Expert

# In the order in which sampling uses them.
EXPERTS: tuple[Expert, ...] = ("high_noise", "low_noise")
_BATCH = 72


@dataclass(frozen=True)
class Drawing:
    """How to sample: as the flags of `scripts/sample.py`, with the empty caption as negative prompt."""

    steps: int
    guidance: float
    shift: float
    solver: SolverName = "euler"

    def settings(self) -> SamplingSettings:
        """The sampler's settings for the world's pictures."""
        return SamplingSettings(
            VARIANT, SIZE, SIZE, 1, self.steps, self.shift, self.guidance, solver=self.solver
        )


@torch.no_grad()
def draw(
    model: TinyWan,
    prompts: Sequence[str],
    drawing: Drawing,
    seeds: Sequence[int],
    adapted: Callable[[Expert], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> tuple[torch.Tensor, Pixels]:
    """Draw each prompt with its own seed of noise.

    Args:
        model: what draws; its one DiT stands in for both experts.
        prompts: what to draw.
        drawing: how to sample.
        seeds: of the noise of each prompt.
        adapted: what the model is put into while an expert is at work.

    Returns:
        Clean latents [N, C, 1, H, W] and pictures, uint8 [N, 48, 48, 3].
    """
    (empty,) = text_states(model, [""])
    trajectories = [
        Trajectory(
            text_states(model, prompts[start : start + _BATCH]),
            seeds[start : start + _BATCH],
            drawing.settings(),
            empty,
        )
        for start in range(0, len(prompts), _BATCH)
    ]
    denoiser = ModuleDenoiser(CompactDit(model.dit))
    for expert in EXPERTS:
        with adapted(expert):
            for trajectory in trajectories:
                trajectory.advance(denoiser, expert=expert)
    results = [trajectory.result() for trajectory in trajectories]
    frames = [to_frames(video)[0] for part in results for video in model.vae.decode(part)]
    return torch.cat(results), np.stack(frames)


def text_states(model: TinyWan, prompts: Sequence[str]) -> list[torch.Tensor]:
    """Text states of each prompt at its true length."""
    text_BLD, lens_B = encode_ids(model.umt5, [model.tokens(prompt) for prompt in prompts])
    return [text[:length] for text, length in zip(text_BLD, lens_B.tolist(), strict=True)]
