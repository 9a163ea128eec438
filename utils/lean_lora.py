"""A low-rank adapter added to what its layer gives, with few passes over the activations. torch only.

PEFT's layer casts its input to the dtype of the adapter (float32), multiplies, scales, adds and casts back, each a pass over a
tensor as wide as the activations, and autograd keeps the cast. Here everything is multiplied in the dtype that the activations have:
the small matrices are cast and not the large ones, scale and sum belong to the product with B, and what is kept is the input
itself and its product with A, a [N, R] tensor.

Shapes: N rows (any leading shape of the activations, flattened), I inputs, O outputs, R rank.
"""

from typing import Any

import torch
from torch import Tensor


def add_low_rank(product: Tensor, states: Tensor, down_RI: Tensor, up_OR: Tensor, scale: float) -> Tensor:
    """`product + scale * states @ A^T @ B^T` in the dtype of `product` (Hu et al., "LoRA", 2021, section 4.1).

    Args:
        product: [..., O], what the frozen layer gives.
        states: [..., I] in the same dtype, what the adapter reads; kept for the gradient of A as it is.
        down_RI: A, of any dtype; so is its gradient.
        up_OR: B, likewise.
        scale: alpha / rank.
    """
    result: Tensor = _AddLowRank.apply(product, states, down_RI, up_OR, scale)
    return result


class _AddLowRank(torch.autograd.Function):
    """With h = x A^T and g the gradient of the result, the gradient of h is g B * scale; of it follow those of x and A."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, states: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        _, wants_states, wants_down, wants_up, _ = ctx.needs_input_grad
        inner = _rows(states) @ down.to(states.dtype).t()
        ctx.save_for_backward(
            states if wants_down else None,
            down if wants_states else None,
            up if wants_states or wants_down else None,
            inner if wants_up else None,
        )
        ctx.scale, ctx.dtypes, ctx.shape = scale, (down.dtype, up.dtype), states.shape
        # Not in the place of `product`: recomputation that keeps the outputs of products may hold it.
        return torch.addmm(_rows(product), inner, up.to(product.dtype).t(), alpha=scale).view(product.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        states, down, up, inner = ctx.saved_tensors
        down_dtype, up_dtype = ctx.dtypes
        wants_product = ctx.needs_input_grad[0]
        pulled_states = pulled_down = pulled_up = None
        rows = _rows(gradient)
        if up is not None:
            # Scaled before it is rounded: one rounding fewer.
            pulled_inner = rows @ (up * ctx.scale).to(rows.dtype)
            if down is not None:
                pulled_states = (pulled_inner @ down.to(rows.dtype)).view(ctx.shape)
            if states is not None:
                pulled_down = (pulled_inner.t() @ _rows(states)).to(down_dtype)
        if inner is not None:
            pulled_up = (rows.t() @ inner).to(up_dtype) * ctx.scale
        return gradient if wants_product else None, pulled_states, pulled_down, pulled_up, None


def _rows(states: Tensor) -> Tensor:
    return states.reshape(-1, states.shape[-1])
