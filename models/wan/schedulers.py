"""diffusers' schedulers as solvers of Wan's flow: the only module that imports them.

All of them walk the grid of noise levels of the official UniPC, linspace(0.999, 0, steps + 1) without its end, shifted
(`set_timesteps` of wan/utils/fm_solvers_unipc.py); tests/models/wan/test_sampling.py has its values. diffusers' own default
grids end elsewhere. The official DPM++ begins at 1 instead (`get_sampling_sigmas`), so its way differs a little from ours.
"""

from typing import Any

import numpy as np
from torch import Tensor

from models.wan.sampling_settings import SolverName

# 1 - 1/1000, the highest of the 1000 noise levels of training (`sigma_max` of wan/utils/fm_solvers_unipc.py).
_HIGHEST_SIGMA = 0.999


class Solver:
    """One way from noise to latents. It remembers earlier steps, so each batch needs one of its own."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        scheduler.set_begin_index(0)
        self.timesteps: list[float] = [float(timestep) for timestep in scheduler.timesteps]
        self.sigmas: list[float] = [float(sigma) for sigma in scheduler.sigmas]
        self.done = 0

    def step(self, velocity_BCFHW: Tensor, latents_BCFHW: Tensor) -> Tensor:
        """Latents at the next lower noise level; both float32."""
        timestep = self._scheduler.timesteps[self.done]
        self.done += 1
        latents: Tensor = self._scheduler.step(velocity_BCFHW, timestep, latents_BCFHW, return_dict=False)[0]
        return latents


def build_solver(name: SolverName, steps: int, shift: float) -> Solver:
    """A solver at the beginning of its way."""
    return Solver(build_scheduler(name, steps, shift))


def build_scheduler(name: SolverName, steps: int, shift: float) -> Any:
    """The scheduler of diffusers behind a solver, its noise levels set."""
    from diffusers import (
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
    )

    unshifted = np.linspace(_HIGHEST_SIGMA, 0.0, steps + 1)[:-1]
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    if name == "euler":
        # It shifts by itself; its own way to say the grid would go through other timesteps.
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=unshifted.tolist())
    elif name == "dpm++":
        # Its flow sigmas are this very grid; it takes no others.
        scheduler = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **flow)
        scheduler.set_timesteps(steps)
    else:
        scheduler = UniPCMultistepScheduler(**flow)
        scheduler.set_timesteps(sigmas=unshifted)
    return scheduler
