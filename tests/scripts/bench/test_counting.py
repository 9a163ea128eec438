"""Kernels, bytes moved and bytes kept, counted by hand on small tensors."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scripts.bench.counting import KernelCount, _one_rms_norm, fused_rms_norm, saved_bytes, weights_of


def kernels(work, *weights):
    with KernelCount(weights) as count:
        work()
    return [(one.name, one.read, one.written) for one in count.kernels]


def test_a_kernel_reads_what_it_is_given_and_writes_what_it_returns():
    a, b = torch.ones(4, 8), torch.ones(4, 8)
    assert kernels(lambda: a + b) == [("add", 256, 128)]
    assert kernels(lambda: a * a) == [("mul", 128, 128)], "the same tensor twice is read once"
    assert kernels(lambda: a.bfloat16()) == [("_to_copy", 128, 64)]
    assert kernels(lambda: a.add_(b)) == [("add_", 256, 128)]


def test_views_and_room_are_no_kernels():
    a = torch.ones(4, 8)
    assert kernels(lambda: (a.view(8, 4).transpose(0, 1), a[:2], torch.empty_like(a), a.contiguous())) == []


def test_what_is_repeated_is_read_once_and_what_is_overwritten_is_not_read():
    a, row = torch.ones(4, 8), torch.ones(1, 8)
    assert kernels(lambda: a * row) == [("mul", 128 + 32, 128)]
    assert kernels(lambda: row.expand(4, 8) + a) == [("add", 32 + 128, 128)]
    assert kernels(lambda: a.copy_(row)) == [("copy_", 32, 128)]
    assert kernels(lambda: a[:2].add_(1)) == [("add_", 64, 64)], "a slice, not all behind it"
    half = torch.empty(4, 8, dtype=torch.bfloat16)
    assert kernels(lambda: torch.mul(a, row, out=half)) == [("mul", 128 + 32, 64)]
    assert kernels(lambda: torch.mul(a, row, out=a)) == [
        ("mul", 128 + 32, 128)
    ], "read, and written in its place"
    assert kernels(lambda: torch.zeros_like(a)) == [("zeros_like", 0, 128)]


def test_weights_count_nothing():
    linear, a = nn.Linear(8, 16), torch.ones(4, 8)
    assert kernels(lambda: linear(a), *weights_of(linear)) == [("addmm", 128, 256)]


def test_what_autograd_keeps_is_counted_once_and_without_weights():
    linear = nn.Linear(8, 16).requires_grad_(False)
    a = torch.ones(4, 8, requires_grad=True)
    assert saved_bytes(lambda: linear(a), weights_of(linear)) == 0
    # gelu keeps its input; both squares keep one and the same tensor.
    assert saved_bytes(lambda: F.gelu(linear(a)), weights_of(linear)) == 4 * 16 * 4
    assert saved_bytes(lambda: a.square() + a.square(), ()) == 4 * 8 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_one_kernel_norm_is_the_norm(dtype, relative_error_of):
    random = torch.Generator().manual_seed(0)
    states = torch.randn(3, 5, 16, generator=random).to(dtype).requires_grad_()
    weight = torch.randn(16, generator=random).to(dtype)
    direction = torch.randn(3, 5, 16, generator=random).to(dtype)
    reference = F.rms_norm(states, (16,), weight, 1e-6)
    (pulled,) = torch.autograd.grad(reference, states, direction)
    ours = _one_rms_norm(states, (16,), weight, 1e-6)
    (mine,) = torch.autograd.grad(ours, states, direction)
    limit = 1e-6 if dtype == torch.float32 else 1e-2
    assert relative_error_of(ours, reference) < limit and relative_error_of(mine, pulled) < limit


def test_inside_the_mode_every_rms_norm_is_one_kernel():
    states, norm = torch.ones(4, 8, requires_grad=True), nn.RMSNorm(8).requires_grad_(False)
    with fused_rms_norm(), KernelCount(weights_of(norm)) as forward:
        out = norm(states)
    with KernelCount(weights_of(norm)) as backward:
        out.backward(torch.ones(4, 8))
    assert [(one.name, one.read, one.written) for one in forward.kernels] == [("rms_norm", 128, 128 + 16)]
    # The gradient, the states and their scales; one gradient.
    assert ("rms_norm_backward", 128 + 128 + 16, 128) in [
        (one.name, one.read, one.written) for one in backward.kernels
    ]
    assert len(kernels(lambda: norm(states))) > 3


@pytest.fixture
def relative_error_of():
    from utils.bench import relative_error

    return relative_error
