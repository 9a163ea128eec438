"""Linear layers whose weight never trains: stored in 8 bits, or in host memory, and brought into shape at each use.

Autograd would keep the weight that the forward pass used for the gradient of the input. Here it keeps nothing: the
backward pass asks for the weight again. So a weight in 8 bits is never held in full twice, and one that visits the
device may leave it between the two passes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.block_swap import BlockSwap, SwappedTensor

FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(FP8).max
# Keeps the scale of an all-zero channel from being 0.
_SMALLEST_SCALE = 1e-12


def quantise(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as float8_e4m3fn [out, in] and float32 scales [out, 1]: the largest of each output channel becomes 448."""
    weight = weight_OI.float()
    scale = (weight.abs().amax(dim=1, keepdim=True) / _FP8_MAX).clamp_(min=_SMALLEST_SCALE)
    # Rounding of the division may pass the largest number, behind which the format has only NaN.
    return (weight / scale).clamp_(-_FP8_MAX, _FP8_MAX).to(FP8), scale


def dequantise(values_OI: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`. e4m3 fits into bfloat16 exactly, so the only rounding is that of the product."""
    return values_OI.to(dtype).mul_(scale)


class FrozenLinear(nn.Module):
    """`F.linear` with a weight that never trains.

    Args:
        values: the weight as stored, on the device.
        scale: float32 [out, 1] where it is stored in 8 bits, else None.
        bias: in the compute dtype, or None.
        dtype: compute dtype.
    """

    values: Tensor | None
    scale: Tensor | None

    def __init__(self, values: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._visiting: SwappedTensor | None = None
        # Buffers, not parameters: nothing trains them, and they have no name of their own in a checkpoint.
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def live_elsewhere(self, visiting: SwappedTensor) -> None:
        """From now on the values come from there."""
        self.values, self._visiting = None, visiting

    def weight_now(self) -> Tensor:
        """The weight [out, in] in the compute dtype, to be used at once."""
        values = self.values if self._visiting is None else self._visiting.get()
        assert values is not None
        return values if self.scale is None else dequantise(values, self.scale, self._dtype)

    def forward(self, states: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return _FrozenLinear.apply(states, self)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(states, layer.weight_now(), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # As rows, as torch's own linear does it, so that the numbers are the same.
        (gradient,) = gradients
        rows = gradient.reshape(-1, gradient.shape[-1]) @ ctx.layer.weight_now()
        return rows.view(*gradient.shape[:-1], -1), None


def replace_frozen_linears(module: nn.Module, make: Callable[[str, nn.Linear], FrozenLinear]) -> None:
    """Put `make(path, linear)` in the place of every linear layer whose weight does not train.

    The path is that of the layer in the model: an adapter around it does not show.
    """
    for path, child in list(module.named_modules()):
        if not isinstance(child, nn.Linear) or child.weight.requires_grad:
            continue
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, make(path.removesuffix(".base_layer"), child))


def move_out(block: nn.Module, swap: BlockSwap) -> None:
    """Move the weights of all frozen linear layers of a block to host memory, as one block of `swap`."""
    layers = [module for module in block.modules() if isinstance(module, FrozenLinear)]
    weights = [layer.values for layer in layers if layer.values is not None]
    for layer, visiting in zip(layers, swap.add_block(weights), strict=True):
        layer.live_elsewhere(visiting)
