"""Attention logits of a base and of what it becomes with an adapter (or of another checkpoint), on the same inputs.

logits = Q K^T / sqrt(head width), per head. Softmax does not see what is added to all logits of a query, so what matters is
their spread over the keys of each query: the standard deviation over keys, averaged over queries. Entropy is that of the
softmax over keys, averaged likewise. Everything here is float32.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.wan.arch import WanArch
from models.wan.attention import WanAttention
from models.wan.probes.logit_report import Kind
from utils.errors import UserError
from utils.lora_names import AdapterPair
from utils.tensor_source import TensorSource

# Logits of so many (query, head, key) triples are in memory at a time: 64 MiB, and some copies of it.
_MAX_LOGITS = 1 << 24


@dataclass(frozen=True)
class Spread:
    """Of each head, averaged over queries: standard deviation over keys and entropy (nats), both float64 [heads]."""

    std_N: Tensor
    entropy_N: Tensor


@dataclass(frozen=True)
class Lengths:
    """Mean Euclidean length of a token's key, before `norm_k`, and of its value."""

    key: float
    value: float


@dataclass(frozen=True)
class Inputs:
    """What an attention sees in one forward pass.

    Attributes:
        states_SD: input of the queries, [S, D].
        source_LD: input of keys and values, [L, D]; the same tensor in self-attention.
        table: rotary table, None in cross-attention.
        num_tokens: how many rows of `source_LD` are tokens; those behind are padding.
    """

    states_SD: Tensor
    source_LD: Tensor
    table: tuple[Tensor, Tensor] | None
    num_tokens: int

    def to(self, device: torch.device) -> "Inputs":
        """The same on a device."""
        table = None if self.table is None else (self.table[0].to(device), self.table[1].to(device))
        return Inputs(self.states_SD.to(device), self.source_LD.to(device), table, self.num_tokens)


def load_attention(
    source: TensorSource,
    arch: WanArch,
    block: int,
    kind: Kind,
    device: torch.device,
    adapter: Mapping[str, AdapterPair] | None = None,
) -> WanAttention:
    """One attention in float32, with adapters merged into it: the sum is not rounded to the base's precision.

    Raises:
        UserError: a weight is missing, or has another shape than the model's.
    """
    with torch.device("meta"):
        attention = WanAttention(arch.dim, arch.num_heads, arch.eps, torch.float32)
    prefix = f"blocks.{block}.{kind}."
    state = {}
    for name, parameter in attention.named_parameters():
        tensor = source.get(prefix + name).float()
        if tensor.shape != parameter.shape:
            raise UserError(
                f"{source.files[0]}: {prefix}{name} is {list(tensor.shape)}, but the model wants {list(parameter.shape)}"
            )
        pair = (adapter or {}).get((prefix + name).removesuffix(".weight"))
        if pair is not None and name.endswith(".weight"):
            tensor = tensor + pair.scale * (pair.up.float().flatten(1) @ pair.down.float().flatten(1))
        state[name] = tensor.to(device, copy=True)
    source.release()
    attention.load_state_dict(state, strict=True, assign=True)
    return attention.eval().requires_grad_(False)


@torch.no_grad()
def spread_of(attention: WanAttention, inputs: Inputs) -> Spread:
    """Spread of the logits over keys, per head; in pieces, so that memory does not grow with the number of queries."""
    query_BSNK, key_BLNK = attention.queries_and_keys(
        inputs.states_SD[None].float(), inputs.source_LD[None].float(), inputs.table
    )
    query_NSK, key_NKL = query_BSNK[0].transpose(0, 1), key_BLNK[0].permute(1, 2, 0)
    heads, num_queries, width = query_NSK.shape
    std_N = torch.zeros(heads, dtype=torch.float64)
    entropy_N = torch.zeros(heads, dtype=torch.float64)
    step = max(1, _MAX_LOGITS // (heads * key_NKL.shape[2]))
    for start in range(0, num_queries, step):
        logits_NSL = query_NSK[:, start : start + step] @ key_NKL / math.sqrt(width)
        std_N += logits_NSL.std(dim=-1, correction=0).double().sum(dim=-1).cpu()
        log_weights_NSL = logits_NSL.log_softmax(dim=-1)
        entropy_NS = -(log_weights_NSL.exp() * log_weights_NSL).sum(dim=-1)
        entropy_N += entropy_NS.double().sum(dim=-1).cpu()
    return Spread(std_N / num_queries, entropy_N / num_queries)


@torch.no_grad()
def lengths_of(attention: WanAttention, inputs: Inputs) -> Lengths:
    """Mean lengths of keys and values, over tokens alone: all padding is one constant."""
    source_LD = inputs.source_LD[: inputs.num_tokens].float()
    key, value = attention.k(source_LD), attention.v(source_LD)
    return Lengths(key.norm(dim=-1).mean().item(), value.norm(dim=-1).mean().item())


def synthetic_inputs(arch: WanArch, block: int, kind: Kind, seed: int, num_tokens: int) -> Inputs:
    """Random inputs of unit variance for one attention; the same for every checkpoint of these sizes."""
    from models.wan.rope import rope_table
    from utils.rng import generator

    random = generator(seed, "logits", kind, block)
    states_SD = torch.randn(num_tokens, arch.dim, generator=random)
    if kind == "cross_attn":
        return Inputs(states_SD, torch.randn(arch.text_len, arch.dim, generator=random), None, arch.text_len)
    return Inputs(
        states_SD, states_SD, rope_table((1, 1, num_tokens), arch.head_dim, states_SD.device), num_tokens
    )


def head_ratios(base: Spread, other: Spread) -> Iterator[tuple[int, float, float]]:
    """Of each head: its number, ratio of standard deviations, ratio of entropies; NaN where the base's is 0."""
    for head in range(len(base.std_N)):
        yield head, _ratio(other.std_N[head], base.std_N[head]), _ratio(
            other.entropy_N[head], base.entropy_N[head]
        )


def _ratio(one: Tensor, other: Tensor) -> float:
    return float(one / other) if other else math.nan
