"""The lean functions against numerical derivatives, and lean blocks against plain ones; measured on CPU, one thread."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from models.wan.arch import PUBLISHED, WanArch
from models.wan.lean import gated_add, norm_rotate, norm_scale_shift
from models.wan.rope import apply_rope, rope_table
from models.wan.transformer import WanBlock
from utils.recompute import run_again_later

EPS = 1e-6
GRID = (3, 2, 4)
TOKENS = GRID[0] * GRID[1] * GRID[2]
SMALL = replace(PUBLISHED["ti2v-5b"], dim=256, ffn_dim=512, num_heads=2, text_len=24)
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
# Measured at width 512 and here: outputs 7.6e-8, gradients of the hidden state 7.9e-8, of the text 5.7e-7.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 3e-7, 2e-6
# Error against float32, lean over plain: measured 0.999 to 1.007.
BFLOAT16_RATIO = 1.02


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def norm_inputs(rows: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Hidden state off zero, factor, offset."""
    hidden = draw(2, 3, 2, 1, 6, dtype=dtype) + 0.5
    return [hidden, draw(2, rows, 1, 1, 6, seed=1, dtype=dtype), draw(2, rows, 1, 1, 6, seed=2, dtype=dtype)]


def all_wants(count: int) -> list[tuple[bool, ...]]:
    return [wants for wants in product((True, False), repeat=count) if any(wants)]


def asked(inputs: list[Tensor], wants: tuple[bool, ...]) -> list[Tensor]:
    return [one.detach().clone().requires_grad_(want) for one, want in zip(inputs, wants, strict=True)]


@pytest.mark.parametrize("wants", all_wants(3))
@pytest.mark.parametrize("rows", [1, 3])
def test_norm_scale_shift_has_the_derivatives_of_its_formula(rows, wants):
    def function(*inputs: Tensor) -> Tensor:
        return norm_scale_shift(*inputs, EPS, torch.float64)

    inputs = asked(norm_inputs(rows), wants)
    assert gradcheck(function, inputs)
    expected = F.layer_norm(inputs[0], (6,), None, None, EPS) * inputs[1] + inputs[2]
    torch.testing.assert_close(function(*inputs), expected, rtol=1e-12, atol=1e-12)


def test_norm_scale_shift_takes_the_weights_of_a_norm():
    hidden, weight, bias = draw(2, 5, 6), draw(6, seed=1), draw(6, seed=2)
    inputs = asked([hidden, weight, bias], (True, True, True))
    assert gradcheck(lambda *given: norm_scale_shift(*given, EPS, torch.float64), inputs)
    expected = F.layer_norm(hidden, (6,), weight, bias, EPS)
    torch.testing.assert_close(norm_scale_shift(*inputs, EPS, torch.float64), expected)


@pytest.mark.parametrize("wants", all_wants(3))
@pytest.mark.parametrize("rows", [1, 3])
def test_gated_add_has_the_derivatives_of_its_formula(rows, wants):
    inputs = [draw(2, 3, 2, 1, 6), draw(2, 3, 2, 1, 6, seed=1), draw(2, rows, 1, 1, 6, seed=2)]
    inputs = asked(inputs, wants)
    assert gradcheck(gated_add, inputs)
    torch.testing.assert_close(gated_add(*inputs), inputs[0] + inputs[1] * inputs[2])


@pytest.mark.parametrize("wants", all_wants(2))
@pytest.mark.parametrize("rotated", [False, True])
def test_norm_rotate_has_the_derivatives_of_its_formula(rotated, wants):
    cos, sin = rope_table((2, 1, 2), 12, torch.device("cpu"))
    table = (cos.double(), sin.double()) if rotated else None
    inputs = asked([draw(2, 4, 24), draw(24, seed=1)], wants)

    def function(*given: Tensor) -> Tensor:
        return norm_rotate(*given, EPS, 2, table, torch.float64)

    # The tables are float32 numbers, whose squares add up to 1 within 1e-7.
    assert gradcheck(function, inputs, rtol=1e-4, atol=1e-6)
    expected = F.rms_norm(inputs[0], (24,), inputs[1], EPS).unflatten(-1, (2, -1))
    if table is not None:
        expected = apply_rope(expected, table)
    torch.testing.assert_close(function(*inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_what_is_given_and_what_is_kept_stay_as_they_are(dtype):
    """Work in place is on what the functions made themselves; a second backward pass finds the same."""
    table = rope_table((2, 1, 2), 12, torch.device("cpu"))
    inputs = asked([draw(2, 4, 24, dtype=dtype), draw(24, seed=1, dtype=FLOAT32)], (True, True))
    before = [one.detach().clone() for one in inputs]
    states = norm_rotate(*inputs, EPS, 2, table, dtype)
    direction = draw(*states.shape, seed=2, dtype=dtype)
    kept = direction.clone()
    first = torch.autograd.grad(states, inputs, direction, retain_graph=True)
    second = torch.autograd.grad(states, inputs, direction)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, inputs, before)) and torch.equal(direction, kept)
    assert [one.dtype for one in first] == [dtype, FLOAT32] and states.dtype == dtype


def test_no_float32_copy_is_kept_of_bfloat16():
    table = rope_table((2, 1, 2), 12, torch.device("cpu"))
    hidden, states = draw(2, 4, 24, dtype=BFLOAT16), draw(2, 4, 24, seed=1, dtype=BFLOAT16)
    row, weight = draw(2, 1, 24, dtype=FLOAT32), draw(24, dtype=FLOAT32)
    large: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= hidden.numel():
            large.append(tensor)
        return tensor

    hidden.requires_grad_()
    states.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm_scale_shift(hidden, row, row, EPS, BFLOAT16)
        query = norm_rotate(states, weight, EPS, 2, table, BFLOAT16)
        gated_add(hidden, states, row)
    places = {tensor.untyped_storage().data_ptr() for tensor in large}
    assert places == {one.untyped_storage().data_ptr() for one in (hidden, states, query)}


def block_of(arch: WanArch, compute: torch.dtype, *, lean: bool, trained: tuple[str, ...] = ()) -> WanBlock:
    block = WanBlock(arch, compute, lean)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(block.named_parameters()):
            spread = draw(*parameter.shape, seed=index, dtype=FLOAT32)
            spread *= 0.04 if parameter.dim() == 2 else 0.1
            parameter.copy_(spread + (1.0 if "norm" in name and "weight" in name else 0.0))
    block.requires_grad_(False)
    for name in trained:
        block.get_parameter(name).requires_grad_()
    return block


def step(
    block: WanBlock,
    residual: torch.dtype,
    *,
    rows: int = 1,
    wants: tuple[bool, bool, bool] = (True, False, True),
    run=None,
) -> list[Tensor | None]:
    """Output, and gradients of hidden state, modulation, text and trained parameters (None where not wanted)."""
    dim = block.modulation.shape[-1]
    # What both precisions represent, so that errors are those of the block.
    hidden = (3 * draw(2, *GRID, dim, seed=90)).to(BFLOAT16).to(residual)
    modulation = draw(2, rows, 6, dim, seed=91, dtype=FLOAT32) / 2
    text = draw(2, SMALL.text_len, dim, seed=92).to(BFLOAT16).to(block.compute_dtype)
    inputs = asked([hidden, modulation, text], wants)
    output = block(*inputs) if run is None else run(block, tuple(inputs))
    output.backward(draw(*output.shape, seed=93).to(output.dtype))
    return [output.detach(), *(one.grad for one in [*inputs, *block.parameters()])]


def errors(found, reference, relative_error) -> list[float]:
    """Relative errors of what is there; both sides have the same."""
    assert [one is None for one in found] == [one is None for one in reference]
    pairs = [(a, b) for a, b in zip(found, reference, strict=True) if a is not None]
    return [relative_error(a.float(), b.float()) for a, b in pairs]


@pytest.mark.parametrize("rows", [1, GRID[0]])
def test_a_lean_block_is_the_plain_one_in_float32(rows, relative_error):
    lean, plain = (step(block_of(SMALL, FLOAT32, lean=lean), FLOAT32, rows=rows) for lean in (True, False))
    output, *gradients = errors(lean, plain, relative_error)
    print(f"output {output:.1e}, gradients {gradients}")
    assert output < OUTPUT_TOLERANCE and max(gradients) < GRADIENT_TOLERANCE


@pytest.mark.parametrize("wants", [wants for wants in product((True, False), repeat=3) if any(wants)])
def test_gradients_go_where_they_are_wanted(wants, relative_error):
    lean, plain = (step(block_of(SMALL, FLOAT32, lean=lean), FLOAT32, wants=wants) for lean in (True, False))
    assert max(errors(lean, plain, relative_error)) < GRADIENT_TOLERANCE


def test_every_parameter_may_train(relative_error):
    names = tuple(name for name, _ in WanBlock(SMALL, FLOAT32).named_parameters())
    lean, plain = (
        step(block_of(SMALL, FLOAT32, lean=lean, trained=names), FLOAT32, rows=GRID[0])
        for lean in (True, False)
    )
    # But for the keys' biases, whose gradients are small differences of large numbers.
    found = [one for one in lean if one is not None]
    largest = dict(
        zip(["output", "hidden", "text", *names], errors(lean, plain, relative_error), strict=True)
    )
    print({name: f"{error:.1e}" for name, error in largest.items()})
    assert len(found) == 3 + len(names)
    noisy = {"self_attn.k.bias", "cross_attn.k.bias"}
    assert max(error for name, error in largest.items() if name not in noisy) < GRADIENT_TOLERANCE


@pytest.mark.parametrize("residual", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("rows", [1, GRID[0]])
def test_a_lean_block_in_bfloat16_errs_no_more_than_the_plain_one(residual, rows, relative_error):
    exact = step(block_of(SMALL, FLOAT32, lean=False), FLOAT32, rows=rows)
    lean, plain = (
        errors(
            step(block_of(SMALL, BFLOAT16, lean=lean), residual, rows=rows),
            exact,
            relative_error,
        )
        for lean in (True, False)
    )
    ratios = [mine / other for mine, other in zip(lean, plain, strict=True)]
    print(f"lean {lean}, plain {plain}, ratios {ratios}")
    assert max(ratios) < BFLOAT16_RATIO


@pytest.mark.parametrize("residual", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("mode", [True, "selective", "offload"])
def test_recomputing_changes_no_bit(mode, residual):
    def again(block, inputs):
        return run_again_later(mode, block, inputs)

    kept = step(block_of(SMALL, BFLOAT16, lean=True), residual)
    rebuilt = step(block_of(SMALL, BFLOAT16, lean=True), residual, run=again)
    for mine, other in zip(rebuilt, kept, strict=True):
        assert (mine is None and other is None) or torch.equal(mine, other)


@pytest.mark.long
@pytest.mark.parametrize(
    ("compute", "residual"), [(FLOAT32, FLOAT32), (BFLOAT16, FLOAT32), (BFLOAT16, BFLOAT16)]
)
def test_a_compiler_takes_a_lean_block_whole(compute, residual, relative_error):
    torch._dynamo.reset()
    trained = ("modulation", "norm3.weight", "self_attn.norm_q.weight")
    eager = step(block_of(SMALL, compute, lean=True, trained=trained), residual)
    compiled = block_of(SMALL, compute, lean=True, trained=trained)
    compiled.compile(fullgraph=True, backend="aot_eager")
    # Measured 0: the real-valued rotation rounds as the complex one does.
    assert max(errors(step(compiled, residual), eager, relative_error)) < OUTPUT_TOLERANCE
