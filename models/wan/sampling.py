"""Sampling: from noise, text states and a model that predicts velocities to latents, many samples at once.

    settings = replace(official_settings(variant), width=48, height=48, num_frames=1, steps=16, guidance=2.0)
    latents_BCFHW = sample_latents(model, states, seeds, settings, negative_states=empty)
    video_BCFHW = vae.decode(latents_BCFHW)

Shapes: B batch, C channels, F latent frames, H W latent height and width, L text tokens, D width of the text states, T 1
or F. A sample depends on its own seed, text and first frame and not on what else is in the batch, but for rounding.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.wan.sampling_settings import SamplingSettings
from models.wan.schedulers import build_solver
from utils.config.schema import Expert

OnStep = Callable[[], None]


@runtime_checkable
class Denoiser(Protocol):
    """What predicts velocities for sampling."""

    def velocities(
        self, latents_BCFHW: Tensor, timesteps_BT: Tensor, texts_BLD: Sequence[Tensor]
    ) -> list[Tensor]:
        """The velocity of the same noisy latents under each of several texts, float32, on the device of the latents."""
        ...

    def keeping(self, texts_BLD: Sequence[Tensor]) -> AbstractContextManager[None]:
        """For the body these tensors are texts of many calls, and the weights stay as they are.

        What depends on nothing else may be computed once; behind the body nothing is kept.
        """
        ...


class ModuleDenoiser:
    """A `WanTransformer`, or whatever is called like one, as a denoiser."""

    def __init__(self, module: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self._module = module

    def velocities(
        self, latents_BCFHW: Tensor, timesteps_BT: Tensor, texts_BLD: Sequence[Tensor]
    ) -> list[Tensor]:
        """One pass for each text."""
        return [self._module(latents_BCFHW, timesteps_BT, text).float() for text in texts_BLD]

    def keeping(self, texts_BLD: Sequence[Tensor]) -> AbstractContextManager[None]:
        """A call knows nothing of the one before."""
        return nullcontext()


def draw_noise(seeds: Sequence[int], settings: SamplingSettings) -> Tensor:
    """Noise of each seed, [B, C, F, H, W] float32. Drawn on the CPU, so that a seed means the same everywhere."""
    return torch.stack(
        [
            torch.randn(settings.latent_shape, generator=torch.Generator("cpu").manual_seed(seed))
            for seed in seeds
        ]
    )


class Trajectory:
    """One batch on its way from noise to latents; it may change models on the way."""

    def __init__(
        self,
        text_states: Sequence[Tensor],
        seeds: Sequence[int],
        settings: SamplingSettings,
        negative_states: Tensor | None = None,
        condition_BCFHW: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start at the noise of the seeds. Arguments as of `sample_latents`.

        Raises:
            ValueError: not as many seeds as texts, guidance without a negative prompt, or a condition that is missing or
                out of place.
        """
        if len(text_states) != len(seeds):
            raise ValueError(f"{len(text_states)} texts, but {len(seeds)} seeds")
        if settings.is_guided and negative_states is None:
            raise ValueError("guidance needs negative_states; those of the empty prompt will do")
        is_conditioned = condition_BCFHW is not None
        if is_conditioned != (settings.variant.model_type == "i2v") and settings.variant.model_type != "ti2v":
            raise ValueError(
                f"{settings.variant.name}: a condition is {'given' if is_conditioned else 'missing'}"
            )
        self._settings = settings
        self._solver = build_solver(settings.solver, settings.steps, settings.shift)
        self.latents_BCFHW = draw_noise(seeds, settings).to(device)
        self._text_BLD = pad_sequence(list(text_states), batch_first=True).to(device)
        self._negative_BLD = None
        if settings.is_guided and negative_states is not None:
            self._negative_BLD = negative_states.to(device).expand(len(seeds), -1, -1)
        self._condition = None
        if condition_BCFHW is not None:
            self._condition = condition_BCFHW.to(device).float().expand(len(seeds), -1, -1, -1, -1)

    @property
    def steps_left(self) -> int:
        """Steps that are still to be made."""
        return self._settings.steps - self._solver.done

    @property
    def next_timestep(self) -> float:
        """The timestep of the next step, 0 to 1000."""
        return self._solver.timesteps[self._solver.done]

    @torch.no_grad()
    def advance(
        self, denoiser: Denoiser, on_step: OnStep | None = None, expert: Expert | None = None
    ) -> None:
        """Make all the steps that are left, or those of one expert, as far as they come next.

        Meanwhile the denoiser's weights stay as they are, so that it may keep what it makes of the texts.
        """
        texts = [text for text in (self._text_BLD, self._negative_BLD) if text is not None]
        with denoiser.keeping(texts if self._settings.reuse_text_keys else ()):
            while self.steps_left and (
                expert is None or self._settings.expert_at(self.next_timestep) == expert
            ):
                self._step(denoiser)
                if on_step is not None:
                    on_step()

    def result(self) -> Tensor:
        """The clean latents, float32; all steps have been made."""
        if self.steps_left:
            raise ValueError(f"{self.steps_left} steps are left")
        return self._with_first_frame()

    def _step(self, denoiser: Denoiser) -> None:
        timestep = self.next_timestep
        guidance = self._settings.guidance_at(timestep)
        texts = [self._text_BLD]
        if guidance > 1.0 and self._negative_BLD is not None:
            texts.append(self._negative_BLD)
        velocity, *without = denoiser.velocities(self._model_input(), self._timesteps(timestep), texts)
        if without:
            velocity = without[0] + guidance * (velocity - without[0])
        self.latents_BCFHW = self._solver.step(velocity, self.latents_BCFHW)

    def _model_input(self) -> Tensor:
        if self._condition is not None and self._settings.variant.model_type == "i2v":
            return torch.cat((self.latents_BCFHW, self._condition), dim=1)
        return self._with_first_frame()

    def _with_first_frame(self) -> Tensor:
        """The latents; of an image-conditioned TI2V with the clean first frame in them."""
        if self._condition is None or self._settings.variant.model_type != "ti2v":
            return self.latents_BCFHW
        return torch.cat((self._condition, self.latents_BCFHW[:, :, 1:]), dim=2)

    def _timesteps(self, timestep: float) -> Tensor:
        """One column, or for an image-conditioned TI2V one for each latent frame: the first is clean."""
        batch, _, frames, _, _ = self.latents_BCFHW.shape
        is_by_frame = self._condition is not None and self._settings.variant.model_type == "ti2v"
        timesteps_BT = torch.full((batch, frames if is_by_frame else 1), timestep, dtype=torch.float32)
        if is_by_frame:
            timesteps_BT[:, 0] = 0.0
        return timesteps_BT.to(self.latents_BCFHW.device)


def sample_latents(
    model: Denoiser | Callable[..., Tensor],
    text_states: Sequence[Tensor],
    seeds: Sequence[int],
    settings: SamplingSettings,
    *,
    negative_states: Tensor | None = None,
    condition_BCFHW: Tensor | None = None,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample a batch with one model (of a variant with two experts: with this one all the way).

    Args:
        model: a `WanTransformer` (or anything called like it), or a `Denoiser`.
        text_states: of each sample, [L, D] at the prompt's true length (`TextEncoder.encode`). Lengths may differ.
        seeds: of each sample.
        settings: size, steps, guidance and so on, for all.
        negative_states: [L, D] of the negative prompt; needed where a guidance is above 1.
        condition_BCFHW: the first frame, of each sample or one for all. I2V: the 20 channels of
            `caching.first_frame_condition`. TI2V: the frame's latents, F = 1.
        device: where the model is.
        on_step: called after each step.

    Returns:
        Clean normalised latents [B, C, F, H, W], float32, for `WanVae.decode`.
    """
    denoiser: Any = model if isinstance(model, Denoiser) else ModuleDenoiser(model)
    trajectory = Trajectory(text_states, seeds, settings, negative_states, condition_BCFHW, device)
    trajectory.advance(denoiser, on_step)
    return trajectory.result()
