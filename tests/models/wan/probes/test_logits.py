"""Attention logits: their own module's output follows from them, and pieces and padding change nothing."""

import math

import pytest
import torch

from models.wan.arch import WanArch
from models.wan.attention import WanAttention
from models.wan.probes import logits
from models.wan.probes.logits import Inputs, lengths_of, spread_of, synthetic_inputs
from models.wan.rope import rope_table

ARCH = WanArch("ti2v", 32, 64, 16, 48, 48, 4, 2, 512, 1e-6, 24)


def attention(seed=0):
    torch.manual_seed(seed)
    module = WanAttention(ARCH.dim, ARCH.num_heads, ARCH.eps, torch.float32)
    for norm in (module.norm_q, module.norm_k):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return module.eval().requires_grad_(False)


def inputs(kind, num_queries=10, num_keys=7):
    random = torch.Generator().manual_seed(1)
    states = torch.randn(num_queries, ARCH.dim, generator=random)
    if kind == "self_attn":
        return Inputs(
            states, states, rope_table((1, 2, num_queries // 2), ARCH.head_dim, states.device), num_queries
        )
    return Inputs(states, torch.randn(num_keys, ARCH.dim, generator=random), None, num_keys)


@pytest.mark.parametrize("kind", ["cross_attn", "self_attn"])
def test_the_module_s_own_output_follows_from_the_logits(kind, monkeypatch):
    """Softmax of what is measured, times values, through o, is what the module computes."""
    module, seen = attention(), inputs(kind)
    taken = []
    monkeypatch.setattr(
        torch.Tensor,
        "log_softmax",
        lambda self, dim, original=torch.Tensor.log_softmax: taken.append(self) or original(self, dim=dim),
    )
    found = spread_of(module, seen)
    (logits_NSL,) = taken
    value_NLK = module.v(seen.source_LD).unflatten(-1, (ARCH.num_heads, -1)).transpose(0, 1)
    mixed = (logits_NSL.softmax(-1) @ value_NLK).transpose(0, 1).flatten(1)
    expected = module(seen.states_SD[None], seen.source_LD[None], seen.table)[0]
    # Largest difference measured: 1.2e-7.
    assert torch.allclose(module.o(mixed), expected, atol=1e-5)
    assert torch.allclose(found.std_N, logits_NSL.double().std(-1, correction=0).mean(1), rtol=1e-5)
    weights = logits_NSL.double().softmax(-1)
    assert torch.allclose(found.entropy_N, -(weights * weights.log()).sum(-1).mean(1), rtol=1e-5)


def test_pieces_give_what_the_whole_gives(monkeypatch):
    module, seen = attention(), inputs("cross_attn", num_queries=33)
    whole = spread_of(module, seen)
    monkeypatch.setattr(logits, "_MAX_LOGITS", 1)
    pieces = spread_of(module, seen)
    assert torch.allclose(whole.std_N, pieces.std_N, rtol=1e-6)
    assert torch.allclose(whole.entropy_N, pieces.entropy_N, rtol=1e-6)


def test_equal_keys_have_no_spread_and_full_entropy():
    module = attention()
    states = torch.randn(5, ARCH.dim)
    flat = spread_of(module, Inputs(states, torch.ones(8, ARCH.dim), None, 8))
    assert flat.std_N.max() < 1e-5 and torch.allclose(
        flat.entropy_N, torch.full((4,), math.log(8.0)).double(), atol=1e-5
    )


def test_lengths_are_of_tokens_and_not_of_padding():
    module = attention()
    source = torch.cat((torch.randn(3, ARCH.dim), 100 * torch.ones(5, ARCH.dim)))
    found = lengths_of(module, Inputs(torch.randn(2, ARCH.dim), source, None, 3))
    assert found.key == pytest.approx(module.k(source[:3]).norm(dim=-1).mean().item())
    assert found.value == pytest.approx(module.v(source[:3]).norm(dim=-1).mean().item())


def test_random_inputs_depend_on_seed_block_and_kind_alone():
    one = synthetic_inputs(ARCH, 3, "cross_attn", 0, 16)
    assert torch.equal(one.states_SD, synthetic_inputs(ARCH, 3, "cross_attn", 0, 16).states_SD)
    for other in ((2, "cross_attn", 0), (3, "self_attn", 0), (3, "cross_attn", 1)):
        assert not torch.equal(one.states_SD, synthetic_inputs(ARCH, *other, 16).states_SD)
    assert one.source_LD.shape == (ARCH.text_len, ARCH.dim)
