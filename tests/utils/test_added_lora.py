"""Adapters that are put on built layers compute what PEFT's do, add up, and go again without a trace."""

import copy

import pytest
import torch
from torch import nn

from utils.added_lora import WeightedAdapter, adapters_added
from utils.config.schema import AdapterConfig
from utils.lora import add_lora
from utils.lora_names import AdapterPair

CPU = torch.device("cpu")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def block():
    torch.manual_seed(0)
    module = nn.ModuleDict({"k": nn.Linear(6, 5), "v": nn.Linear(6, 5, dtype=torch.bfloat16)})
    return module.requires_grad_(False)


def pair(seed, scale=1.0, shape=(5, 6)):
    return AdapterPair(draw(2, shape[1], seed=seed), draw(shape[0], 2, seed=seed + 50), scale, "none")


def test_they_compute_what_peft_computes(block):
    theirs = copy.deepcopy(block)
    add_lora(theirs, 0, ["k", "v"], AdapterConfig(rank=2, alpha=3.0), torch.float32, seed=1)
    pairs = {}
    for path in ("k", "v"):
        down = theirs[path].lora_A["default"].weight
        up = theirs[path].lora_B["default"].weight
        up.data = draw(5, 2, seed=7)
        pairs[f"blocks.0.{path}"] = AdapterPair(down.detach(), up.detach(), 1.5, "alpha")
    inputs = draw(3, 6, seed=3)
    with torch.no_grad(), adapters_added({"blocks.0": block}, [WeightedAdapter(pairs)], CPU) as count:
        assert count == 2
        torch.testing.assert_close(block["k"](inputs), theirs["k"](inputs), rtol=0, atol=1e-6)
        ours, reference = block["v"](inputs.bfloat16()), theirs["v"](inputs.bfloat16())
        assert ours.dtype == reference.dtype == torch.bfloat16
        # One unit in the last place of bfloat16: PEFT rounds after each operation.
        torch.testing.assert_close(ours, reference, rtol=2**-7, atol=2**-7)


def test_several_add_up_by_their_weights_and_nothing_is_left_behind(block):
    first, second = pair(1, scale=2.0), pair(2)
    inputs = draw(3, 6, seed=3)
    before, modules = block["k"](inputs), dict(block.named_modules())
    adapters = [WeightedAdapter({"blocks.0.k": first}, 0.5), WeightedAdapter({"blocks.0.k": second}, -3.0)]
    with adapters_added({"blocks.0": block}, adapters, CPU):
        expected = before + inputs @ (1.0 * first.up @ first.down - 3.0 * second.up @ second.down).T
        torch.testing.assert_close(block["k"](inputs), expected, rtol=0, atol=1e-5)
    assert dict(block.named_modules()) == modules
    assert torch.equal(block["k"](inputs), before)


def test_modules_of_other_stages_are_passed_over(block):
    adapters = [WeightedAdapter({"blocks.0.k": pair(1), "blocks.1.k": pair(2), "head.head": pair(3)})]
    with adapters_added({"blocks.0": block}, adapters, CPU) as count:
        assert count == 1
    outer = nn.ModuleDict({"text": nn.Sequential(nn.Linear(6, 5))})
    named = [WeightedAdapter({"text.0": pair(1), "blocks.0.k": pair(2)})]
    with adapters_added({"": outer, "blocks.0": block}, named, CPU) as count:
        assert count == 2


def test_an_error_takes_them_off_too(block):
    kept = block["k"]
    with (
        pytest.raises(RuntimeError, match="stop"),
        adapters_added({"blocks.0": block}, [WeightedAdapter({"blocks.0.k": pair(1)})], CPU),
    ):
        assert block["k"] is not kept
        raise RuntimeError("stop")
    assert block["k"] is kept


def test_a_convolution_is_adapted_as_if_merged():
    conv = nn.Conv3d(3, 4, (1, 2, 2), stride=(1, 2, 2)).requires_grad_(False)
    down, up = draw(2, 3, 1, 2, 2, seed=1), draw(4, 2, 1, 1, 1, seed=2)
    holder = nn.ModuleDict({"patch": conv})
    inputs = draw(1, 3, 2, 4, 4, seed=3)
    merged = copy.deepcopy(conv)
    merged.weight += 0.7 * (up.flatten(1) @ down.flatten(1)).view_as(merged.weight)
    adapter = WeightedAdapter({"patch": AdapterPair(down, up, 0.7, "alpha")})
    with adapters_added({"": holder}, [adapter], CPU):
        torch.testing.assert_close(holder["patch"](inputs), merged(inputs), rtol=0, atol=1e-5)
