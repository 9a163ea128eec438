"""Subspace iteration against the exact singular value decomposition."""

import pytest
import torch

from utils.low_rank import balanced, top_singular


def matrix(rows, columns, values, seed=0):
    random = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=random, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, len(values), generator=random, dtype=torch.float64)).Q
    return (left * torch.tensor(values, dtype=torch.float64)) @ right.T


def found(wanted, rank, size, seed=1, **limits):
    start = torch.randn(
        wanted.shape[1], size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return top_singular(lambda x: wanted @ x, lambda y: wanted.T @ y, start, rank, **limits)


def test_values_and_directions_are_those_of_the_exact_decomposition():
    wanted = matrix(40, 30, [2.0**-i for i in range(12)])
    top = found(wanted, 5, 13)
    assert torch.allclose(
        top.values, torch.tensor([2.0**-i for i in range(5)], dtype=torch.float64), rtol=1e-9
    )
    exact = torch.linalg.svd(wanted)
    best = exact.U[:, :5] @ torch.diag(exact.S[:5]) @ exact.Vh[:5]
    assert float(((top.left * top.values) @ top.right.T - best).norm()) < 1e-7


@pytest.mark.parametrize("seed", range(4))
def test_the_stated_error_holds_where_values_fall_slowly(seed):
    wanted = torch.randn(60, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    top = found(wanted, 8, 16, seed)
    best = float(torch.linalg.svdvals(wanted)[:8].square().sum())
    held = float(top.values.square().sum())
    # What is missing is a few times the last rise, since rises shrink by a constant factor at worst.
    assert 0 <= 1 - held / best <= 20 * top.error + 1e-12
    assert top.error <= 1e-5


def test_a_start_that_is_already_right_needs_the_least_passes():
    wanted = matrix(40, 30, [2.0**-i for i in range(12)])
    first = found(wanted, 5, 13)
    again = top_singular(lambda x: wanted @ x, lambda y: wanted.T @ y, first.block, 5)
    assert again.num_passes == 2
    assert torch.allclose(again.values, first.values)


def test_a_map_that_is_zero_has_no_directions_and_no_error():
    top = found(torch.zeros(6, 5, dtype=torch.float64), 2, 3)
    assert not top.values.any() and top.error == 0.0


@pytest.mark.parametrize("rank", [0, 4])
def test_a_rank_that_the_block_does_not_hold_is_refused(rank):
    with pytest.raises(ValueError, match="of a block of 3"):
        found(torch.eye(5, dtype=torch.float64), rank, 3)


def test_balanced_keeps_the_product_and_gives_both_sides_one_size():
    random = torch.Generator().manual_seed(3)
    up = torch.randn(9, 3, generator=random, dtype=torch.float64) * 100
    down = torch.randn(3, 7, generator=random, dtype=torch.float64)
    new_up, new_down = balanced(up, down)
    assert torch.allclose(new_up @ new_down, up @ down)
    grams = new_up.T @ new_up, new_down @ new_down.T
    assert torch.allclose(grams[0], grams[1], atol=1e-9)
