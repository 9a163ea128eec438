"""Random weights under official names, drawn when they are asked for: models of the real size without a download.

Drawn so that activations stay of order 1 and every tensor matters: an agreement of two outputs would mean little if half of the
weights were zero, and a GPU multiplies zeros faster than numbers.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from utils.rng import derive_seed
from utils.tensor_source import Shape, TensorSource

_MODULATION, _NORM, _BIAS = "modulation", "norm", "bias"
_BIAS_STD, _NORM_STD = 0.02, 0.1


class RandomSource(TensorSource):
    """A source with no file behind it; each tensor is a function of its name.

    Args:
        shapes: official names and shapes.
        device: where tensors are drawn, which is quicker than drawing them elsewhere and moving them.
    """

    def __init__(self, shapes: Mapping[str, Shape], device: torch.device) -> None:
        self.files = (Path("random"),)
        self.shapes = dict(shapes)
        self.dtypes = dict.fromkeys(self.shapes, "F32")
        self._device = device

    def get(self, name: str) -> Tensor:
        """One tensor in float32 on `device`."""
        self._check_name(name)
        shape = self.shapes[name]
        random = torch.Generator(self._device).manual_seed(derive_seed(0, "bench_weights", name))
        drawn = torch.randn(shape, generator=random, device=self._device)
        if _NORM in name and name.endswith("weight"):
            return drawn * _NORM_STD + 1
        if name.endswith(_BIAS):
            return drawn * _BIAS_STD
        fan_in = shape[-1] if _MODULATION in name else math.prod(shape[1:])
        return drawn * max(1, fan_in) ** -0.5

    def release(self) -> None:
        """Nothing is held."""
