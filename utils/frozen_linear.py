"""Linear layers whose weight never trains: stored in 8 bits, or in host memory, and brought into shape (or multiplied) at each use.

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
# Keeps the scale of an all-zero channel or token from being 0; a gradient may be very small and is none.
_SMALLEST_SCALE = 1e-36
# Compute dtype, and whether products are in 8 bits too.
_How = tuple[torch.dtype, bool]


def quantise(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as float8_e4m3fn [out, in] and float32 scales [out, 1]: the largest of each output channel becomes 448."""
    weight = weight_OI.float()
    scale = (weight.abs().amax(dim=1, keepdim=True) / _FP8_MAX).clamp_(min=_SMALLEST_SCALE)
    # Rounding of the division may pass the largest number, behind which the format has only NaN.
    return (weight / scale).clamp_(-_FP8_MAX, _FP8_MAX).to(FP8), scale


def dequantise(values_OI: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`. e4m3 fits into bfloat16 exactly, so the only rounding is that of the product."""
    return values_OI.to(dtype).mul_(scale)


def multiply_in_8_bits(rows_NI: Tensor, values_OI: Tensor, scale: Tensor) -> Tensor:
    """rows @ weight.T of a quantised weight, in 8 bits: each row is scaled so that its largest number becomes 448.

    Products of e4m3 numbers are added up in float32 and scaled back. [N, in] -> [N, out] in the dtype of `rows_NI`, which
    on a GPU has to be bfloat16.
    """
    rows, row_scale = quantise(rows_NI)
    # Private, but what torch's own packages call and TorchInductor knows; its public face came later than torch 2.11.
    return torch._scaled_mm(rows, values_OI.t(), row_scale, scale.t(), out_dtype=rows_NI.dtype)


def multiply_back_in_8_bits(gradient_NO: Tensor, values_OI: Tensor, scale: Tensor) -> Tensor:
    """gradient @ weight in 8 bits, [N, out] -> [N, in].

    The weight's scales belong to what is summed over, so they go to the gradient before that is scaled by its rows.
    """
    rows, row_scale = quantise(gradient_NO.float() * scale.t())
    # The right side must lie column by column in memory: a copy of the weight's bytes, small beside the product.
    columns_IO = values_OI.t().contiguous()
    ones = scale.new_ones((1, columns_IO.shape[0]))
    return torch._scaled_mm(rows, columns_IO.t(), row_scale, ones, out_dtype=gradient_NO.dtype)


class FrozenLinear(nn.Module):
    """`F.linear` with a weight that never trains.

    Args:
        values: the weight as stored, on the device.
        scale: float32 [out, 1] where it is stored in 8 bits, else None.
        bias: in the compute dtype, or None.
        dtype: compute dtype.
        in_8_bits: whether to multiply in 8 bits too; the weight is stored so.
    """

    values: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        values: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
        in_8_bits: bool = False,
    ) -> None:
        super().__init__()
        self.how: _How = (dtype, in_8_bits)
        self._visiting: SwappedTensor | None = None
        # Buffers, not parameters: nothing trains them, and they have no name of their own in a checkpoint.
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def live_elsewhere(self, visiting: SwappedTensor) -> None:
        """From now on the values come from there."""
        self.values, self._visiting = None, visiting

    def values_now(self) -> Tensor:
        """The weight [out, in] as it is stored, to be used at once."""
        values = self.values if self._visiting is None else self._visiting.get()
        assert values is not None
        return values

    def weight_now(self) -> Tensor:
        """The weight [out, in] in the compute dtype, to be used at once."""
        return _weight(self.values_now(), self.scale, self.how[0])

    def forward(self, states: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self._visiting is not None:
            return _VisitorLinear.apply(states, self)
        return _FrozenLinear.apply(states, self.values, self.scale, self.bias, self.how)


def _weight(values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return values if scale is None else dequantise(values, scale, dtype)


def _product(states: Tensor, values: Tensor, scale: Tensor | None, bias: Tensor | None, how: _How) -> Tensor:
    dtype, in_8_bits = how
    if not in_8_bits or scale is None:
        return F.linear(states, _weight(values, scale, dtype), bias)
    product = multiply_in_8_bits(states.reshape(-1, states.shape[-1]), values, scale)
    product = product.view(*states.shape[:-1], -1)
    return product if bias is None else product + bias


def _product_back(gradient: Tensor, values: Tensor, scale: Tensor | None, how: _How) -> Tensor:
    dtype, in_8_bits = how
    # As rows, as torch's own linear does it, so that the numbers are the same.
    rows = gradient.reshape(-1, gradient.shape[-1])
    if in_8_bits and scale is not None:
        back = multiply_back_in_8_bits(rows, values, scale)
    else:
        back = rows @ _weight(values, scale, dtype)
    return back.view(*gradient.shape[:-1], -1)


class _FrozenLinear(torch.autograd.Function):
    """With a weight that is there in both passes; of tensors alone, so that `torch.compile` sees through it."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, values: Tensor, scale: Tensor | None, *more: Any) -> Tensor:
        bias, ctx.how = more
        ctx.save_for_backward(values, scale)
        return _product(states, values, scale, bias, ctx.how)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, scale = ctx.saved_tensors
        return _product_back(gradients[0], values, scale, ctx.how), None, None, None, None


class _VisitorLinear(torch.autograd.Function):
    """With a weight that comes for each pass by itself."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return _product(states, layer.values_now(), layer.scale, layer.bias, layer.how)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layer = ctx.layer
        return _product_back(gradients[0], layer.values_now(), layer.scale, layer.how), None


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
