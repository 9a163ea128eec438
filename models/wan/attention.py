"""The two attentions of a Wan block. torch only; shapes: B batch, S video tokens, L text tokens, D width, N heads, K head width."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.wan.lean import norm_rotate
from models.wan.rope import apply_rope

# query [B, S, N, K], key and value [B, L, N, K] -> [B, S, N, K], all in one dtype.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# [B, L, N, K] each, in compute_dtype: what a query is compared with, and what is mixed.
KeysAndValues = tuple[Tensor, Tensor]


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
        lean: whether norm and rotation take few passes (`lean.py`).
    """

    attend: Attend

    def __init__(
        self, dim: int, num_heads: int, eps: float, compute_dtype: torch.dtype, lean: bool = True
    ) -> None:
        super().__init__()
        self.lean = lean
        self.num_heads = num_heads
        self.compute_dtype = compute_dtype
        self.attend = attend_by_torch
        self.q = nn.Linear(dim, dim, dtype=compute_dtype)
        self.k = nn.Linear(dim, dim, dtype=compute_dtype)
        self.v = nn.Linear(dim, dim, dtype=compute_dtype)
        self.o = nn.Linear(dim, dim, dtype=compute_dtype)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def forward(
        self,
        states_BSD: Tensor,
        source_BLD: Tensor,
        table: tuple[Tensor, Tensor] | None,
        ready: KeysAndValues | None = None,
    ) -> Tensor:
        """Attend from `states_BSD` to `source_BLD` (the same tensor in self-attention).

        Args:
            states_BSD: queries' input, in compute_dtype.
            source_BLD: keys' and values' input, in compute_dtype.
            table: rotary table for both sides, or None (cross-attention has no positions).
            ready: `keys_and_values(source_BLD, table)`, where they have been made before.

        Returns:
            [B, S, D] in compute_dtype.
        """
        query = self._normed(self.norm_q, self.q(states_BSD), table, self.compute_dtype)
        key, value = self.keys_and_values(source_BLD, table) if ready is None else ready
        return self.o(self.attend(query, key, value).flatten(2))

    def keys_and_values(self, source_BLD: Tensor, table: tuple[Tensor, Tensor] | None) -> KeysAndValues:
        """Keys, normed, rotated and rounded, and values of a source: all that attention makes of it."""
        key = self._normed(self.norm_k, self.k(source_BLD), table, self.compute_dtype)
        return key, self.v(source_BLD).unflatten(-1, (self.num_heads, -1))

    @property
    def source_makers(self) -> tuple[nn.Module, ...]:
        """The modules that `keys_and_values` runs."""
        return self.k, self.norm_k, self.v

    def queries_and_keys(
        self, states_BSD: Tensor, source_BLD: Tensor, table: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Queries [B, S, N, K] and keys [B, L, N, K] in float32, normed and rotated; arguments as of `forward`.

        The attention logits are their products over K, divided by sqrt(K).
        """
        query = self._normed(self.norm_q, self.q(states_BSD), table, torch.float32)
        return query, self._normed(self.norm_k, self.k(source_BLD), table, torch.float32)

    def _normed(
        self, norm: RMSNorm, projected_BSD: Tensor, table: tuple[Tensor, Tensor] | None, dtype: torch.dtype
    ) -> Tensor:
        """One side of the attention, [B, S, N, K], of its projection's output."""
        if self.lean:
            return norm_rotate(projected_BSD, norm.weight, norm.eps, self.num_heads, table, dtype)
        heads = norm(projected_BSD).unflatten(-1, (self.num_heads, -1))
        return (heads if table is None else apply_rope(heads, table)).to(dtype)
