"""What this project saves, loaded by the programs that others use it with: diffusers and transformers."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, UMT5EncoderModel

from models.wan.checkpoint import TEXT_ENCODER_FILE, open_text_encoder
from models.wan.export import TEXT_ENCODER_CONFIG, TEXT_ENCODER_WEIGHTS, EncoderFormat, save_text_encoder
from models.wan.lora_convert import convert_lora
from models.wan.text_encoder import load_umt5, pad_token_ids
from tests.helpers.diffusers_wan import build_transformer, exact_timesteps
from utils.config.schema import BudgetConfig
from utils.errors import UserError
from utils.layers import global_names
from utils.lora import ADAPTER_WEIGHTS, load_initial_adapter, save_adapter
from utils.lora_targets import linear_modules, resolve_targets

# Of the output difference, which is itself 2 % to 19 % of the output. Measured: 0 (bit-equal) at alpha = rank and where
# alpha / rank is a power of 2, 1.9e-6 to 2.0e-6 at alpha / rank = 2.5. (With diffusers' own timesteps 4e-6 .. 2.6e-5, all of
# which is the float32 sinusoid that test_transformer.py is about.)
ADAPTER_PARITY = 1e-5
# The largest error of one number of what an adapter adds, in float32; adapters add up to 0.22 .. 0.45. Measured: A14B 0
# (bit-equal) with the exact sinusoid, 6.6e-6 with diffusers' own; 5B, with a clean first frame, 5.1e-6 and 5.8e-6; PEFT 0.
ADDED_MAX = 1e-5
CAPTIONS = ([17, 5, 40, 8, 1], [9, 1], [30, 31, 32, 33, 34, 35, 36, 37, 1])
LENS = [len(ids) for ids in CAPTIONS]
WHOLE, PART = (EncoderFormat("hf", full, Path("unused")) for full in (True, False))


@pytest.fixture
def exact_sinusoid(monkeypatch):
    """Timesteps in float64 on diffusers' side, so that adapters are compared and not the timestep's rounding."""
    monkeypatch.setattr("diffusers.models.embeddings.Timesteps.forward", exact_timesteps)


def build_pipeline(checkpoint, *, second: bool = False) -> WanPipeline:
    """diffusers' pipeline around a transformer that its own converter made of the official checkpoint."""

    def transformer() -> WanTransformer3DModel:
        state = {name: checkpoint.source.get(name).clone() for name in checkpoint.source.shapes}
        return build_transformer(checkpoint.arch, state)

    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer(),
        transformer_2=transformer() if second else None,
    )


def train_for_a_while(layers: torch.nn.Module) -> None:
    """Give every B of an adapter a value, as training does."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in layers.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def trained_parameters(specs, layers) -> dict[str, torch.Tensor]:
    """What trains, by global name, as an export gets it."""
    return {
        name: parameter.detach()
        for spec, layer in zip(specs, layers, strict=True)
        for name, parameter in global_names(spec.name, layer).items()
        if parameter.requires_grad
    }


VARIANTS = ["tiny_ti2v", "tiny_t2v", "tiny_i2v"]
ADAPTERS = {
    "the default": {},
    "alpha is not rank": {"alpha": 10.0},
    "one band of blocks": {"train_blocks_range": (1, 2)},
    "one block": {"train_blocks_range": (2, 2), "include": ("cross_attn.v",)},
    "every cross-attention and feed-forward layer": {"include": ("cross_attn.*", "ffn.*"), "alpha": 2.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("values", ADAPTERS.values(), ids=ADAPTERS)
def test_diffusers_loads_the_adapter_to_the_same_difference_of_outputs(
    variant,
    values,
    request,
    open_tiny,
    make_config,
    build_layers,
    build_reference,
    draw_wire,
    relative_error,
    exact_sinusoid,
    tmp_path,
):
    checkpoint = open_tiny(request.getfixturevalue(variant))
    # By the plain formulas, which are diffusers' to the bit. Lean ones are 2e-7 off, which is 2.3e-5 of so small a difference.
    config = make_config("dit_lora", adapter=values, model={"lean_kernels": False})
    targets = resolve_targets(linear_modules(checkpoint.source.shapes), config.adapter, BudgetConfig())
    specs, layers = build_layers(config, checkpoint, targets)
    train_for_a_while(layers)
    trained = trained_parameters(specs, layers)
    save_adapter(trained, targets, config.adapter, tmp_path, {"format": "pt"})

    states_BLD = torch.randn(3, 9, checkpoint.arch.text_dim, generator=torch.Generator().manual_seed(5))
    wire = draw_wire(checkpoint.arch, states_BLD, LENS)
    padded_BLD = F.pad(states_BLD, (0, 0, 0, checkpoint.arch.text_len - 9))
    pipeline = build_pipeline(checkpoint)

    def theirs():
        inputs = (wire.latents_BCFHW, wire.timesteps_BT[:, 0], padded_BLD)
        return pipeline.transformer(*inputs, return_dict=False)[0]

    with torch.no_grad():
        reference = build_reference(checkpoint, torch.float32, torch.float32, False)
        base = reference(wire.latents_BCFHW, wire.timesteps_BT, states_BLD)
        ours = layers(wire) - base
        without = theirs()
        pipeline.load_lora_weights(str(tmp_path / ADAPTER_WEIGHTS))
        with_adapter = theirs() - without
    adapted = [module for module in pipeline.transformer.modules() if hasattr(module, "base_layer")]
    assert len(adapted) == len(targets)
    assert ours.norm() / base.norm() > 0.01
    assert relative_error(with_adapter, ours) <= ADAPTER_PARITY


class Converted(NamedTuple):
    """An adapter file of a model, and what it adds to the model's output, by our own layers."""

    checkpoint: Any
    targets: list[str]
    saved: Path
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    added_BCFHW: torch.Tensor


@pytest.fixture(scope="module", params=VARIANTS)
def variant_root(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=["the default", "every linear layer"])
def converted(
    request, variant_root, open_tiny, make_config, build_layers, build_reference, draw_wire, tmp_path_factory
) -> Converted:
    checkpoint = open_tiny(variant_root)
    config = make_config("dit_lora", adapter={"alpha": 2.0})
    linears = linear_modules(checkpoint.source.shapes)
    targets = (
        list(linears) if request.param != "the default" else resolve_targets(linears, config.adapter, None)
    )
    specs, layers = build_layers(config, checkpoint, targets)
    train_for_a_while(layers)
    root = tmp_path_factory.mktemp("adapter")
    save_adapter(trained_parameters(specs, layers), targets, config.adapter, root, {"format": "pt"})
    states_BLD = torch.randn(3, 9, checkpoint.arch.text_dim, generator=torch.Generator().manual_seed(5))
    wire = draw_wire(checkpoint.arch, states_BLD, LENS)
    if checkpoint.arch.model_type == "ti2v":  # image-conditioned: the first of two frames is clean
        per_frame_BT = wire.timesteps_BT.repeat(1, 2)
        per_frame_BT[:, 0] = 0.0
        wire = wire._replace(timesteps_BT=per_frame_BT)
    inputs = (wire.latents_BCFHW, wire.timesteps_BT, states_BLD)
    with torch.no_grad():
        added = layers(wire) - build_reference(checkpoint)(*inputs)
    return Converted(checkpoint, targets, root / ADAPTER_WEIGHTS, inputs, added)


def their_velocity(transformer, converted: Converted) -> torch.Tensor:
    """diffusers' model; it takes one timestep per sample, or one per token (2 x 3 in each of two frames)."""
    latents, timesteps_BT, states = converted.inputs
    padded = F.pad(states, (0, 0, 0, converted.checkpoint.arch.text_len - states.shape[1]))
    timesteps = timesteps_BT[:, 0] if timesteps_BT.shape[1] == 1 else timesteps_BT.repeat_interleave(6, dim=1)
    with torch.no_grad():
        return transformer(latents, timesteps, padded, return_dict=False)[0]


@pytest.mark.parametrize("dialect", ["as saved", "comfyui", "diffusers", "kohya"])
@pytest.mark.parametrize("sinusoid", ["float64", "diffusers' own"])
def test_diffusers_adds_the_same_with_every_dialect_it_reads(
    dialect, sinusoid, converted, request, tmp_path, relative_error
):
    if sinusoid == "float64":
        request.getfixturevalue("exact_sinusoid")
    path = converted.saved
    if dialect != "as saved":
        path = tmp_path / "converted.safetensors"
        if dialect == "kohya" and len(converted.targets) < 40:
            with pytest.raises(UserError, match="is not adapted"):
                convert_lora(converted.saved, dialect, path)
            return
        convert_lora(converted.saved, dialect, path)
    pipeline = build_pipeline(converted.checkpoint)
    without = their_velocity(pipeline.transformer, converted)
    pipeline.load_lora_weights(str(path))
    added = their_velocity(pipeline.transformer, converted) - without
    adapted = [module for module in pipeline.transformer.modules() if hasattr(module, "base_layer")]
    assert len(adapted) == len(converted.targets)
    error = (added - converted.added_BCFHW).abs().max().item()
    assert converted.added_BCFHW.abs().max() > 0.01
    assert error <= ADDED_MAX


def test_peft_adds_the_same_to_the_official_model(converted, build_reference, tmp_path):
    """PEFT's files keep official names, so they are for a model under these."""
    convert_lora(converted.saved, "peft", tmp_path / "peft")
    model = build_reference(converted.checkpoint)
    with torch.no_grad():
        without = model(*converted.inputs)
        adapted = PeftModel.from_pretrained(model, tmp_path / "peft")
        added = adapted(*converted.inputs) - without
    error = (added - converted.added_BCFHW).abs().max().item()
    assert error <= ADDED_MAX


def test_each_expert_takes_its_own_adapter(tiny_t2v, open_tiny, make_config, build_layers, tmp_path):
    checkpoint = open_tiny(tiny_t2v)
    config = make_config("dit_lora")
    targets = resolve_targets(linear_modules(checkpoint.source.shapes), config.adapter, None)
    specs, layers = build_layers(config, checkpoint, targets)
    train_for_a_while(layers)
    trained = trained_parameters(specs, layers)
    save_adapter(trained, targets, config.adapter, tmp_path, {})
    pipeline = build_pipeline(checkpoint, second=True)
    pipeline.load_lora_weights(str(tmp_path / ADAPTER_WEIGHTS), load_into_transformer_2=True)
    adapted = pipeline.transformer_2.blocks[1].attn2.to_k.lora_A["default_0"].weight
    assert torch.equal(adapted, trained["blocks.1.cross_attn.k.lora_A.default.weight"])
    assert not hasattr(pipeline.transformer.blocks[1].attn2.to_k, "lora_A")


def test_our_own_files_start_a_new_training_with_the_same_output(
    tiny_ti2v, open_tiny, make_config, build_layers, draw_wire, tmp_path
):
    checkpoint = open_tiny(tiny_ti2v)
    states_BLD = torch.randn(3, 9, checkpoint.arch.text_dim)
    wire = draw_wire(checkpoint.arch, states_BLD, LENS)
    config = make_config("dit_lora", adapter={"alpha": 12.0})
    targets = resolve_targets(linear_modules(checkpoint.source.shapes), config.adapter, None)
    specs, layers = build_layers(config, checkpoint, targets)
    train_for_a_while(layers)
    trained = trained_parameters(specs, layers)
    save_adapter(trained, targets, config.adapter, tmp_path, {})
    again = make_config("dit_lora", adapter={"alpha": 1.0})
    initial = load_initial_adapter(tmp_path, targets, again.adapter)
    _, continued = build_layers(again, checkpoint, targets, initial)
    with torch.no_grad():
        # Measured: at most 2e-6; the scale sits in another factor.
        torch.testing.assert_close(continued(wire), layers(wire), rtol=0, atol=2e-5)


@pytest.fixture
def trained_encoder(tiny_ti2v, open_tiny, make_config, build_layers):
    """Layers of an encoder run of which the two upper blocks have moved, and what trained."""
    checkpoint = open_tiny(tiny_ti2v)
    config = make_config("encoder_ft", model={"text_train_blocks": 2})
    specs, layers = build_layers(config, checkpoint)
    generator = torch.Generator().manual_seed(4)
    trained = trained_parameters(specs, layers)
    for tensor in trained.values():
        tensor += torch.randn(tensor.shape, generator=generator) * 0.02
    return checkpoint, layers, trained


def states_of(layers, wire):
    for layer in layers:
        if not hasattr(wire, "text"):
            break
        states, wire = wire.text, layer(wire)
    return states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_the_encoder_to_the_same_states(
    dtype, trained_encoder, draw_wire, tmp_path, relative_error
):
    checkpoint, layers, trained = trained_encoder
    paths = save_text_encoder(trained, checkpoint.text, dtype, tmp_path, {"format": "pt"}, WHOLE)
    assert paths == [tmp_path / TEXT_ENCODER_WEIGHTS, tmp_path / TEXT_ENCODER_CONFIG]
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == ["UMT5EncoderModel"]
    tensors = load_file(tmp_path / TEXT_ENCODER_WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    theirs, report = UMT5EncoderModel.from_pretrained(
        None, config=config, state_dict=tensors, output_loading_info=True, attn_implementation="eager"
    )
    assert not report["unexpected_keys"]
    assert set(report["missing_keys"]) <= {"encoder.embed_tokens.weight"}

    ids_BL, lens_B = pad_token_ids(CAPTIONS)
    is_token = (torch.arange(ids_BL.shape[1]) < lens_B[:, None]).long()
    with torch.no_grad():
        ours = states_of(layers, draw_wire(checkpoint.arch, ids_BL, LENS))
        reference = theirs(input_ids=ids_BL, attention_mask=is_token).last_hidden_state.float()
        reference *= is_token.unsqueeze(-1)
        untrained = load_umt5(checkpoint.text, torch.float32, torch.device("cpu"), "eager")
        before = untrained(input_ids=ids_BL, attention_mask=is_token).last_hidden_state * is_token.unsqueeze(
            -1
        )
    assert relative_error(before, ours) > 0.05  # training has changed something
    # Measured 4.0e-7 and 1.1e-2: bfloat16 is the rounding of the file.
    assert relative_error(reference, ours) <= (1e-6 if dtype == torch.float32 else 2e-2)


def test_our_own_loader_takes_the_saved_encoder(trained_encoder, tmp_path):
    checkpoint, _, trained = trained_encoder
    save_text_encoder(trained, checkpoint.text, torch.float32, tmp_path, {}, WHOLE)
    source = open_text_encoder(tmp_path / TEXT_ENCODER_WEIGHTS)
    assert source.shapes == checkpoint.text.shapes
    moved = {
        name for name in source.shapes if not torch.equal(source.get(name), checkpoint.text.get(name).float())
    }
    assert moved == {
        name for name in source.shapes if name == "norm.weight" or name.startswith(("blocks.1.", "blocks.2."))
    }


def test_a_file_of_trained_tensors_alone_is_marked_as_such_by_refusal(trained_encoder, tmp_path):
    checkpoint, _, trained = trained_encoder
    save_text_encoder(trained, checkpoint.text, torch.bfloat16, tmp_path, {"seed": "3"}, PART)
    tensors = load_file(tmp_path / TEXT_ENCODER_WEIGHTS)
    assert {f"text_encoder.{name}" for name in tensors} == trained.keys()
    with pytest.raises(UserError, match="holds only a part of the encoder"):
        open_text_encoder(tmp_path / TEXT_ENCODER_WEIGHTS)


def test_the_encoders_description_is_of_its_sizes(trained_encoder, tmp_path):
    checkpoint, _, trained = trained_encoder
    save_text_encoder(trained, checkpoint.text, torch.bfloat16, tmp_path, {}, PART)
    config = json.loads((tmp_path / TEXT_ENCODER_CONFIG).read_text())
    expected = {"model_type": "umt5", "d_model": 64, "num_layers": 3, "num_heads": 4, "vocab_size": 384}
    assert expected.items() <= config.items()
    assert config["feed_forward_proj"] == "gated-gelu"
    assert TEXT_ENCODER_FILE not in str(config)
