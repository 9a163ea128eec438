"""`compile = true` on the small DiT: what it computes, and that new buckets end up compiling nothing."""

import shutil

import pytest
import torch

from models.wan.checkpoint import open_sharded
from models.wan.layers import Workload, dit_layers
from utils import recompute
from utils.compiled import graphs_compiled
from utils.lora import adapters_off

TARGETS = ["blocks.1.cross_attn.k", "blocks.1.cross_attn.v", "blocks.3.cross_attn.q"]
BFLOAT16 = {"dtype": "bfloat16"}
FLOAT8 = {"dtype": "bfloat16", "transformer_dtype": "float8"}


@pytest.fixture
def ti2v(tiny_ti2v, open_tiny):
    return open_tiny(tiny_ti2v)


@pytest.fixture
def build(make_config, build_layers, ti2v):
    """`build("dit_lora", compile=True, ...)`: layers whose adapters have an effect."""

    def make(mode="dit_lora", targets=TARGETS, **changes):
        config = make_config(mode, **changes)
        _, layers = build_layers(config, ti2v, targets if mode == "dit_lora" else [])
        generator = torch.Generator().manual_seed(1)
        for name, parameter in layers.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05, generator=generator)
        return layers

    return make


def step(layers, wire, *, of_text=False):
    """Velocity, and gradients of the mean of its squares: of what trains, or of the text."""
    text = wire.text.clone().requires_grad_(of_text)
    velocity = layers(wire._replace(text=text))
    wanted = [text] if of_text else [one for one in layers.parameters() if one.requires_grad]
    return [velocity.detach(), *torch.autograd.grad(velocity.square().mean(), wanted)]


@pytest.fixture
def compare(ti2v, draw_wire, relative_error):
    def errors(compiled, plain, *, frames=None, of_text=False, seed=0):
        states = torch.randn(2, 9, ti2v.arch.text_dim, generator=torch.Generator().manual_seed(3))
        wire = draw_wire(ti2v.arch, states, [9, 5], seed=seed)
        if frames is not None:  # image-conditioned: a timestep for each latent frame
            wire = wire._replace(timesteps_BT=wire.timesteps_BT * torch.linspace(0, 1, frames))
        found, expected = (step(layers, wire, of_text=of_text) for layers in (compiled, plain))
        return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))

    return errors


@pytest.mark.parametrize(
    "recompute",
    [True, *(pytest.param(mode, marks=pytest.mark.long) for mode in (False, "selective", "offload"))],
)
def test_the_compiled_step_is_the_plain_one(without_inductor, build, compare, recompute):
    """Measured: 2.3e-6, since composite operations are taken apart."""
    compiled = build(activation_checkpointing=recompute, compile=True)
    plain = build(activation_checkpointing=False)
    assert compare(compiled, plain) < 5e-6
    assert compare(compiled, plain, frames=2, seed=1) < 5e-6


def test_what_offload_parks_is_the_input_of_each_block(without_inductor, build, compare, monkeypatch):
    shapes = []

    class Counted(recompute._Parked):
        def __init__(self, tensor):
            shapes.append(tuple(tensor.shape))
            super().__init__(tensor)

    monkeypatch.setattr(recompute, "_Parked", Counted)
    compiled = build(activation_checkpointing="offload", compile=True)
    assert compare(compiled, build()) < 5e-6
    # Blocks 1 to 3: below the first adapter there is no backward pass.
    assert shapes == [(2, 1, 1, 12, 128)] * 3


@pytest.mark.parametrize(
    "recompute", [True, *(pytest.param(mode, marks=pytest.mark.long) for mode in ("selective", "offload"))]
)
def test_dropout_is_the_same_again_in_the_backward_pass(without_inductor, build, compare, recompute):
    adapter = {"dropout": 0.4}
    layers = [
        build(activation_checkpointing=mode, compile=True, adapter=adapter) for mode in (recompute, False)
    ]
    assert compare(*layers) < 5e-6
    assert compare(layers[0], build(compile=True)) > 0.01  # something is dropped


@pytest.mark.parametrize("model", [BFLOAT16, FLOAT8, FLOAT8 | {"transformer_compute": "float8"}])
def test_the_gradient_goes_through_it_to_the_text(without_inductor, build, compare, model):
    """Measured: 0.0059 to 0.0066, below what bfloat16 itself costs (test_float8.py)."""
    compiled, plain = (build("encoder_ft", model=model, compile=choice) for choice in (True, False))
    assert compare(compiled[-6:], plain[-6:], of_text=True) < 0.015


def test_blocks_that_visit_are_not_compiled(without_inductor, build, compare):
    compiled, plain = (build(model=BFLOAT16, blocks_to_swap=2, compile=choice) for choice in (True, False))
    before = graphs_compiled()
    assert compare(compiled, plain) < 0.02
    assert graphs_compiled() - before == 2


@pytest.mark.long
def test_with_two_shapes_there_have_been_all(without_inductor, build, ti2v, draw_wire):
    layers = build(activation_checkpointing=True, compile=True)
    states = torch.randn(2, 9, ti2v.arch.text_dim)

    def visit(frames, rows, columns):
        wire = draw_wire(ti2v.arch, states, [9, 9])
        latents = torch.randn(2, ti2v.arch.in_dim, frames, rows, columns)
        before = graphs_compiled()
        step(layers, wire._replace(latents_BCFHW=latents))
        return graphs_compiled() - before

    # Structures: no adapter below the first one (no gradient there), k and v, none but with a gradient, q.
    assert visit(2, 4, 6) == 4
    assert visit(3, 4, 6) == 4
    assert [visit(*shape) for shape in ((5, 4, 4), (1, 8, 8), (2, 6, 10))] == [0, 0, 0]


def test_adapters_are_switched_off_and_on_in_what_is_compiled(
    without_inductor, build, ti2v, draw_wire, relative_error
):
    layers, plain = build(compile=True), build()
    states = torch.randn(2, 9, ti2v.arch.text_dim)
    wire = draw_wire(ti2v.arch, states, [9, 9])
    with torch.no_grad():
        on = layers(wire)
        with adapters_off(layers), adapters_off(plain):
            off, expected = layers(wire), plain(wire)
        assert relative_error(off, expected) < 5e-6 and relative_error(on, off) > 1e-3
        assert torch.equal(layers(wire), on) and relative_error(on, plain(wire)) < 5e-6


def test_experts_that_take_turns(
    without_inductor, make_config, open_tiny, tiny_i2v, draw_wire, relative_error
):
    checkpoint = open_tiny(tiny_i2v)
    sources = [open_sharded(tiny_i2v / f"{expert}_model") for expert in ("high_noise", "low_noise")]
    velocities = []
    for choice in (True, False):
        config = make_config("encoder_ft", model={"expert": "both"}, compile=choice)
        specs = dit_layers(config, sources[0], checkpoint.arch, [], {}, Workload(24.0, 12.0), sources[1])
        layers = torch.nn.Sequential(*(spec.build(torch.device("cpu")) for spec in specs))
        states = torch.randn(2, 7, checkpoint.arch.text_dim, generator=torch.Generator().manual_seed(5))
        drawn = draw_wire(checkpoint.arch, states, [7, 7])
        with torch.no_grad():
            velocities.append(layers(drawn._replace(timesteps_BT=torch.tensor([[950.0], [100.0]]))))
    assert relative_error(*velocities) < 5e-6


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("recompute", "model", "tolerance"), [(True, {}, 1e-5), ("selective", BFLOAT16, 0.03)]
)
def test_by_the_real_compiler_rounding_is_all_that_differs(build, compare, recompute, model, tolerance):
    """Measured: 3.3e-6 in float32; 0.015 in bfloat16, whose gradients err by 0.02 (test_float8.py)."""
    torch._dynamo.reset()
    targets = [f"blocks.{index}.cross_attn.{name}" for index in range(4) for name in "kv"]
    compiled = build(targets=targets, activation_checkpointing=recompute, compile=True, model=model)
    plain = build(targets=targets, activation_checkpointing=False, model=model)
    assert compare(compiled, plain) < tolerance
