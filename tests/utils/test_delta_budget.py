import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.delta_budget import (
    block_of,
    delta_norm,
    effective_rank,
    module_delta,
    over_cap,
    summarise,
    type_of,
    weight_norm,
)


def random_pair(rank, out_features, in_features, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, in_features, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(out_features, rank, generator=generator, dtype=torch.float64).to(dtype)
    return a, b


def formed_norm(a, b, scale):
    """The formed product, by numpy."""
    return np.linalg.norm(scale * (b.double().numpy() @ a.double().numpy()))


@settings(max_examples=200)
@given(
    rank=st.integers(1, 12),
    extra=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    sizes=st.tuples(st.integers(-20, 20), st.integers(-20, 20)),
    scale=st.floats(1e-3, 1e3) | st.floats(-1e3, -1e-3),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_gram_norm_equals_the_norm_of_the_formed_product(rank, extra, sizes, scale, seed, dtype):
    a, b = random_pair(rank, rank + extra[0], rank + extra[1], seed, dtype)
    a, b = a * 2.0 ** sizes[0], b * 2.0 ** sizes[1]
    # Largest error measured over 2000 random pairs: 4.7e-16.
    assert delta_norm(a, b, scale) == pytest.approx(formed_norm(a, b, scale), rel=1e-10)


def test_parts_that_cancel_are_seen():
    """A large adapter whose halves cancel but for a thousandth: only the product tells."""
    a, b = random_pair(4, 30, 20, seed=1)
    doubled_a, doubled_b = torch.cat([a, a]), torch.cat([b, -0.999 * b], dim=1)
    assert delta_norm(doubled_a, doubled_b) == pytest.approx(formed_norm(0.001 * a, b, 1.0), rel=1e-8)


def test_a_new_adapter_moves_nothing():
    a, b = random_pair(4, 30, 20, seed=1)
    assert delta_norm(a, torch.zeros_like(b)) == 0.0
    assert effective_rank(a, torch.zeros_like(b)) == 0.0
    orthogonal_a, orthogonal_b = torch.tensor([[1.0, 2.0]]), torch.zeros(2, 1)
    assert delta_norm(orthogonal_a, orthogonal_b) == 0.0


def test_a_convolution_counts_as_a_matrix():
    a, b = random_pair(3, 8, 12, seed=2)
    assert delta_norm(a.reshape(3, 3, 1, 2, 2), b.reshape(8, 3, 1, 1, 1)) == pytest.approx(
        formed_norm(a, b, 1.0), rel=1e-12
    )


def test_live_parameters_can_be_measured():
    a, b = (torch.nn.Parameter(tensor) for tensor in random_pair(3, 8, 12, seed=3))
    delta = module_delta(
        "blocks.0.cross_attn.k", a, b, 1.0, weight_norm(torch.nn.Parameter(torch.ones(8, 12)))
    )
    assert delta.ratio == pytest.approx(formed_norm(a.detach(), b.detach(), 1.0) / math.sqrt(96), rel=1e-12)


def test_ranks_that_differ_are_an_error():
    with pytest.raises(ValueError, match="ranks differ"):
        delta_norm(torch.zeros(2, 5), torch.zeros(5, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_norm_is_summed_in_float64(dtype):
    # Longer than a piece. Summed one after the other in float32, 5e6 squares of 0.1 are 1e-2 off.
    weight = torch.full((5000, 1001), 0.1, dtype=dtype)
    exact = float(weight[0, 0]) * math.sqrt(weight.numel())
    assert weight_norm(weight) == pytest.approx(exact, rel=1e-12)
    assert weight_norm(weight.T) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_effective_rank_of_equal_directions_is_their_number(rank):
    a, b = torch.zeros(8, 20), torch.zeros(30, 8)
    for index in range(rank):
        a[index, index], b[index, index] = 4.0, 0.5
    assert effective_rank(a, b) == pytest.approx(rank, rel=1e-5)


def test_effective_rank_equals_that_of_the_formed_product():
    a, b = random_pair(6, 30, 20, seed=4)
    singular = np.linalg.svd((b @ a).numpy(), compute_uv=False)[:6]
    shares = singular / singular.sum()
    assert effective_rank(a, b) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)


def test_an_adapter_that_is_not_a_number_is_over_every_cap():
    a, b = random_pair(2, 8, 6, seed=5)
    a[0, 0] = math.nan
    delta = module_delta("blocks.0.cross_attn.k", a, b, 1.0, 1.0)
    assert math.isnan(delta.ratio) and math.isnan(delta.effective_rank)
    assert over_cap([delta], 1e9) == [delta]


def test_a_base_weight_of_zeros():
    a, b = random_pair(2, 8, 6, seed=6)
    assert module_delta("m", a, b, 1.0, 0.0).ratio == math.inf
    assert module_delta("m", a, 0 * b, 1.0, 0.0).ratio == 0.0


def delta_of(module, ratio):
    """A module with that ratio."""
    return module_delta(module, torch.ones(1, 1), torch.full((1, 1), ratio), 1.0, 1.0)


def test_a_ratio_on_its_cap_is_not_over_it():
    assert not delta_of("m", 0.05).is_over(0.05)
    assert not delta_of("m", 0.05 * (1 + 5e-7)).is_over(0.05)
    assert delta_of("m", 0.05 * (1 + 1e-5)).is_over(0.05)


def test_modules_over_the_cap_come_farthest_first():
    deltas = [delta_of("a", 0.5), delta_of("b", 0.01), delta_of("c", math.nan), delta_of("d", 0.75)]
    assert [delta.module for delta in over_cap(deltas, 0.05)] == ["c", "d", "a"]


def test_summary_per_block_and_type():
    ratios = {
        "blocks.10.cross_attn.k": 0.5,
        "blocks.2.cross_attn.k": 0.25,
        "blocks.2.cross_attn.v": 0.75,
        "blocks.2.ffn.0": 0.125,
        "head.head": 1.0,
    }
    summary = summarise([delta_of(module, ratio) for module, ratio in ratios.items()])
    assert [
        (group.group, group.num_modules, group.mean_ratio, group.max_ratio) for group in summary.blocks
    ] == [
        ("2", 3, 0.375, 0.75),
        ("10", 1, 0.5, 0.5),
        ("other", 1, 1.0, 1.0),
    ]
    assert [
        (group.group, group.num_modules, group.mean_ratio, group.max_ratio) for group in summary.types
    ] == [
        ("cross_attn", 3, 0.5, 0.75),
        ("ffn", 1, 0.125, 0.125),
        ("head", 1, 1.0, 1.0),
    ]
    assert (summary.overall.mean_ratio, summary.overall.max_ratio) == (0.525, 1.0)
    assert summary.overall.worst_module == "head.head"
    with pytest.raises(ValueError, match="no modules"):
        summarise([])


def test_block_and_type_of_a_path():
    assert (block_of("blocks.13.self_attn.o"), type_of("blocks.13.self_attn.o")) == (13, "self_attn")
    assert (block_of("text_embedding.0"), type_of("text_embedding.0")) == (None, "text_embedding")
    assert (block_of("blocks.x.ffn.0"), type_of("blocks.x.ffn.0")) == (None, "blocks")
