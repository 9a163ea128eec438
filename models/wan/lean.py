"""The parts of a DiT block between its matrix products, with few passes over memory and little kept for the backward pass.

The same formulas as the plain path of `transformer.py` and `attention.py`, evaluated in float32 (float64 for float64), each as
one `torch.autograd.Function` with a backward pass written by hand. Operands are read in the dtype that they have and results
written in the dtype that is wanted, so that no float32 copy is made for a cast alone, and what is kept is what exists anyhow: the
residual stream, the output of a projection, the query or key that attention keeps too. Results differ from the plain path's by the
order of float32 roundings (docs/numerics.md).

Shapes: B batch, S tokens, D width, N heads, K head width; an ellipsis is any leading shape.
"""

from typing import Any

import torch
from torch import Tensor

RopeTable = tuple[Tensor, Tensor]


def norm_scale_shift(
    hidden: Tensor, factor: Tensor, offset: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """`layer_norm(hidden) * factor + offset` in `dtype`.

    Args:
        hidden: [..., D]; kept for the backward pass as it is.
        factor: broadcasts to `hidden`.
        offset: broadcasts to `hidden`.
        eps: of the norm, which has no weights of its own.
        dtype: of the result.
    """
    result: Tensor = _NormScaleShift.apply(hidden, factor, offset, eps, dtype)
    return result


def gated_add(hidden: Tensor, mixed: Tensor, gate: Tensor) -> Tensor:
    """`hidden + mixed * gate`, rounded once, in the dtype of `hidden`; `gate` broadcasts to the shape of the two others."""
    result: Tensor = _GatedAdd.apply(hidden, mixed, gate)
    return result


def norm_rotate(
    states_BSD: Tensor,
    weight_D: Tensor,
    eps: float,
    num_heads: int,
    table: RopeTable | None,
    dtype: torch.dtype,
) -> Tensor:
    """Queries or keys [B, S, N, K] in `dtype` of a projection's output: RMS norm over D, then the rotation of `rope_table`.

    Args:
        states_BSD: kept for the backward pass as it is.
        weight_D: of the norm.
        eps: of the norm.
        num_heads: N.
        table: cosines and sines [S, 1, K / 2], or None: not rotated.
        dtype: of the result, which is kept too.
    """
    cos, sin = (None, None) if table is None else table
    result: Tensor = _NormRotate.apply(states_BSD, weight_D, cos, sin, eps, num_heads, dtype)
    return result


class _NormScaleShift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, factor: Tensor, offset: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        wide = hidden.to(_wide(hidden))
        normed, mean, scale = torch.native_layer_norm(wide, hidden.shape[-1:], None, None, eps)
        ctx.save_for_backward(hidden, mean, scale, factor)
        ctx.offset_shape = offset.shape
        return torch.addcmul(offset, normed, factor, out=_room(normed, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        hidden, mean, scale, factor = ctx.saved_tensors
        wants_hidden, wants_factor, wants_offset = ctx.needs_input_grad[:3]
        pulled_hidden = pulled_factor = pulled_offset = None
        wide = hidden.to(_wide(hidden))
        if wants_hidden:
            pulled, _, _ = torch.ops.aten.native_layer_norm_backward(
                gradient * factor, wide, hidden.shape[-1:], mean, scale, None, None, [True, False, False]
            )
            pulled_hidden = pulled.to(hidden.dtype)
        if wants_factor:
            pulled_factor = ((wide - mean) * scale * gradient).sum_to_size(factor.shape)
        if wants_offset:
            pulled_offset = gradient.to(wide.dtype).sum_to_size(ctx.offset_shape)
        return pulled_hidden, pulled_factor, pulled_offset, None, None


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, mixed: Tensor, gate: Tensor) -> Tensor:
        _, wants_mixed, wants_gate = ctx.needs_input_grad
        ctx.save_for_backward(gate if wants_mixed else None, mixed if wants_gate else None)
        ctx.mixed_dtype, ctx.gate_shape, ctx.gate_dtype = mixed.dtype, gate.shape, gate.dtype
        return torch.addcmul(hidden, mixed, gate, out=torch.empty_like(hidden))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        gate, mixed = ctx.saved_tensors
        pulled_mixed = pulled_gate = None
        if gate is not None:
            pulled_mixed = torch.mul(gradient, gate, out=torch.empty_like(gradient, dtype=ctx.mixed_dtype))
        if mixed is not None:
            pulled_gate = (gradient.to(ctx.gate_dtype) * mixed).sum_to_size(ctx.gate_shape)
        return gradient if ctx.needs_input_grad[0] else None, pulled_mixed, pulled_gate


class _NormRotate(torch.autograd.Function):
    """y = R(x * w) * r with r = 1 / sqrt(mean(x^2) + eps), which is R(x * r * w): the rotation R is linear.

    With g the gradient of y, and because R keeps products, mean(R'(g) * w * x * r) = mean(g * y). So the gradient of x is
    w * R'(g * r) - x * r * mean(g * r * y): what attention keeps stands in for the float32 normed states.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        eps: float,
        num_heads: int,
        dtype: torch.dtype,
    ) -> Tensor:
        width = states.shape[-1]
        length = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=_wide(states))
        scale = (length.square() / width + eps).rsqrt().unsqueeze(-1)
        heads = (states * weight).unflatten(-1, (num_heads, -1))
        if cos is not None and sin is not None:
            heads = _rotated(heads, cos, sin)
        result = torch.mul(heads, scale, out=_room(heads, dtype))
        ctx.save_for_backward(states, weight, scale, cos, sin, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        states, weight, scale, cos, sin, result = ctx.saved_tensors
        wants_states, wants_weight = ctx.needs_input_grad[:2]
        pulled_states = pulled_weight = None
        heads = gradient.shape[-2:]
        parts = states.unflatten(-1, heads)
        back = gradient * scale
        along = (back * result).sum((-2, -1), keepdim=True)
        if cos is not None:
            back = _rotated(back, cos, -sin)
        if wants_weight:
            pulled_weight = (back * parts).flatten(0, -3).sum(0).flatten()
        if wants_states:
            back = back.mul_(weight.unflatten(0, heads))
            pulled_states = torch.empty_like(states)
            torch.addcmul(
                back, parts, along * scale / -states.shape[-1], out=pulled_states.unflatten(-1, heads)
            )
        return pulled_states, pulled_weight, None, None, None, None, None


def _wide(states: Tensor) -> torch.dtype:
    """The dtype that norms are computed in."""
    return torch.promote_types(states.dtype, torch.float32)


def _room(states: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a result computed of `states`, which nobody else needs, may go: in its place if it has that dtype."""
    return states if states.dtype == dtype else torch.empty_like(states, dtype=dtype)


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel pairs of [B, S, N, K] rotated by these angles, in the place of `states`, which nobody else needs."""
    if torch.compiler.is_compiling():
        # A compiler makes one kernel of the real-valued formula, and has none for complex numbers.
        even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    pairs = torch.view_as_complex(states.unflatten(-1, (-1, 2)))
    pairs.mul_(torch.complex(cos, sin))
    return states
