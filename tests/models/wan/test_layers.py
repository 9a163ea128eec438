"""Which layers there are, what trains in them, and that in a row they are the whole model."""

import pytest
import torch
from torch.nn import functional as F
from transformers import UMT5EncoderModel

from models.wan.attention import WanAttention
from models.wan.names import umt5_to_hf
from models.wan.text_encoder import load_umt5, pad_token_ids
from models.wan.transformer import WanBlock
from utils.layers import global_names
from utils.lora import parameter_names

CAPTIONS = ([17, 5, 40, 8, 1], [9, 1], [30, 31, 32, 33, 34, 35, 36, 37, 1])
LENS = [len(ids) for ids in CAPTIONS]
TARGETS = ["blocks.0.cross_attn.k", "blocks.0.cross_attn.v", "blocks.2.cross_attn.k"]


@pytest.fixture(params=["tiny_ti2v", "tiny_t2v", "tiny_i2v"])
def checkpoint(request, open_tiny):
    return open_tiny(request.getfixturevalue(request.param))


@pytest.fixture
def ti2v(tiny_ti2v, open_tiny):
    return open_tiny(tiny_ti2v)


def named_parameters(specs, layers):
    return {
        name: parameter
        for spec, layer in zip(specs, layers, strict=True)
        for name, parameter in global_names(spec.name, layer).items()
    }


@pytest.mark.parametrize("lean", [True, False])
def test_lean_kernels_are_those_of_every_block(lean, ti2v, make_config, build_layers):
    config = make_config("dit_lora", model={"lean_kernels": lean})
    _, layers = build_layers(config, ti2v, TARGETS)
    found = [module.lean for module in layers.modules() if isinstance(module, WanBlock | WanAttention)]
    assert found == [lean] * 3 * ti2v.arch.num_layers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
def test_dit_layers_in_a_row_are_the_whole_dit(
    checkpoint, dtype, residual, make_config, build_layers, build_reference, draw_wire
):
    config = make_config("dit_lora", model={"dtype": dtype, "residual_dtype": residual})
    _, layers = build_layers(config, checkpoint, TARGETS)
    states_BLD = torch.randn(
        3, max(LENS), checkpoint.arch.text_dim, generator=torch.Generator().manual_seed(5)
    )
    wire = draw_wire(checkpoint.arch, states_BLD, LENS)
    reference = build_reference(checkpoint, getattr(torch, dtype), getattr(torch, residual))
    velocity = layers(wire)
    # The adapters of TARGETS are in there: before the first step they change nothing.
    assert torch.equal(velocity, reference(wire.latents_BCFHW, wire.timesteps_BT, states_BLD))
    assert velocity.dtype == torch.float32
    assert velocity.shape[1] == checkpoint.arch.out_dim


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_all_layers_in_a_row_are_the_text_encoder_and_the_dit(
    checkpoint, attention, make_config, build_layers, build_reference, draw_wire
):
    config = make_config("encoder_ft", model={"text_attn_implementation": attention})
    _, layers = build_layers(config, checkpoint)
    ids_BL, lens_B = pad_token_ids(CAPTIONS)
    wire = draw_wire(checkpoint.arch, ids_BL, LENS)
    velocity = layers(wire)

    encoder: UMT5EncoderModel = load_umt5(checkpoint.text, torch.float32, torch.device("cpu"), attention)
    # As in the layers: torch's attention takes another kernel where the position bias needs a gradient.
    encoder.requires_grad_(True)
    dit = build_reference(checkpoint)
    is_token = (torch.arange(ids_BL.shape[1]) < lens_B[:, None]).long()
    states_BLD = encoder(input_ids=ids_BL, attention_mask=is_token).last_hidden_state
    for row, length in enumerate(LENS):
        states_BLD[row, length:] = 0
    assert torch.equal(velocity, dit(wire.latents_BCFHW, wire.timesteps_BT, states_BLD))

    # Each caption alone at its true length, then zeros up to 512 rows: the official recipe, without any mask.
    for row, ids in enumerate(CAPTIONS):
        alone_1LD = encoder(input_ids=torch.tensor([ids])).last_hidden_state
        padded_1LD = F.pad(alone_1LD, (0, 0, 0, 512 - len(ids)))
        expected = dit(wire.latents_BCFHW[row : row + 1], wire.timesteps_BT[row : row + 1], padded_1LD)
        # Measured: at most 3.4e-6.
        torch.testing.assert_close(velocity[row : row + 1], expected, rtol=0, atol=2e-5)


def test_names_of_all_parameters_are_those_of_the_files(checkpoint, make_config, build_layers):
    specs, layers = build_layers(make_config("encoder_ft"), checkpoint)
    names = list(named_parameters(specs, layers))
    text = {f"text_encoder.{umt5_to_hf(name)}" for name in checkpoint.text.shapes}
    assert set(names) == text | set(checkpoint.source.shapes)
    assert len(names) == len(text) + len(checkpoint.source.shapes)
    num_blocks = checkpoint.arch.num_layers
    assert [spec.name for spec in specs] == [
        "text_encoder.shared",
        *(f"text_encoder.encoder.block.{index}" for index in range(3)),
        "text_encoder.encoder.final_layer_norm",
        "",
        *(f"blocks.{index}" for index in range(num_blocks)),
        "head",
    ]


def test_layers_hold_the_values_of_the_files_in_memory_of_their_own(checkpoint, make_config, build_layers):
    specs, layers = build_layers(make_config("encoder_ft"), checkpoint)
    hf_names = {f"text_encoder.{umt5_to_hf(name)}": name for name in checkpoint.text.shapes}
    for name, parameter in named_parameters(specs, layers).items():
        if name in hf_names:
            stored = checkpoint.text.get(hf_names[name])
        else:
            stored = checkpoint.source.get(name)
        assert torch.equal(parameter, stored.to(parameter.dtype)), name
        assert parameter.data_ptr() != stored.data_ptr(), name


@pytest.mark.parametrize(
    ("wanted", "trained_blocks"), [(0, {0, 1, 2}), (1, {2}), (2, {1, 2}), (3, {0, 1, 2}), (99, {0, 1, 2})]
)
@pytest.mark.parametrize(
    ("optimizer", "precision"), [("adamw", torch.float32), ("adamw_kahan", torch.bfloat16)]
)
def test_the_top_blocks_train_in_the_optimizers_precision_and_the_rest_is_frozen(
    wanted, trained_blocks, optimizer, precision, ti2v, make_config, build_layers
):
    model = {"dtype": "bfloat16", "text_train_blocks": wanted}
    config = make_config("encoder_ft", model=model, optimizer={"type": optimizer})
    specs, layers = build_layers(config, ti2v)
    trained_layers = {f"text_encoder.encoder.block.{index}" for index in trained_blocks}
    trained_layers.add("text_encoder.encoder.final_layer_norm")
    assert {spec.name for spec in specs if spec.trainable} == trained_layers
    assert {spec.name for spec in specs if spec.trains_weights} == trained_layers
    for spec, layer in zip(specs, layers, strict=True):
        for name, parameter in global_names(spec.name, layer).items():
            trains = spec.name in trained_layers
            assert parameter.requires_grad == trains, name
            if spec.name.startswith("text_encoder."):
                assert parameter.dtype == (precision if trains else torch.bfloat16), name


@pytest.mark.parametrize("wanted", [False, True])
def test_the_token_table_trains_on_request(wanted, ti2v, make_config, build_layers):
    config = make_config("encoder_ft", model={"dtype": "bfloat16", "train_token_embedding": wanted})
    specs, layers = build_layers(config, ti2v)
    assert specs[0].trainable == specs[0].trains_weights == wanted
    assert layers[0].inner.weight.requires_grad == wanted
    assert layers[0].inner.weight.dtype == (torch.float32 if wanted else torch.bfloat16)


def test_adapters_train_and_nothing_else_of_the_dit(ti2v, make_config, build_layers):
    config = make_config("dit_lora", model={"dtype": "bfloat16"}, adapter={"rank": 3})
    specs, layers = build_layers(config, ti2v, TARGETS)
    parameters = named_parameters(specs, layers)
    adapters = {name for target in TARGETS for name in parameter_names(target)}
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == adapters
    assert {parameters[name].dtype for name in adapters} == {torch.float32}
    assert {spec.name for spec in specs if spec.trainable} == {"blocks.0", "blocks.2"}
    assert not any(spec.trains_weights for spec in specs)
    dim = ti2v.arch.dim
    assert [tuple(parameters[name].shape) for name in parameter_names(TARGETS[0])] == [(3, dim), (dim, 3)]


def test_adapters_start_from_the_given_values(ti2v, make_config, build_layers):
    target = TARGETS[0]
    dim = ti2v.arch.dim
    initial = {
        name: torch.full(shape, value)
        for name, shape, value in zip(
            parameter_names(target), ((4, dim), (dim, 4)), (0.25, -0.5), strict=True
        )
    }
    specs, layers = build_layers(make_config("dit_lora"), ti2v, TARGETS, initial)
    parameters = named_parameters(specs, layers)
    assert all(torch.equal(parameters[name], value) for name, value in initial.items())
    assert not parameters[parameter_names(TARGETS[1])[1]].any()


def test_every_layer_has_a_cost_in_proportion_to_its_work(ti2v, make_config, build_layers):
    specs, _ = build_layers(make_config("encoder_ft"), ti2v)
    costs = {spec.name: spec.forward_flops for spec in specs}
    assert costs["blocks.0"] == costs["blocks.1"] > costs["head"] > 0
    assert costs["text_encoder.encoder.block.0"] > 0
    assert costs["text_encoder.shared"] == 0


@pytest.mark.parametrize("mode", [False, True, "selective", "offload"])
def test_only_blocks_are_recomputed(mode, ti2v, make_config, build_layers):
    specs, layers = build_layers(make_config("encoder_ft", activation_checkpointing=mode), ti2v)
    blocks = {spec.name for spec in specs if ".block." in spec.name or spec.name.startswith("blocks.")}
    again = {spec.name for spec in specs if spec.recompute == 1.0}
    assert again == (blocks if mode in (True, "offload") else set())
    assert [layer.recompute for layer in layers] == [spec.name in blocks and mode for spec in specs]
