"""Both experts in one row of layers: each sample goes through its own, and the plan knows what two of them weigh."""

import pytest
import torch
from torch import nn

from models.wan.checkpoint import open_sharded
from models.wan.layer_plan import plan_dit_layers
from models.wan.layers import Workload, dit_layers
from models.wan.paired_layers import PairedBlockLayer
from models.wan.transformer import WanTransformer
from utils.frozen_linear import FrozenLinear

WORKLOAD = Workload(video_tokens=24.0, text_tokens=12.0)
EXPERTS = ("high_noise", "low_noise")


@pytest.fixture
def sources(tiny_i2v):
    return [open_sharded(tiny_i2v / f"{expert}_model") for expert in EXPERTS]


@pytest.fixture
def build(make_config, open_tiny, tiny_i2v, sources):
    """`build(blocks_to_swap=2, ...)`: specs and layers of both experts, and their sizes."""

    def make(model=None, **top):
        config = make_config("encoder_ft", model={"expert": "both"} | (model or {}), **top)
        checkpoint = open_tiny(tiny_i2v)
        specs = dit_layers(config, sources[0], checkpoint.arch, [], {}, WORKLOAD, sources[1])
        return specs, nn.Sequential(*(spec.build(torch.device("cpu")) for spec in specs)), checkpoint

    return make


def wire(draw_wire, arch, timesteps):
    text = torch.randn(len(timesteps), 7, arch.text_dim, generator=torch.Generator().manual_seed(5))
    drawn = draw_wire(arch, text, [7] * len(timesteps))
    return drawn._replace(timesteps_BT=torch.tensor(timesteps).unsqueeze(1))


def answers_of(source, arch, drawn):
    """One expert alone, sample by sample, by the model that knows no pipeline."""
    with torch.device("meta"):
        model = WanTransformer(arch, torch.float32, torch.float32)
    state = {name: source.get(name).float().clone() for name, _ in model.named_parameters()}
    model.load_state_dict(state, strict=True, assign=True)
    with torch.no_grad():
        return [
            model(
                drawn.latents_BCFHW[row : row + 1],
                drawn.timesteps_BT[row : row + 1],
                drawn.text[row : row + 1],
            )
            for row in range(len(drawn.text))
        ]


@pytest.mark.parametrize(
    "timesteps",
    [[900.0, 950.0, 999.0], [899.9999, 10.0, 500.0], [950.0, 100.0, 900.0], [100.0, 950.0, 899.9999]],
)
def test_each_sample_is_answered_by_its_own_expert(build, sources, draw_wire, timesteps):
    _, layers, checkpoint = build()
    drawn = wire(draw_wire, checkpoint.arch, timesteps)
    with torch.no_grad():
        found = layers(tuple(drawn))
    both = [answers_of(source, checkpoint.arch, drawn) for source in sources]
    for row, timestep in enumerate(timesteps):
        own, other = (both[0], both[1]) if timestep >= 900 else (both[1], both[0])
        assert torch.allclose(found[row], own[row][0], atol=1e-5)
        assert not torch.allclose(found[row], other[row][0], atol=1e-3)


def test_gradients_reach_the_text_of_every_sample(build, draw_wire):
    _, layers, checkpoint = build(activation_checkpointing=True)
    drawn = wire(draw_wire, checkpoint.arch, [950.0, 100.0])
    text = drawn.text.requires_grad_()
    layers(tuple(drawn._replace(text=text))).square().sum().backward()
    assert text.grad is not None
    assert all(row.abs().max() > 0 for row in text.grad)
    assert all(parameter.grad is None for parameter in layers.parameters())


@pytest.mark.parametrize(
    ("model", "top"),
    [
        ({}, {}),
        ({"dtype": "bfloat16"}, {}),
        ({"transformer_dtype": "float8"}, {}),
        ({}, {"blocks_to_swap": 2}),
    ],
)
def test_the_plan_knows_what_both_weigh(build, model, top):
    specs, layers, _ = build(model, **top)
    for spec, layer in zip(specs, layers, strict=True):
        held = sum(parameter.nbytes for parameter in layer.parameters())
        held += sum(buffer.nbytes for buffer in layer.buffers())
        assert spec.memory.weights == held, spec.name
    swapped = [spec for spec in specs if spec.memory.host_weights]
    assert len(swapped) == top.get("blocks_to_swap", 0)


def test_swapped_blocks_of_both_give_the_same_answers(build, draw_wire):
    plain, swapped = build()[1], build(blocks_to_swap=2)[1]
    blocks = [layer for layer in swapped if isinstance(layer, PairedBlockLayer)]
    away = [any(isinstance(module, FrozenLinear) for module in block.modules()) for block in blocks]
    assert sum(away) == 2
    drawn = wire(draw_wire, build()[2].arch, [950.0, 100.0, 920.0])
    with torch.no_grad():
        assert torch.equal(plain(tuple(drawn)), swapped(tuple(drawn)))


def test_one_expert_is_planned_as_before(make_config, open_tiny, tiny_i2v, sources):
    checkpoint = open_tiny(tiny_i2v)
    both, one = (
        plan_dit_layers(
            make_config("encoder_ft", model={"expert": expert}),
            sources[0].shapes,
            checkpoint.arch,
            [],
            WORKLOAD,
        )
        for expert in ("both", "high_noise")
    )
    for doubled, single in zip(both, one, strict=True):
        assert doubled.memory.weights == 2 * single.memory.weights > 0
        assert doubled.forward_flops == single.forward_flops
        assert doubled.memory.stored == single.memory.stored
