"""`transformer_dtype = "float8"` on the small DiT: what is stored how, how far off it is, and ComfyUI's scaled files."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.wan.checkpoint import open_sharded, open_transformer
from models.wan.preflight import preflight
from models.wan.probes.base import open_official
from utils.errors import UserError
from utils.frozen_linear import FP8, FrozenLinear, quantise
from utils.layers import global_names
from utils.lora import parameter_names
from utils.scaled_source import ScaledSource

TARGETS = ["blocks.0.cross_attn.k", "blocks.2.cross_attn.v"]
FLOAT8 = {"dtype": "bfloat16", "transformer_dtype": "float8"}
PRODUCTS = FLOAT8 | {"transformer_compute": "float8"}


@pytest.fixture
def ti2v(tiny_ti2v, open_tiny):
    return open_tiny(tiny_ti2v)


def run(layers, wire):
    """Velocity, and the gradient of its square with respect to the text."""
    text = wire.text.clone().requires_grad_()
    velocity = layers(wire._replace(text=text))
    (gradient,) = torch.autograd.grad(velocity.square().mean(), text)
    return velocity.detach(), gradient


def test_only_weights_of_linear_layers_in_blocks_are_in_8_bits(ti2v, make_config, build_layers):
    specs, layers = build_layers(make_config("dit_lora", model=FLOAT8), ti2v, TARGETS)
    in_8_bits = {
        f"{spec.name}.{path.removeprefix('inner.').removesuffix('.base_layer')}"
        for spec, layer in zip(specs, layers, strict=True)
        for path, module in layer.named_modules()
        if isinstance(module, FrozenLinear)
    }
    expected = {
        name.removesuffix(".weight")
        for name, shape in ti2v.source.shapes.items()
        if name.startswith("blocks.") and len(shape) == 2
    }
    assert in_8_bits == expected and len(expected) == 4 * 10
    parameters = {
        name: value
        for spec, layer in zip(specs, layers, strict=True)
        for name, value in global_names(spec.name, layer).items()
    }
    adapters = {name for target in TARGETS for name in parameter_names(target)}
    assert {name for name, value in parameters.items() if value.requires_grad} == adapters
    assert {parameters[name].dtype for name in adapters} == {torch.float32}
    for name in ("modulation", "norm3.weight", "self_attn.norm_q.weight"):
        assert parameters[f"blocks.1.{name}"].dtype == torch.float32
    assert parameters["text_embedding.0.weight"].dtype == torch.bfloat16
    assert parameters["head.head.weight"].dtype == torch.float32
    stored = [buffer for layer in layers for name, buffer in layer.named_buffers() if name.endswith("values")]
    assert {buffer.dtype for buffer in stored} == {FP8}
    weights = sum(buffer.nbytes for buffer in stored)
    assert weights == sum(
        shape[0] * shape[1] for n, shape in ti2v.source.shapes.items() if n[:-7] in expected
    )


def test_the_error_against_bfloat16(
    ti2v, make_config, build_layers, build_reference, draw_wire, relative_error
):
    """Measured against float32: velocity 0.033 (bfloat16: 0.0046), gradient of the text 0.109 (0.020); with
    products in 8 bits too 0.046 and 0.143.
    """
    states = torch.randn(2, 9, ti2v.arch.text_dim, generator=torch.Generator().manual_seed(3))
    wire = draw_wire(ti2v.arch, states, [9, 5])
    errors = {}
    exact = run(build_layers(make_config("dit_lora"), ti2v, TARGETS)[1], wire)
    for name, model in (("bfloat16", {"dtype": "bfloat16"}), ("float8", FLOAT8), ("products", PRODUCTS)):
        found = run(build_layers(make_config("dit_lora", model=model), ti2v, TARGETS)[1], wire)
        errors[name] = [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
    print(errors)
    assert errors["float8"][0] < 0.045 and errors["float8"][1] < 0.15
    # 3 bits instead of 7: about 2^4 times the error at most, and not less than bfloat16's own.
    assert all(b < f < 16 * b for b, f in zip(errors["bfloat16"], errors["float8"], strict=True))
    # Both sides of a product round alike and independently.
    assert all(f < p < 2 * f for f, p in zip(errors["float8"], errors["products"], strict=True))


def test_the_plan_counts_one_byte_per_weight(ti2v, make_config, build_layers):
    def weights(**model):
        specs, _ = build_layers(make_config("dit_lora", model=model), ti2v, TARGETS)
        return specs[2].memory.weights

    half, eighth = weights(dtype="bfloat16"), weights(**FLOAT8)
    large = 8 * 128 * 128 + 2 * 128 * 256
    scales = 4 * (8 * 128 + 256 + 128)
    assert half - eighth == large - scales


def test_the_plan_counts_what_is_really_there(ti2v, make_config, build_layers):
    """Weights on the device, per layer, in every way of storing them; `slot` and host memory of those that visit."""
    for model in ({"dtype": "float32"}, {"dtype": "bfloat16"}, FLOAT8):
        for swap in (0, 3):
            config = make_config("dit_lora", model=model, blocks_to_swap=swap)
            specs, layers = build_layers(config, ti2v, TARGETS)
            for spec, layer in zip(specs, layers, strict=True):
                tensors = [*layer.parameters(), *layer.buffers()]
                assert spec.memory.weights == sum(tensor.nbytes for tensor in tensors), (spec.name, model)
            visiting = [spec.memory for spec in specs if spec.memory.slot]
            assert len(visiting) == swap
            assert all(memory.host_weights == memory.slot > 100_000 for memory in visiting)


# ---------------------------------------------------------------------- files that are scaled already


def write_scaled(root, out, *, mark=True, drop="", fp8=torch.float8_e4m3fn):
    """The DiT of `root` as ComfyUI writes it: every 2-D weight in float8 with a scale, in one file."""
    source = open_sharded(root)
    tensors = {"scaled_fp8": torch.zeros(0, dtype=fp8)} if mark else {}
    for name in source.shapes:
        tensor = source.get(name)
        if tensor.dim() == 2 and name.endswith(".weight"):
            scale = tensor.abs().max() / 448
            tensors[name] = (tensor / scale).to(fp8)
            tensors[name.removesuffix(".weight") + ".scale_weight"] = scale
            tensors[name.removesuffix(".weight") + ".scale_input"] = torch.ones(())
        else:
            tensors[name] = tensor.half()
    save_file({name: tensor for name, tensor in tensors.items() if name != drop or not drop}, out)
    shutil.copy(root / "config.json", out.parent)
    return out


@pytest.fixture
def scaled(tiny_ti2v, tmp_path):
    return write_scaled(tiny_ti2v, tmp_path / "dit_fp8_scaled.safetensors")


def test_a_scaled_file_is_read_with_its_scales(scaled, ti2v):
    source, original = open_transformer(scaled), ti2v.source
    assert isinstance(source, ScaledSource)
    assert source.shapes == dict(sorted(original.shapes.items())) or set(source.shapes) == set(
        original.shapes
    )
    raw = load_file(scaled)
    for name in original.shapes:
        value = source.get(name)
        if f"{name.removesuffix('.weight')}.scale_weight" in raw:
            assert value.dtype == torch.float32
            assert (value - original.get(name)).norm() / original.get(name).norm() < 0.03
            # Without the scale it would be off by a factor of thousands.
            assert raw[name].float().norm() / original.get(name).norm() > 100
        else:
            torch.testing.assert_close(value.float(), original.get(name), rtol=1e-3, atol=1e-4)


def test_training_starts_from_a_scaled_file(scaled, tiny_ti2v, make_config, ti2v, build_layers, draw_wire):
    config = make_config("dit_lora", model={"ckpt_path": str(tiny_ti2v), "transformer_path": str(scaled)})
    assert preflight(config) == []
    states = torch.randn(2, 9, ti2v.arch.text_dim, generator=torch.Generator().manual_seed(3))
    wire = draw_wire(ti2v.arch, states, [9, 5])
    plain = run(build_layers(config, ti2v, TARGETS)[1], wire)[0]
    found = run(build_layers(config, ti2v._replace(source=open_transformer(scaled)), TARGETS)[1], wire)[0]
    assert 1e-3 < (found - plain).norm() / plain.norm() < 0.1  # measured 0.043


def test_float8_takes_the_values_of_a_scaled_file_as_they_are(scaled, ti2v, make_config, build_layers):
    checkpoint = ti2v._replace(source=open_transformer(scaled))
    _, layers = build_layers(make_config("dit_lora", model=FLOAT8), checkpoint, TARGETS)
    linear = layers[1].inner.ffn[0]
    raw = load_file(scaled)
    assert torch.equal(linear.values.view(torch.uint8), raw["blocks.0.ffn.0.weight"].view(torch.uint8))
    assert torch.equal(linear.scale, raw["blocks.0.ffn.0.scale_weight"].expand(256, 1))
    again = quantise(checkpoint.source.get("blocks.0.ffn.0.weight"))[0]
    assert not torch.equal(again.view(torch.uint8), linear.values.view(torch.uint8))


def test_a_scaled_file_in_the_other_format_is_read_too(tiny_ti2v, tmp_path, ti2v, make_config, build_layers):
    path = write_scaled(tiny_ti2v, tmp_path / "e5m2.safetensors", fp8=torch.float8_e5m2)
    source, original = open_transformer(path), ti2v.source.get("blocks.0.ffn.0.weight")
    assert (source.get("blocks.0.ffn.0.weight") - original).norm() / original.norm() < 0.06
    assert source.stored_in_8_bits("blocks.0.ffn.0.weight") is None  # another format than is computed with
    _, layers = build_layers(make_config("dit_lora", model=FLOAT8), ti2v._replace(source=source), TARGETS)
    assert layers[1].inner.ffn[0].values.dtype == FP8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "blocks.1.ffn.0.scale_weight"}, r"blocks\.1\.ffn\.0\.weight is in 8 bits without a scale"),
        ({"drop": "blocks.1.ffn.0.weight"}, r"has blocks\.1\.ffn\.0\.scale_weight but no blocks\.1"),
    ],
)
def test_a_scaled_file_that_lacks_something_is_refused_by_name(change, message, tiny_ti2v, tmp_path):
    path = write_scaled(tiny_ti2v, tmp_path / "broken.safetensors", **change)
    with pytest.raises(UserError, match=rf"broken\.safetensors: .*{message}"):
        open_transformer(path)


def test_scales_per_channel_are_refused_and_not_guessed(scaled):
    tensors = load_file(scaled)
    tensors["blocks.1.ffn.0.scale_weight"] = torch.ones(256)
    save_file(tensors, scaled)
    with pytest.raises(UserError, match=r"scale_weight has the shape \[256\]"):
        open_transformer(scaled)


def test_scales_count_also_without_the_mark(tiny_ti2v, scaled, tmp_path, make_config):
    path = write_scaled(tiny_ti2v, tmp_path / "unmarked.safetensors", mark=False)
    config = make_config("dit_lora", model={"ckpt_path": str(tiny_ti2v), "transformer_path": str(path)})
    assert preflight(config) == []
    unmarked, marked = open_transformer(path), open_transformer(scaled)
    assert unmarked.shapes == marked.shapes
    assert all(torch.equal(unmarked.get(name), marked.get(name)) for name in marked.shapes)


def test_a_prefix_is_no_hindrance(scaled, tmp_path, tiny_ti2v, make_config):
    path = tmp_path / "prefixed.safetensors"
    save_file({f"model.diffusion_model.{name}": one for name, one in load_file(scaled).items()}, path)
    config = make_config("dit_lora", model={"ckpt_path": str(tiny_ti2v), "transformer_path": str(path)})
    assert preflight(config) == []
    plain, prefixed = open_transformer(scaled), open_transformer(path)
    assert prefixed.shapes == plain.shapes and prefixed.files == (path,)
    for name in plain.shapes:
        assert torch.equal(prefixed.get(name), plain.get(name))
        mine, theirs = prefixed.stored_in_8_bits(name), plain.stored_in_8_bits(name)
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert all(torch.equal(a.float(), b.float()) for a, b in zip(mine, theirs, strict=True))


def test_scales_of_another_kind_are_refused_and_not_left_out(tiny_ti2v, tmp_path, make_config):
    path = write_scaled(tiny_ti2v, tmp_path / "other.safetensors", mark=False)
    tensors = {
        name.replace(".scale_weight", ".weight_scale"): tensor
        for name, tensor in load_file(path).items()
        if not name.endswith(".scale_input")
    }
    save_file(tensors, path)
    config = make_config("dit_lora", model={"ckpt_path": str(tiny_ti2v), "transformer_path": str(path)})
    (problem,) = preflight(config)
    assert problem.key == "model.transformer_path"
    assert "with a scale of a kind that is not known here (blocks." in problem.reason
    with pytest.raises(UserError, match=r"weight_scale\).*give the bf16 or fp16 file"):
        open_official(path)  # as the probes do


def test_8_bits_without_any_scale_are_refused_with_what_to_give(tiny_ti2v, tmp_path, make_config):
    path = write_scaled(tiny_ti2v, tmp_path / "bare.safetensors", mark=False)
    save_file({name: one for name, one in load_file(path).items() if ".scale_" not in name}, path)
    config = make_config("dit_lora", model={"ckpt_path": str(tiny_ti2v), "transformer_path": str(path)})
    (problem,) = preflight(config)
    assert "is stored as F8_E4M3 without a scale (and" in problem.reason
    assert "give the bf16 or fp16 file, or one in ComfyUI's fp8_scaled format" in problem.reason
