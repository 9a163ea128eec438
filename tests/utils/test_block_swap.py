"""Blocks that visit: the right weights at every use, the order learnt, two slots, and gradients as without."""

import pytest
import torch
from torch import nn

from utils import block_swap
from utils.block_swap import BlockSwap
from utils.frozen_linear import FrozenLinear, move_out, replace_frozen_linears
from utils.memory import evenly_spread
from utils.recompute import run_again_later

CPU = torch.device("cpu")
WIDTH, NUM_BLOCKS = 8, 5


class Block(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.requires_grad_(False)

    def forward(self, states):
        return states + self.down(torch.tanh(self.up(states)))


def blocks_with(swapped: list[int]) -> tuple[list[Block], BlockSwap]:
    blocks, swap = [Block(seed) for seed in range(NUM_BLOCKS)], BlockSwap(CPU)
    for index in swapped:
        replace_frozen_linears(
            blocks[index],
            lambda path, linear: FrozenLinear(linear.weight.detach(), None, linear.bias, torch.float32),
        )
        move_out(blocks[index], swap)
    return blocks, swap


def step(blocks: list[Block], recompute: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and gradient of the input."""
    states = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH).requires_grad_()
    value = states
    for block in blocks:
        value = run_again_later(True, block, (value,)) if recompute else block(value)
    (gradient,) = torch.autograd.grad(value.square().sum(), states)
    return value.detach(), gradient


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("swapped", [[2], [1, 3], [0, 1, 2, 3, 4]])
def test_every_use_sees_its_own_weights(swapped, recompute):
    """Without recomputation the backward pass fetches the weights anew: nothing of the slot is saved by autograd."""
    expected = step(blocks_with([])[0], recompute=False)
    blocks, _ = blocks_with(swapped)
    for _ in range(3):
        for found, wanted in zip(step(blocks, recompute), expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_order_of_both_directions_is_learnt(recompute):
    blocks, swap = blocks_with([0, 1, 2, 3, 4])
    step(blocks, recompute)
    step(blocks, recompute)
    copies, late = swap.num_copies, swap.num_late
    step(blocks, recompute)
    # At each turn the last two blocks are still there: 3 more per direction.
    assert swap.num_copies - copies == 6
    assert swap.num_late == late


def test_a_frozen_part_that_only_goes_forward_is_learnt_too():
    blocks, swap = blocks_with([0, 1, 2, 3, 4])
    states = torch.ones(1, WIDTH)
    for _ in range(2):
        for block in blocks:
            block(states)
    late = swap.num_late
    for block in blocks:
        block(states)
    assert swap.num_late == late  # the first block was on its way while the last one worked


def test_a_wrong_guess_costs_a_copy_and_no_number():
    blocks, swap = blocks_with([0, 1, 2, 3, 4])
    expected = {index: block(torch.ones(1, WIDTH)) for index, block in enumerate(blocks_with([])[0])}
    order = [0, 3, 1, 4, 4, 2, 0, 2, 1, 3]
    for index in order:
        assert torch.equal(blocks[index](torch.ones(1, WIDTH)), expected[index])
    assert swap.num_late > 2


def test_there_are_never_more_than_two_slots():
    _, swap = blocks_with([0, 1, 2, 3, 4])
    swap.slot_with(0)
    assert len(swap._slots) == 2
    block_bytes = 2 * (2 * WIDTH * WIDTH * 4)
    assert [slot.nbytes for slot in swap._slots] == [block_bytes] * 2
    _, single = blocks_with([3])
    single.slot_with(0)
    assert len(single._slots) == 1


def test_a_block_may_lie_in_pieces(monkeypatch):
    """Pieces that end in the middle of a weight, and in the middle of a number."""
    expected = step(blocks_with([])[0], recompute=False)
    for piece in (100, 257, 512):
        monkeypatch.setattr(block_swap, "_PIECE_BYTES", piece)
        blocks, _ = blocks_with([0, 2, 3])
        for found, wanted in zip(step(blocks, recompute=True), expected, strict=True):
            assert torch.equal(found, wanted)


def test_only_weights_of_linear_layers_leave():
    blocks, _ = blocks_with([1])
    assert [name for name, _ in blocks[1].named_parameters()] == ["up.bias"]
    assert not any(True for _ in blocks[1].buffers())


def test_swapped_blocks_are_spread_evenly():
    assert evenly_spread(3, 30) == [5, 15, 25]
    assert evenly_spread(1, 4) == [2]
    assert evenly_spread(0, 4) == []
    for number in range(1, 30):
        chosen = evenly_spread(number, 30)
        assert len(set(chosen)) == number and min(chosen) >= 0 and max(chosen) < 30
