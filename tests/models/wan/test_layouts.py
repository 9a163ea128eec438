"""Where parts are found, in every layout; what is missing, and the command that downloads it."""

import json
from pathlib import Path

import pytest

from models.wan.arch import VARIANTS
from models.wan.checkpoint import check_checkpoint, find_checkpoint, read_variant
from models.wan.downloads import download_command
from models.wan.layouts import locate, named_expert, transformer_place
from tests.helpers.layouts import write_comfyui, write_diffusers
from tests.helpers.real_headers import write_real_dit
from tests.helpers.weight_files import dit, write_fp8_scaled
from utils.config.schema import ModelConfig
from utils.errors import UserError


def config(ckpt_path: Path, **values: object) -> ModelConfig:
    switches = {"cache_text_embeddings": True, "train_text_encoder": False, "freeze_transformer": True}
    return ModelConfig(type="wan", ckpt_path=str(ckpt_path), **switches, **values)


def test_a_diffusers_directory(tiny_t2v, tmp_path):
    root = write_diffusers(tiny_t2v, tmp_path / "d")
    for expert, folder in (("high_noise", "transformer"), ("low_noise", "transformer_2")):
        paths = find_checkpoint(config(root, expert=expert))
        assert paths.transformer_dir == root / folder
        assert paths.config_json == root / folder / "config.json"
        assert (paths.text_encoder, paths.vae, paths.tokenizer_dir) == (
            root / "text_encoder",
            root / "vae",
            root / "tokenizer",
        )
        assert check_checkpoint(config(root, expert=expert, variant="t2v-a14b")) == []
    with pytest.raises(UserError, match=r"model\.expert: is missing"):
        find_checkpoint(config(root))
    assert read_variant(config(root, expert="low_noise")).name == "t2v-a14b"


def test_a_lone_diffusers_transformer_is_the_high_noise_expert(tiny_t2v, tiny_ti2v, tmp_path):
    root = write_diffusers(tiny_t2v, tmp_path / "d")
    (root / "transformer_2").rename(tmp_path / "gone")
    assert transformer_place(root, "high_noise") == root / "transformer"
    (problem,) = locate(config(root, expert="low_noise"))[1]
    assert f"{root / 'transformer_2'} is missing" in problem.reason
    assert '--include "transformer_2/*"' in problem.fix and "T2V-A14B-Diffusers" in problem.fix
    alone = write_diffusers(tiny_ti2v, tmp_path / "five")
    assert find_checkpoint(config(alone)).transformer_dir == alone / "transformer"
    with pytest.raises(UserError, match="ti2v-5b has no experts"):
        find_checkpoint(config(alone, expert="low_noise"))


def test_folders_of_single_files(tiny_t2v, tmp_path):
    root = write_comfyui(tiny_t2v, tmp_path / "models")
    paths = find_checkpoint(config(root, expert="low_noise"))
    assert paths.transformer_dir.name == "wan2.2_t2v_low_noise_14B_fp32.safetensors"
    assert paths.text_encoder == paths.tokenizer_dir == root / "text_encoders" / "umt5_xxl_bf16.safetensors"
    assert paths.vae == root / "vae" / "wan_vae.safetensors"
    assert check_checkpoint(config(root, expert="low_noise")) == []
    (root / "vae" / "wan_vae.safetensors").rename(root / "vae" / "a.safetensors")
    (root / "vae" / "b.safetensors").write_bytes((root / "vae" / "a.safetensors").read_bytes())
    (root / "vae" / "damaged.safetensors").write_bytes(b"...")
    (problem,) = locate(config(root, expert="low_noise"))[1]
    assert "holds 2 VAEs" in problem.reason and problem.fix == "say which with vae_path"
    chosen = config(root, expert="low_noise", vae_path=str(root / "vae" / "b.safetensors"))
    assert locate(chosen)[1] == []


def test_single_files_in_the_directory_itself_with_their_config_json(tiny_ti2v, tmp_path):
    """A message asks for that config.json; a directory of one DiT is told from it by its files."""
    models = write_comfyui(tiny_ti2v, tmp_path / "models")
    root = tmp_path / "flat"
    root.mkdir()
    for file in models.rglob("*.safetensors"):
        (root / file.name).symlink_to(file)
    (root / "config.json").write_text((tiny_ti2v / "config.json").read_text())
    paths = find_checkpoint(config(root))
    assert paths.transformer_dir.parent == root and paths.transformer_dir.suffix == ".safetensors"
    assert check_checkpoint(config(root)) == []


def test_a_tokenizer_directory_counts_before_the_one_inside_the_encoder(tiny_ti2v, tmp_path):
    root = write_comfyui(tiny_ti2v, tmp_path / "models")
    inside = str(root / "text_encoders" / "umt5_xxl_bf16.safetensors")
    assert find_checkpoint(config(tiny_ti2v, llm_path=inside)).tokenizer_dir == tiny_ti2v / "google/umt5-xxl"
    given = config(tiny_ti2v, tokenizer_path=inside)
    assert find_checkpoint(given).tokenizer_dir == Path(inside)
    (problem,) = locate(config(tiny_ti2v, tokenizer_path=str(root)))[1]
    assert problem.key == "model.tokenizer_path" and "holds neither tokenizer.json" in problem.reason


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_single_files_need_no_config_json(tmp_path, variant):
    """Real headers in ComfyUI's fp8_scaled layout, alone in a directory."""
    info, path = VARIANTS[variant], tmp_path / "wan.safetensors"
    write_fp8_scaled(path, dit(variant))
    expert = "low_noise" if info.has_experts else None
    model = config(tmp_path, expert=expert, transformer_path=str(path))
    assert read_variant(model) == info
    about_dit = [one for one in check_checkpoint(model) if "transformer" in str(one) or "expert" in one.key]
    assert about_dit == []
    wrong = config(tmp_path, expert=None if info.has_experts else "low_noise", transformer_path=str(path))
    assert [one.key for one in check_checkpoint(wrong) if one.key == "model.expert"] == ["model.expert"]
    other = config(tmp_path, expert=expert, variant="ti2v-5b" if info.has_experts else "t2v-a14b")
    assert [one.key for one in check_checkpoint(other)].count("model.variant") == 1


def test_an_encoders_config_json_beside_a_single_file_is_passed_over(tmp_path):
    write_fp8_scaled(tmp_path / "wan.safetensors", dit("ti2v-5b"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "umt5", "d_model": 4096}))
    root = write_real_dit(tmp_path / "official", "ti2v-5b")
    model = config(root, transformer_path=str(tmp_path / "wan.safetensors"))
    assert locate(model)[0].config_json == root / "config.json"
    assert read_variant(model).name == "ti2v-5b"


def test_experts_by_name(tiny_t2v, tmp_path):
    for name, expert in (
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "high_noise"),
        ("Wan2.2-I2V-LowNoise.safetensors", "low_noise"),
        ("low_noise_model", "low_noise"),
        ("transformer_2", None),  # with nothing beside it that says diffusers
        ("high_quality.safetensors", None),
        ("high_noise_and_low_noise.safetensors", None),
    ):
        assert named_expert(tmp_path / name) == expert, name
    root = write_comfyui(tiny_t2v, tmp_path / "models")
    low = root / "diffusion_models" / "wan2.2_t2v_low_noise_14B_fp32.safetensors"
    (problem,) = locate(config(tiny_t2v, expert="high_noise", transformer_path=str(low)))[1]
    assert problem.key == "model.expert" and f"the weights are in {low}" in problem.reason
    diffusers = write_diffusers(tiny_t2v, tmp_path / "d")
    wrong = config(tiny_t2v, expert="low_noise", transformer_path=str(diffusers / "transformer"))
    assert [one.key for one in locate(wrong)[1]] == ["model.expert"]


@pytest.mark.parametrize(
    ("part", "variant", "expert", "diffusers", "expected"),
    [
        ("text_encoder", "ti2v-5b", None, False, "TI2V-5B models_t5_umt5-xxl-enc-bf16.pth"),
        ("text_encoder", None, None, False, "TI2V-5B models_t5_umt5-xxl-enc-bf16.pth"),
        ("tokenizer", "i2v-a14b", "low_noise", False, 'I2V-A14B --include "google/umt5-xxl/*"'),
        ("vae", "t2v-a14b", "low_noise", False, "T2V-A14B Wan2.1_VAE.pth"),
        ("transformer", "t2v-a14b", "low_noise", False, 'T2V-A14B --include "low_noise_model/*"'),
        ("transformer", "i2v-a14b", "high_noise", True, 'I2V-A14B-Diffusers --include "transformer/*"'),
        ("transformer", "ti2v-5b", None, True, 'TI2V-5B-Diffusers --include "transformer/*"'),
        ("text_encoder", "ti2v-5b", None, True, 'TI2V-5B-Diffusers --include "text_encoder/*"'),
        ("everything", "t2v-a14b", None, False, "T2V-A14B"),
    ],
)
def test_commands_that_download(part, variant, expert, diffusers, expected):
    info = VARIANTS[variant] if variant else None
    command = download_command(part, info, expert, Path("a b"), diffusers=diffusers)
    assert command == f"hf download Wan-AI/Wan2.2-{expected} --local-dir 'a b'"


def test_where_nothing_tells_the_variant_the_others_are_named():
    command = download_command("everything", None, None, Path("w"))
    assert command.startswith(
        "hf download Wan-AI/Wan2.2-TI2V-5B --local-dir w (or Wan-AI/Wan2.2-T2V-A14B or "
    )
    assert "A14B" in download_command("transformer", None, "low_noise", Path("w")).partition(" (or ")[0]
