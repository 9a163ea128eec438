"""The wires and layers of the pipeline: padding, recomputation, dropout, and where gradients go."""

import pytest
import torch
from torch import Tensor

from models.wan.checkpoint import text_encoder_sizes
from models.wan.stages import DitBlockLayer, DitWire, TextBlockLayer, TextNormLayer, TextWire
from models.wan.text_encoder import build_umt5_block, build_umt5_norm, pad_token_ids, umt5_config
from utils.layers import global_names

CAPTIONS = ([17, 5, 40, 8, 1], [9, 1], [30, 31, 32, 33, 34, 35, 36, 37, 1])
LENS = [len(ids) for ids in CAPTIONS]
TARGETS = ["blocks.1.cross_attn.k", "blocks.1.cross_attn.v"]


@pytest.fixture
def ti2v(tiny_ti2v, open_tiny):
    return open_tiny(tiny_ti2v)


@pytest.fixture
def token_wire(ti2v, draw_wire) -> TextWire:
    return draw_wire(ti2v.arch, pad_token_ids(CAPTIONS)[0], LENS)


@pytest.fixture
def state_wire(ti2v, draw_wire) -> TextWire:
    states_BLD = torch.randn(3, max(LENS), ti2v.arch.text_dim, generator=torch.Generator().manual_seed(5))
    return draw_wire(ti2v.arch, states_BLD, LENS)


def umt5_config_of(checkpoint, dropout: float = 0.0):
    return umt5_config(text_encoder_sizes(checkpoint.text.shapes), "sdpa", dropout)


def randomise_adapters(layers: torch.nn.Module) -> None:
    """Give every B of an adapter a value, as after some steps."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in layers.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def run_with_gradients(layers: torch.nn.Sequential, wire: TextWire) -> tuple[Tensor, dict[str, Tensor]]:
    velocity = layers(wire)
    velocity.square().sum().backward()
    gradients = {
        name: parameter.grad for name, parameter in layers.named_parameters() if parameter.grad is not None
    }
    return velocity.detach(), gradients


def test_the_loss_reaches_the_first_text_block_through_a_frozen_dit(
    ti2v, make_config, build_layers, token_wire
):
    specs, layers = build_layers(make_config("encoder_ft", model={"text_train_blocks": 2}), ti2v)
    run_with_gradients(layers, token_wire)
    for spec, layer in zip(specs, layers, strict=True):
        for name, parameter in global_names(spec.name, layer).items():
            if spec.trainable:
                assert parameter.grad.isfinite().all(), name
                assert parameter.grad.abs().max() > 0, name
            else:
                assert parameter.grad is None, name


def test_the_loss_reaches_the_adapters_and_nothing_else(ti2v, make_config, build_layers, state_wire):
    _, layers = build_layers(make_config("dit_lora"), ti2v, TARGETS)
    _, gradients = run_with_gradients(layers, state_wire)
    assert len(gradients) == 4
    # B is zero, so only B has a gradient at the first step.
    assert {name: bool(gradient.any()) for name, gradient in gradients.items()} == {
        name: "lora_B" in name for name in gradients
    }


def test_nothing_behind_a_captions_end_reaches_the_dit(ti2v, make_config, build_layers, token_wire):
    _, layers = build_layers(make_config("encoder_ft"), ti2v)
    expected, expected_gradients = run_with_gradients(layers, token_wire)
    layers.zero_grad()
    ids_BL = token_wire.text.clone()
    for row, length in enumerate(LENS):
        ids_BL[row, length:] = 200
    velocity, gradients = run_with_gradients(layers, token_wire._replace(text=ids_BL))
    assert torch.equal(velocity, expected)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected_gradients.items())
    # That a token inside the caption would be seen:
    ids_BL[0, 0] = 200
    assert not torch.equal(layers(token_wire._replace(text=ids_BL)), expected)


def test_text_behind_the_norm_is_zero_where_there_is_no_token(ti2v, draw_wire):
    config = umt5_config_of(ti2v)
    layer = TextNormLayer(build_umt5_norm(config))
    states_BLD = torch.randn(3, 9, config.d_model)
    text = layer(draw_wire(ti2v.arch, states_BLD, LENS)).text
    for row, length in enumerate(LENS):
        assert not text[row, length:].any()
        assert text[row, :length].abs().min() > 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mode", ["encoder_ft", "dit_lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputed_activations_give_the_same_gradients_bit_for_bit(
    mode, dropout, dtype, ti2v, make_config, build_layers, token_wire, state_wire
):
    results = []
    for recompute in (False, True):
        model = {"dtype": dtype}
        if mode == "encoder_ft":
            config = make_config(
                mode, model=model | {"text_encoder_dropout": dropout}, activation_checkpointing=recompute
            )
            _, layers = build_layers(config, ti2v)
            wire = token_wire
        else:
            config = make_config(
                mode, model=model, adapter={"dropout": dropout}, activation_checkpointing=recompute
            )
            _, layers = build_layers(config, ti2v, TARGETS)
            randomise_adapters(layers)
            wire = state_wire
        results.append(run_with_gradients(layers.train(), wire))
    (velocity, gradients), (again, gradients_again) = results
    assert torch.equal(velocity, again)
    assert gradients.keys() == gradients_again.keys() != set()
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


def test_recomputing_stores_less(ti2v, make_config, build_layers, state_wire):
    def stored_elements(recompute: bool) -> int:
        _, layers = build_layers(make_config("dit_lora", activation_checkpointing=recompute), ti2v, TARGETS)
        stored = []

        def pack(tensor: Tensor) -> Tensor:
            stored.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layers(state_wire)
        return sum(stored)

    assert stored_elements(True) < stored_elements(False) / 2


def text_block(ti2v, name: str, recompute: bool = False) -> TextBlockLayer:
    """A text block with dropout; its weights are the same at each call."""
    torch.manual_seed(0)
    block = build_umt5_block(umt5_config_of(ti2v, 0.4), 0)
    return TextBlockLayer(block, name, torch.float32, recompute, 0.4).train()


def test_dropout_is_a_function_of_the_wires_seed_and_the_layers_name(ti2v, draw_wire):
    states_BLD = torch.randn(3, 9, ti2v.arch.text_dim, generator=torch.Generator().manual_seed(5))
    wire = draw_wire(ti2v.arch, states_BLD, LENS, seed=11)

    def run(name: str = "block.0", seed: int = 11, recompute: bool = False) -> Tensor:
        layer = text_block(ti2v, name, recompute)
        torch.manual_seed(len(name) * seed + recompute)  # what others drew before must not matter
        return layer(wire._replace(seed=torch.tensor([seed]))).text

    reference = run()
    assert torch.equal(run(), reference)
    assert torch.equal(run(recompute=True), reference)
    assert not torch.equal(run(name="block.1"), reference)
    assert not torch.equal(run(seed=12), reference)
    kept = text_block(ti2v, "block.0").eval()(wire).text
    assert not torch.equal(kept, reference)


def test_dropout_leaves_the_global_generator_as_it_was(ti2v, draw_wire):
    layer = text_block(ti2v, "block.0")
    wire = draw_wire(ti2v.arch, torch.randn(3, 9, ti2v.arch.text_dim), LENS)
    before = torch.get_rng_state()
    layer(wire)
    assert torch.equal(torch.get_rng_state(), before)


def test_adapter_dropout_is_a_function_of_the_wires_seed(ti2v, make_config, build_layers, state_wire):
    config = make_config("dit_lora", adapter={"dropout": 0.5})
    _, layers = build_layers(config, ti2v, TARGETS)
    randomise_adapters(layers)
    layers.train()
    first = layers(state_wire)
    torch.manual_seed(99)
    assert torch.equal(layers(state_wire), first)
    assert not torch.equal(layers(state_wire._replace(seed=torch.tensor([1]))), first)


def test_a_block_whose_masks_differ_is_seen_by_name(ti2v, make_config, build_layers, state_wire):
    """Two DiT blocks with the same adapter and seed but other names draw other masks."""
    config = make_config("dit_lora", adapter={"dropout": 0.5})
    _, layers = build_layers(config, ti2v, TARGETS)
    randomise_adapters(layers)
    wire = layers[0](state_wire)
    inner = layers[2].inner.train()
    assert isinstance(wire, DitWire)
    one, other = (
        DitBlockLayer(inner, name, False, 0.5)(wire).hidden_BFHWD for name in ("blocks.1", "blocks.2")
    )
    assert not torch.equal(one, other)


def test_blocks_pass_on_what_is_not_theirs(ti2v, make_config, build_layers, token_wire):
    _, layers = build_layers(make_config("encoder_ft"), ti2v)
    wire = token_wire
    for layer in layers[:-1]:
        before, wire = wire, layer(wire)
        if type(before) is type(wire):
            changed = {name for name in wire._fields if getattr(wire, name) is not getattr(before, name)}
            assert changed <= {"text", "hidden_BFHWD"}
    assert wire.modulation_BT6D.dtype == wire.time_BTD.dtype == torch.float32
    assert torch.equal(wire.seed, token_wire.seed)
