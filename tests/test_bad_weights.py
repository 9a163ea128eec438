"""Weights that are not what a configuration needs: one clear message each, before anything is computed or written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.wan.checkpoint import TEXT_ENCODER_FILE, open_text_encoder, open_transformer, open_vae
from models.wan.names import umt5_to_hf
from tests.helpers.layouts import tensors_of, vae_place, write_diffusers
from tests.helpers.workspace import Workspace, check_refused, linked_copy, make_workspace

UNKNOWN_PREFIX = "wrapped.model."


@pytest.fixture
def workspace(tmp_path, tiny_ti2v, tiny_dataset) -> Workspace:
    return make_workspace(tmp_path, linked_copy(tiny_ti2v, tmp_path / "checkpoint"), tiny_dataset)


@pytest.fixture
def refused(workspace, capsys) -> Callable[..., str]:
    """`refused(overrides, *expected)`: a run ends in one message with one problem, and leaves nothing."""

    def check(overrides: dict[str, object], *expected: str, mode: str = "dit_lora") -> str:
        code = workspace.train(mode, *(f"{key}={value}" for key, value in overrides.items()))
        said = capsys.readouterr().err
        check_refused(code, said, ": 1 problem\n", *expected)
        assert workspace.runs() == [] and workspace.leftovers() == []
        return said

    return check


@pytest.fixture
def encoder(tiny_ti2v) -> dict[str, torch.Tensor]:
    """The tiny encoder under Hugging Face names."""
    source = open_text_encoder(tiny_ti2v / TEXT_ENCODER_FILE)
    return {umt5_to_hf(name): tensor for name, tensor in tensors_of(source).items()}


def test_a_whole_t5_with_its_decoder(refused, encoder, tmp_path):
    decoder = {
        name.replace("encoder.", "decoder."): tensor.clone()
        for name, tensor in encoder.items()
        if name.startswith("encoder.")
    }
    path = tmp_path / "t5.safetensors"
    save_file(encoder | decoder | {"lm_head.weight": torch.zeros(384, 64)}, path)
    refused({"model.llm_path": path}, f"{path}: ", "a T5 with its decoder; Wan uses the encoder alone")


@pytest.mark.parametrize(
    ("key", "what"), [("llm_path", "a UMT5 encoder"), ("vae_path", "a VAE"), ("transformer_path", "a DiT")]
)
def test_names_with_a_prefix_that_is_not_known(refused, tiny_ti2v, tmp_path, key, what):
    sources = {
        "llm_path": lambda: open_text_encoder(tiny_ti2v / TEXT_ENCODER_FILE),
        "vae_path": lambda: open_vae(vae_place(tiny_ti2v)),
        "transformer_path": lambda: open_transformer(tiny_ti2v),
    }
    tensors = tensors_of(sources[key]())
    path = tmp_path / "wrapped.safetensors"
    save_file({UNKNOWN_PREFIX + name: tensor for name, tensor in tensors.items()}, path)
    said = refused({f"model.{key}": path}, f"{path}: is not {what}", f"stands '{UNKNOWN_PREFIX}', a prefix")
    assert "model.diffusion_model." in said  # the known ones are named


def test_8_bits_without_scales(refused, tiny_ti2v, tmp_path):
    tensors = {
        name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor
        for name, tensor in tensors_of(open_transformer(tiny_ti2v)).items()
    }
    path = tmp_path / "fp8.safetensors"
    save_file(tensors, path)
    refused({"model.transformer_path": path}, "F8_E4M3 without a scale", "give the bf16 or fp16 file")


def test_an_encoder_in_8_bits(refused, encoder, tmp_path):
    path = tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    scaled = {
        name: one.to(torch.float8_e4m3fn) if "SelfAttention.q" in name else one
        for name, one in encoder.items()
    }
    save_file(scaled, path)
    refused({"model.llm_path": path}, f"{path}: is quantised to fp8", "give the bf16 or fp16 file")


def test_what_is_no_encoder_at_all(refused, workspace, tiny_ti2v, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("a red circle\n")
    adapter = tmp_path / "adapter_model.safetensors"
    save_file(
        {f"diffusion_model.blocks.0.cross_attn.k.lora_{part}.weight": torch.zeros(2, 2) for part in "AB"},
        adapter,
    )
    for path, expected in (
        (vae_place(tiny_ti2v), "is not a UMT5 encoder of Wan 2.2: it is a VAE"),
        (tiny_ti2v, "is not a UMT5 encoder of Wan 2.2: it is a DiT"),
        (adapter, "is not a UMT5 encoder of Wan 2.2: it is a LoRA adapter"),
        (text, "not a weight file that can be read here; give a .safetensors or .pth file"),
        (workspace.media, "holds no .safetensors files"),
    ):
        if path == tiny_ti2v:  # its own encoder would be found in it
            path = Path(shutil.copytree(tiny_ti2v, tmp_path / "dit", ignore=lambda *_: [TEXT_ENCODER_FILE]))
        refused({"model.llm_path": path}, f"model.llm_path: {path}: {expected}")


def test_a_wan_21_image_model(refused, tiny_ti2v, tmp_path):
    tensors = tensors_of(open_transformer(tiny_ti2v))
    for index in range(4):
        tensors[f"blocks.{index}.cross_attn.k_img.weight"] = torch.zeros(2, 2)
    path = tmp_path / "wan21.safetensors"
    save_file(tensors, path)
    refused({"model.transformer_path": path}, "Wan 2.1 image-to-video model")


def test_torchs_advice_to_switch_safety_off_is_not_passed_on(refused, workspace):
    path = workspace.checkpoint / "Wan2.2_VAE.pth"
    path.unlink()
    torch.save({"weight": Path("x")}, path)
    said = refused(
        {}, f"{path}: refused", "(pathlib.", "code in a weight file is never run", "as .safetensors"
    )
    for word in ("weights_only", "trust", "add_safe_globals", "option"):
        assert word not in said


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_layers": 5}, "the weights are not those that config.json describes: blocks.4."),
        ({"num_attention_heads": 3}, "the weights are not those that config.json describes: "),
        ({"in_channels": 17}, "in_channels 17 is no Wan 2.2 variant"),
        ({"image_dim": 1280}, "it is a Wan 2.1 image-to-video model"),
        ({"ffn_dim": "wide"}, "ffn_dim = 'wide' cannot be right"),
    ],
)
def test_a_diffusers_config_that_disagrees(refused, workspace, tiny_ti2v, tmp_path, change, expected):
    root = write_diffusers(tiny_ti2v, tmp_path / "diffusers")
    path = root / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused({"model.ckpt_path": root}, expected)


def test_a_diffusers_shard_that_is_absent(refused, tiny_ti2v, tmp_path):
    root = write_diffusers(tiny_ti2v, tmp_path / "diffusers")
    shard = next((root / "text_encoder").glob("*-00002-*.safetensors"))
    shard.unlink()
    refused({"model.ckpt_path": root}, f"{shard}: missing, but model.safetensors.index.json names it")


def test_a_diffusers_part_that_is_missing_is_downloaded_from_the_diffusers_repository(
    refused, tiny_ti2v, tmp_path
):
    root = write_diffusers(tiny_ti2v, tmp_path / "diffusers")
    shutil.rmtree(root / "vae")
    command = f'hf download Wan-AI/Wan2.2-TI2V-5B-Diffusers --include "vae/*" --local-dir {root}'
    refused({"model.ckpt_path": root}, f"{root / 'vae'} is missing", command)


def test_a_format_that_needs_the_sentencepiece_model(refused, workspace):
    (workspace.checkpoint / "google/umt5-xxl/spiece.model").unlink()
    refused(
        {"model.save_text_encoder_format": "comfyui"},
        'model.save_text_encoder_format: is "comfyui", and',
        "spiece.model cannot be read",
        mode="encoder_ft",
    )


@pytest.mark.parametrize("name", ["official_pth", "comfyui"])
def test_a_part_of_an_encoder_has_no_place_in_a_format_of_whole_ones(refused, name):
    refused(
        {"model.save_text_encoder_format": name, "model.save_text_encoder_full": "false"},
        f"is '{name}', a whole encoder for other programs, and save_text_encoder_full is false",
        mode="encoder_ft",
    )
