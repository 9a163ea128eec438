"""What recomputation runs again and what it lets go."""

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

from utils import recompute
from utils.frozen_linear import FrozenLinear, quantise
from utils.recompute import is_wanted, run_again_later


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.runs = 0

    def forward(self, states, shared):
        self.runs += 1
        return torch.tanh(self.linear(states)) * shared


def train(mode, layers, states, shared):
    value = states
    for layer in layers:
        value = run_again_later(mode, layer, (value, shared)) if mode else layer(value, shared)
    value.sum().backward()
    return [layer.linear.weight.grad.clone() for layer in layers]


@pytest.mark.parametrize("mode", [True, "selective", "offload"])
def test_gradients_are_those_without(mode):
    def gradients(way):
        torch.manual_seed(0)
        layers = [Counted() for _ in range(3)]
        found = train(way, layers, torch.randn(2, 4), torch.randn(2, 4))
        return found, [layer.runs for layer in layers]

    plain, once = gradients(False)
    found, twice = gradients(mode)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert once == [1, 1, 1] and twice == [2, 2, 2]


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """The operations that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.names.append(function._schema.name)
        return function(*arguments, **(named or {}))


def run_in_backward(mode, run, *wire):
    """What the backward pass runs."""
    value = run_again_later(mode, run, wire)
    with Calls() as calls:
        value.sum().backward()
    return calls.names


def test_selective_runs_no_product_again():
    def count(mode):
        wire = (torch.randn(2, 4), torch.ones(2, 4))
        return run_in_backward(mode, Counted(), *wire).count("aten::addmm")

    assert count(True) == 1 and count("selective") == 0


def test_selective_runs_no_product_in_8_bits_again():
    def count(mode):
        values, scale = quantise(torch.randn(32, 16))
        layer = FrozenLinear(values, scale, None, torch.bfloat16, in_8_bits=True)
        states = torch.randn(3, 16).bfloat16().requires_grad_()
        return run_in_backward(mode, lambda x: layer(x).sin(), states).count("aten::_scaled_mm")

    # That of the gradient runs in any case.
    assert count(True) == 2 and count("selective") == 1


def test_selective_runs_no_attention_of_another_package_again():
    """By an operation with such a package's name before it; the packages need a GPU."""
    with torch.library._scoped_library("flash_attn", "DEF") as library:
        library.define("stand_in(Tensor x) -> Tensor")
        library.impl("stand_in", lambda x: x * 2, "CPU")
        operation = torch.ops.flash_attn.stand_in.default

        class Doubled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, states):
                return operation(states)

            @staticmethod
            def backward(ctx, gradient):
                return gradient * 2

        def count(mode):
            states = torch.randn(3, requires_grad=True)
            return run_in_backward(mode, lambda x: Doubled.apply(x).sin(), states).count(
                "flash_attn::stand_in"
            )

        assert count(True) == 1 and count("selective") == 0


def parked_now():
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lazy modules that are asked for their class
        return [thing for thing in gc.get_objects() if isinstance(thing, recompute._Parked)]


def test_parked_tensors_are_let_go_of():
    """Each knows the one before it, so that it can call it back ahead of use, but does not keep it alive."""
    before = parked_now()  # of other tests
    layers = [Counted() for _ in range(4)]
    for _ in range(3):
        train("offload", layers, torch.randn(2, 4), torch.ones(2, 4))
    assert len(parked_now()) == len(before)


def test_parked_tensors_come_back_ahead_of_use(monkeypatch):
    fetched, order = [], []
    fetch, take = recompute._Parked.fetch, recompute._Parked.take

    def watched_fetch(self):
        if not self._is_taken and self._back is None:
            fetched.append(id(self))
        fetch(self)

    def watched_take(self):
        order.append((id(self), id(self) in fetched))
        return take(self)

    monkeypatch.setattr(recompute._Parked, "fetch", watched_fetch)
    monkeypatch.setattr(recompute._Parked, "take", watched_take)
    train("offload", [Counted() for _ in range(4)], torch.randn(2, 4), torch.ones(2, 4))
    assert len(order) == 4
    assert [was_ahead for _, was_ahead in order] == [False, True, True, True]


def test_nothing_is_kept_where_no_gradient_is_wanted():
    frozen = Counted().requires_grad_(False)
    assert not is_wanted((torch.ones(2),), frozen)
    assert is_wanted((torch.ones(2, requires_grad=True),), frozen)
    assert is_wanted((torch.ones(2),), Counted())
    with torch.no_grad():
        assert not is_wanted((torch.ones(2, requires_grad=True),), Counted())


def test_offload_lets_go_of_the_input_on_the_device():
    """Saved tensors keep the hooks that packed them: a hook that knew the tensor itself kept it alive."""
    block = nn.Linear(8, 8)
    wire = (torch.randn(4, 8).requires_grad_() * 1.0,)
    kept = weakref.ref(wire[0])
    (out,) = run_again_later("offload", lambda hidden: (block(hidden),), wire)
    assert kept() is not None
    del wire
    gc.collect()
    assert kept() is None
    out.sum().backward()
    assert block.weight.grad is not None
