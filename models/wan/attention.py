"""The two attentions of a Wan block. torch only; shapes: B batch, S video tokens, L text tokens, D width, N heads, K head width."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.wan.rope import apply_rope

# query [B, S, N, K], key and value [B, L, N, K] -> [B, S, N, K], all in one dtype.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_by_torch(query_BSNK: Tensor, key_BLNK: Tensor, value_BLNK: Tensor) -> Tensor:
    """Attention by torch, which chooses the fastest kernel that it has for the device."""
    query, key, value = (one.transpose(1, 2) for one in (query_BSNK, key_BLNK, value_BLNK))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed and returned in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, states: Tensor) -> Tensor:
        """Normalise [..., D]."""
        return F.rms_norm(states.float(), self.weight.shape, self.weight, self.eps)


class WanAttention(nn.Module):
    """Multi-head attention with RMS-normed queries and keys (over the full width, before the split into heads).

    Projections live in `compute_dtype`, norms in float32. Queries and keys stay in float32 through norm and rotary
    embedding and are rounded once, just before the product.

    Attributes:
        attend: softmax(query key / sqrt(K)) value, by torch or by another package's kernel (`models.wan.kernels`).
    """

    attend: Attend

    def __init__(self, dim: int, num_heads: int, eps: float, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.compute_dtype = compute_dtype
        self.attend = attend_by_torch
        self.q = nn.Linear(dim, dim, dtype=compute_dtype)
        self.k = nn.Linear(dim, dim, dtype=compute_dtype)
        self.v = nn.Linear(dim, dim, dtype=compute_dtype)
        self.o = nn.Linear(dim, dim, dtype=compute_dtype)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def forward(self, states_BSD: Tensor, source_BLD: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
        """Attend from `states_BSD` to `source_BLD` (the same tensor in self-attention).

        Args:
            states_BSD: queries' input, in compute_dtype.
            source_BLD: keys' and values' input, in compute_dtype.
            table: rotary table for both sides, or None (cross-attention has no positions).

        Returns:
            [B, S, D] in compute_dtype.
        """
        query, key = self.queries_and_keys(states_BSD, source_BLD, table)
        value = self.v(source_BLD).unflatten(-1, (self.num_heads, -1))
        mixed_BSNK = self.attend(query.to(self.compute_dtype), key.to(self.compute_dtype), value)
        return self.o(mixed_BSNK.flatten(2))

    def queries_and_keys(
        self, states_BSD: Tensor, source_BLD: Tensor, table: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Queries [B, S, N, K] and keys [B, L, N, K] in float32, normed and rotated; arguments as of `forward`.

        The attention logits are their products over K, divided by sqrt(K).
        """
        heads = (self.num_heads, -1)
        query = self.norm_q(self.q(states_BSD)).unflatten(-1, heads)
        key = self.norm_k(self.k(source_BLD)).unflatten(-1, heads)
        if table is not None:
            query = apply_rope(query, table)
            key = apply_rope(key, table)
        return query, key
