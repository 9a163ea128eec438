"""Merged weights against the formed sum, in every layout of the base; nothing else of it changes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.wan.checkpoint import open_transformer
from models.wan.lora_dialects import to_dialect
from models.wan.lora_merge import merge_lora
from models.wan.names import dit_to_diffusers
from scripts import merge_lora as script
from utils.errors import UserError
from utils.lora_names import AdapterPair
from utils.safetensors_stream import SafetensorsStream

TARGETS = ["blocks.0.cross_attn.k", "blocks.1.cross_attn.v", "blocks.1.ffn.0"]


def make_adapter(path, source, targets=TARGETS, scale=0.5, size=0.1):
    random = torch.Generator().manual_seed(0)
    made = {}
    for module in targets:
        outs, ins = source.shapes[f"{module}.weight"][:2]
        down, up = torch.randn(4, ins, generator=random), size * torch.randn(outs, 4, generator=random)
        made[module] = AdapterPair(down, up, scale, "alpha")
    tensors = to_dialect(made, "comfyui").tensors
    save_file(tensors, path)
    return made


def content(source):
    return {name: source.get(name) for name in source.shapes}


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_every_tensor_is_the_sum_or_what_it_was(tmp_path, tiny_ti2v, strength):
    base = open_transformer(tiny_ti2v)
    made = make_adapter(tmp_path / "a.safetensors", base)
    said = []
    merge_lora(tmp_path / "a.safetensors", tiny_ti2v, tmp_path / "out", strength=strength, say=said.append)
    merged = open_transformer(tmp_path / "out")
    assert [path.name for path in merged.files] == [path.name for path in base.files] and len(said) == len(
        base.files
    )
    assert merged.dtypes == base.dtypes and list(merged.shapes.items()) == list(base.shapes.items())
    assert (tmp_path / "out" / "config.json").read_bytes() == (tiny_ti2v / "config.json").read_bytes()
    changed = 0
    for name, tensor in content(base).items():
        module = name.removesuffix(".weight")
        if module not in made:
            assert torch.equal(merged.get(name), tensor)
            continue
        changed += 1
        pair = made[module]
        exact = tensor.double() + strength * 0.5 * pair.up.double() @ pair.down.double()
        # One rounding to the stored dtype: half a unit in the last place, and the float32 sum before it.
        bound = exact.abs() * (2**-9 if tensor.dtype == torch.bfloat16 else 2**-22) + 1e-6
        assert ((merged.get(name).double() - exact).abs() <= bound).all()
    assert changed == len(TARGETS)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_another_dtype(tmp_path, tiny_ti2v, dtype):
    make_adapter(tmp_path / "a.safetensors", open_transformer(tiny_ti2v))
    merge_lora(tmp_path / "a.safetensors", tiny_ti2v, tmp_path / "out", dtype=dtype)
    tensors = content(open_transformer(tmp_path / "out"))
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}


def test_what_was_merged_can_be_taken_out_again(tmp_path, tiny_ti2v):
    base = open_transformer(tiny_ti2v)
    make_adapter(tmp_path / "a.safetensors", base)
    merge_lora(tmp_path / "a.safetensors", tiny_ti2v, tmp_path / "in", dtype="float32")
    merge_lora(tmp_path / "a.safetensors", tmp_path / "in", tmp_path / "out", dtype="float32", strength=-1.0)
    back = open_transformer(tmp_path / "out")
    for name, tensor in content(base).items():
        assert torch.allclose(back.get(name), tensor.float(), atol=1e-6)


def test_single_files_of_comfyui_and_diffusers_and_in_scaled_8_bits(tmp_path, tiny_ti2v):
    base = open_transformer(tiny_ti2v)
    made = make_adapter(tmp_path / "a.safetensors", base)
    plain = {name: tensor.float() for name, tensor in content(base).items()}
    layouts = {
        "comfyui": {f"model.diffusion_model.{name}": tensor for name, tensor in plain.items()},
        "diffusers": {dit_to_diffusers(name): tensor for name, tensor in plain.items()},
    }
    scaled = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in plain.items():
        is_scaled = name.removesuffix(".weight") in TARGETS
        scaled[name] = (tensor / 0.25).to(torch.float8_e4m3fn) if is_scaled else tensor.clone()
        if is_scaled:
            scaled[name.removesuffix(".weight") + ".scale_weight"] = torch.tensor(0.25)
    for kind, tensors in (layouts | {"scaled": scaled}).items():
        save_file(tensors, tmp_path / f"{kind}.safetensors", {"kept": "yes"})
        merge_lora(
            tmp_path / "a.safetensors", tmp_path / f"{kind}.safetensors", tmp_path / f"{kind}_out.safetensors"
        )
        merged = load_file(tmp_path / f"{kind}_out.safetensors")
        wanted = {name for name in tensors if "scale" not in name or name.endswith("scale_shift_table")}
        assert merged.keys() == wanted
        rename = {"comfyui": "model.diffusion_model.{}".format, "diffusers": dit_to_diffusers, "scaled": str}[
            kind
        ]
        for module, pair in made.items():
            before = plain[f"{module}.weight"]
            if kind == "scaled":
                before = scaled[f"{module}.weight"].float() * 0.25
            exact = before + 0.5 * pair.up @ pair.down
            found = merged[rename(f"{module}.weight")]
            assert found.dtype == (torch.bfloat16 if kind == "scaled" else torch.float32)
            assert torch.allclose(found.float(), exact, rtol=2**-8 if kind == "scaled" else 1e-5, atol=1e-6)


def test_bad_input(tmp_path, tiny_ti2v, tiny_t2v, capsys):
    base = open_transformer(tiny_ti2v)
    adapter = tmp_path / "a.safetensors"
    make_adapter(adapter, base)
    arguments = [str(adapter), "--base", str(tiny_ti2v), "--out", str(tmp_path / "out")]
    assert script.main(arguments) == 0 and "merged: " in capsys.readouterr().out
    assert script.main(arguments) == 2 and "exists already" in capsys.readouterr().err
    new = ["--out", str(tmp_path / "new")]
    assert script.main([str(adapter), "--base", str(tiny_t2v), *new]) == 2
    assert "--expert" in capsys.readouterr().err
    assert script.main([str(adapter), "--base", str(tiny_ti2v), *new, "--strength", "nan"]) == 2
    assert "finite" in capsys.readouterr().err
    assert script.main([*arguments[:3], "--out", str(tmp_path / "new.safetensors")]) == 2
    assert "--out names a directory too" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    for name in ("config.toml", "metrics.jsonl"):
        (tmp_path / "run" / name).touch()
    assert script.main([*arguments[:3], "--out", str(tmp_path / "run" / "new")]) == 2
    assert "lies in the training run" in capsys.readouterr().err
    assert script.main([*arguments[:3], "--out", "/proc/new"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    make_adapter(adapter, base, size=1e6)
    assert script.main([str(adapter), "--base", str(tiny_ti2v), *new, "--dtype", "float16"]) == 2
    assert "leaves the range of torch.float16" in capsys.readouterr().err
    assert not (tmp_path / "new").exists() and not [
        path for path in tmp_path.iterdir() if "tmp" in path.suffix
    ]


def test_an_adapter_of_an_expert_goes_into_that_one(tmp_path, tiny_t2v, capsys):
    low = open_transformer(tiny_t2v / "low_noise_model")
    adapter = tmp_path / "a.safetensors"
    make_adapter(adapter, low)
    save_file(load_file(adapter), adapter, {"expert": "low_noise"})
    assert script.main([str(adapter), "--base", str(tiny_t2v), "--out", str(tmp_path / "out")]) == 0
    untouched = "blocks.0.cross_attn.q.weight"
    assert torch.equal(open_transformer(tmp_path / "out").get(untouched), low.get(untouched))
    more = ["--expert", "high_noise", "--out", str(tmp_path / "high")]
    assert script.main([str(adapter), "--base", str(tiny_t2v), *more]) == 2
    assert "for the low_noise expert, and would be merged into the high_noise one" in capsys.readouterr().err
    named = ["--base", str(tiny_t2v / "high_noise_model"), "--out", str(tmp_path / "high")]
    assert script.main([str(adapter), *named]) == 2
    assert "would be merged into the high_noise one" in capsys.readouterr().err
    assert not (tmp_path / "high").exists()


def test_a_stream_takes_what_its_header_promises_and_nothing_else(tmp_path):
    shapes, dtypes = {"a": (2, 3), "b": ()}, {"a": "F32", "b": "BF16"}
    one, other = torch.arange(6.0).view(2, 3), torch.tensor(0.5, dtype=torch.bfloat16)
    with SafetensorsStream(tmp_path / "x.safetensors", shapes, dtypes, {"k": "ü"}) as stream:
        stream.write("a", one.T.contiguous().T)
        stream.write("b", other)
    loaded = load_file(tmp_path / "x.safetensors")
    assert torch.equal(loaded["a"], one) and torch.equal(loaded["b"], other)
    with (
        pytest.raises(ValueError, match="was not written"),
        SafetensorsStream(tmp_path / "y", shapes, dtypes) as stream,
    ):
        stream.write("a", one)
    with (
        pytest.raises(ValueError, match="comes where"),
        SafetensorsStream(tmp_path / "y", shapes, dtypes) as stream,
    ):
        stream.write("b", other)


def test_the_index_names_what_is_there(tmp_path, tiny_ti2v):
    make_adapter(tmp_path / "a.safetensors", open_transformer(tiny_ti2v))
    merge_lora(tmp_path / "a.safetensors", tiny_ti2v, tmp_path / "out")
    (index,) = (tmp_path / "out").glob("*.index.json")
    (original,) = tiny_ti2v.glob("*.index.json")
    assert json.loads(index.read_text())["weight_map"] == json.loads(original.read_text())["weight_map"]
    with pytest.raises(UserError):
        merge_lora(tmp_path / "a.safetensors", tmp_path / "nothing", tmp_path / "out2")
