import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.wan import checkpoint
from models.wan.arch import load_arch
from models.wan.checkpoint import (
    CheckpointPaths,
    check_checkpoint,
    find_checkpoint,
    open_sharded,
    open_text_encoder,
    open_vae,
    text_encoder_sizes,
    vae_kind,
)
from models.wan.names import umt5_to_hf
from utils.config.schema import ModelConfig
from utils.errors import UserError

UMT5 = "models_t5_umt5-xxl-enc-bf16.pth"


def config(ckpt_path: Path, **values: object) -> ModelConfig:
    """A `[model]` section for this checkpoint."""
    switches = {"cache_text_embeddings": True, "train_text_encoder": False, "freeze_transformer": True}
    return ModelConfig(type="wan", ckpt_path=str(ckpt_path), **switches, **values)


@pytest.fixture
def copy_ti2v(tiny_ti2v, tmp_path):
    """A TI2V checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_ti2v, tmp_path / "ti2v"))


@pytest.fixture
def copy_t2v(tiny_t2v, tmp_path):
    """A T2V checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_t2v, tmp_path / "t2v"))


def save_hf_encoder(source_dir: Path, out: Path, keep=lambda name: True) -> Path:
    """The checkpoint's encoder under Hugging Face names, or a part of it."""
    source = open_text_encoder(source_dir / UMT5)
    save_file({umt5_to_hf(name): source.get(name).clone() for name in source.shapes if keep(name)}, out)
    return out


def messages(problems) -> str:
    return "\n".join(map(str, problems))


def test_parts_of_a_checkpoint_without_experts(tiny_ti2v):
    assert find_checkpoint(config(tiny_ti2v)) == CheckpointPaths(
        transformer_dir=tiny_ti2v,
        config_json=tiny_ti2v / "config.json",
        text_encoder=tiny_ti2v / UMT5,
        vae=tiny_ti2v / "Wan2.2_VAE.pth",
        tokenizer_dir=tiny_ti2v / "google" / "umt5-xxl",
    )


@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
def test_each_expert_has_its_directory(tiny_t2v, expert):
    paths = find_checkpoint(config(tiny_t2v, expert=expert))
    assert paths.transformer_dir == tiny_t2v / f"{expert}_model"
    assert paths.config_json == tiny_t2v / f"{expert}_model" / "config.json"
    assert paths.vae == tiny_t2v / "Wan2.1_VAE.pth"


def test_path_keys_win_over_ckpt_path(tiny_ti2v, copy_ti2v):
    other = {
        "transformer_path": copy_ti2v,
        "llm_path": copy_ti2v / UMT5,
        "vae_path": copy_ti2v / "Wan2.2_VAE.pth",
        "tokenizer_path": copy_ti2v / "google" / "umt5-xxl",
    }
    model = config(tiny_ti2v, **{key: str(path) for key, path in other.items()})
    paths = find_checkpoint(model)
    assert [paths.transformer_dir, paths.text_encoder, paths.vae, paths.tokenizer_dir] == list(other.values())
    assert check_checkpoint(model) == []


def test_one_file_of_transformer_weights_takes_the_checkpoints_config(tiny_t2v, tmp_path):
    weights = {}
    for shard in (tiny_t2v / "low_noise_model").glob("*.safetensors"):
        weights |= load_file(shard)
    save_file(weights, tmp_path / "dit.safetensors")
    model = config(tiny_t2v, expert="low_noise", transformer_path=str(tmp_path / "dit.safetensors"))
    paths = find_checkpoint(model)
    assert paths.config_json == tiny_t2v / "low_noise_model" / "config.json"
    assert load_arch(paths.config_json, open_sharded(paths.transformer_dir).shapes).num_layers == 4
    assert check_checkpoint(model) == []


@pytest.mark.parametrize("find", [find_checkpoint, check_checkpoint])
def test_a_missing_expert_is_refused_where_there_are_two(tiny_i2v, find):
    with pytest.raises(UserError, match=r"model\.expert: is missing.*two experts.*high_noise.*low_noise"):
        problems = find(config(tiny_i2v))
        raise UserError(messages(problems))


def test_an_expert_is_refused_where_there_are_none(tiny_ti2v):
    with pytest.raises(
        UserError, match=r"model\.expert: is 'low_noise', but ti2v-5b has no experts -> leave it out"
    ):
        find_checkpoint(config(tiny_ti2v, expert="low_noise"))


def test_the_other_experts_weights_are_refused(tiny_t2v):
    model = config(tiny_t2v, expert="high_noise", transformer_path=str(tiny_t2v / "low_noise_model"))
    with pytest.raises(
        UserError, match=r"model\.expert: is 'high_noise', but the weights are in .*low_noise_model"
    ):
        find_checkpoint(model)


def test_check_checkpoint_of_good_checkpoints_finds_nothing(tiny_ti2v, tiny_t2v, tiny_i2v):
    assert check_checkpoint(config(tiny_ti2v, variant="ti2v-5b")) == []
    assert check_checkpoint(config(tiny_t2v, variant="t2v-a14b", expert="high_noise")) == []
    assert check_checkpoint(config(tiny_i2v, variant="i2v-a14b", expert="low_noise")) == []


def test_check_checkpoint_loads_no_tensor(tiny_ti2v, monkeypatch):
    def refuse(self, name):
        raise AssertionError(f"{name} was loaded")

    for kind in ("_SafetensorsSource", "_PthSource"):
        monkeypatch.setattr(f"utils.tensor_source.{kind}.get", refuse)
    assert check_checkpoint(config(tiny_ti2v)) == []


def test_check_checkpoint_reports_all_problems_at_once(copy_ti2v):
    next(copy_ti2v.glob("*-00002-of-*.safetensors")).unlink()
    vae = copy_ti2v / "Wan2.2_VAE.pth"
    vae.write_bytes(vae.read_bytes()[:1000])
    (copy_ti2v / UMT5).unlink()
    shutil.rmtree(copy_ti2v / "google")
    problems = check_checkpoint(config(copy_ti2v, expert="low_noise"))
    assert {problem.key for problem in problems} == {"model.ckpt_path", "model.expert"}
    text = messages(problems)
    for part in (
        "00002-of-00003.safetensors: missing",
        "umt5-xxl is missing",
        f"{UMT5} is missing",
        "Wan2.2_VAE.pth: truncated",
        "no experts",
    ):
        assert part in text


def test_a_missing_checkpoint_is_one_problem(tmp_path):
    problems = check_checkpoint(config(tmp_path / "nowhere"))
    assert [problem.key for problem in problems] == ["model.ckpt_path"]
    assert "nowhere is not a directory" in problems[0].reason


def test_a_truncated_shard_is_named(copy_ti2v):
    shard = next(copy_ti2v.glob("*-00003-of-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    (problem,) = check_checkpoint(config(copy_ti2v))
    assert problem.key == "model.ckpt_path"
    assert "00003-of-00003.safetensors: truncated" in problem.reason


def test_config_json_against_headers(copy_ti2v):
    path = copy_ti2v / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 5}))
    (problem,) = check_checkpoint(config(copy_ti2v))
    assert "not those that config.json describes" in problem.reason
    assert "blocks.4." in problem.reason


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dim", "wide"),
        ("num_heads", 0),
        ("num_layers", 10**9),
        ("num_layers", True),
        ("eps", None),
        ("model_type", ["ti2v"]),
        ("in_dim", 16),
    ],
)
def test_nonsense_in_config_json_is_a_problem_and_no_trace(copy_ti2v, key, value):
    path = copy_ti2v / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    (problem,) = check_checkpoint(config(copy_ti2v))
    assert problem.key == "model.ckpt_path"
    assert f"{path}: " in problem.reason
    assert key in problem.reason


def test_variant_against_headers(tiny_ti2v):
    (problem,) = check_checkpoint(config(tiny_ti2v, variant="t2v-a14b"))
    assert problem.key == "model.variant"
    assert "'ti2v-5b'" in problem.reason
    assert 'variant = "ti2v-5b"' in problem.fix


def test_the_other_kind_of_vae_is_refused(tiny_ti2v, tiny_t2v):
    (problem,) = check_checkpoint(config(tiny_ti2v, vae_path=str(tiny_t2v / "Wan2.1_VAE.pth")))
    assert problem.key == "model.vae_path"
    assert "VAE of Wan 2.1, but ti2v-5b works with that of Wan 2.2" in problem.reason


def test_an_encoder_of_another_width_is_refused(tiny_ti2v, tmp_path):
    source = open_text_encoder(tiny_ti2v / UMT5)
    narrow = {}
    for name in source.shapes:
        tensor = source.get(name)
        if not name.endswith("pos_embedding.embedding.weight"):
            tensor = tensor[tuple(slice(0, 32) if size == 64 else slice(None) for size in tensor.shape)]
        narrow[name] = tensor.clone()
    save_file(narrow, tmp_path / "narrow.safetensors")
    (problem,) = check_checkpoint(config(tiny_ti2v, llm_path=str(tmp_path / "narrow.safetensors")))
    assert problem.key == "model.llm_path"
    assert "width 32, the DiT takes 64" in problem.reason


def test_a_vae_given_as_encoder_is_refused(tiny_ti2v):
    (problem,) = check_checkpoint(config(tiny_ti2v, llm_path=str(tiny_ti2v / "Wan2.2_VAE.pth")))
    assert problem.key == "model.llm_path"
    assert "Wan2.2_VAE.pth" in problem.reason


def test_an_encoder_given_as_vae_is_refused(tiny_ti2v):
    (problem,) = check_checkpoint(config(tiny_ti2v, vae_path=str(tiny_ti2v / UMT5)))
    assert problem.key == "model.vae_path"
    assert UMT5 in problem.reason


def test_encoder_under_hf_names_is_shown_under_official_names(tiny_ti2v, tmp_path):
    official = open_text_encoder(tiny_ti2v / UMT5)
    hf = open_text_encoder(save_hf_encoder(tiny_ti2v, tmp_path / "te.safetensors"))
    assert hf.shapes == official.shapes
    assert hf.dtypes == official.dtypes
    assert all(torch.equal(hf.get(name), official.get(name)) for name in official.shapes)
    assert text_encoder_sizes(hf.shapes) == text_encoder_sizes(official.shapes)


def test_encoder_with_the_tokenizer_inside_opens_without_it(tiny_ti2v, tmp_path):
    path = save_hf_encoder(tiny_ti2v, tmp_path / "te.safetensors")
    save_file(load_file(path) | {"spiece_model": torch.zeros(9, dtype=torch.uint8)}, path)
    assert "spiece_model" not in open_text_encoder(path).shapes


def test_official_names_in_safetensors_open_too(tiny_ti2v, tmp_path):
    source = open_text_encoder(tiny_ti2v / UMT5)
    save_file({name: source.get(name).clone() for name in source.shapes}, tmp_path / "te.safetensors")
    assert open_text_encoder(tmp_path / "te.safetensors").shapes == source.shapes


@pytest.mark.parametrize("start", ["blocks.2.", "blocks."])
def test_a_part_of_an_encoder_is_refused_with_the_reason(tiny_ti2v, tmp_path, start):
    path = save_hf_encoder(tiny_ti2v, tmp_path / "part.safetensors", lambda name: name.startswith(start))
    with pytest.raises(
        UserError, match=r"part\.safetensors: holds only a part.*save_text_encoder_full = false"
    ):
        open_text_encoder(path)


def test_a_quantised_encoder_is_refused(tiny_ti2v, tmp_path):
    path = save_hf_encoder(tiny_ti2v, tmp_path / "fp8.safetensors")
    save_file(load_file(path) | {"scaled_fp8": torch.zeros(0)}, path)
    with pytest.raises(UserError, match=r"fp8\.safetensors: is quantised to fp8"):
        open_text_encoder(path)


def test_a_whole_t5_with_decoder_is_refused(tiny_ti2v, tmp_path):
    path = save_hf_encoder(tiny_ti2v, tmp_path / "t5.safetensors")
    save_file(load_file(path) | {"decoder.final_layer_norm.weight": torch.zeros(64)}, path)
    with pytest.raises(
        UserError, match=r"t5\.safetensors: holds a decoder \(decoder\.final_layer_norm\.weight\)"
    ):
        open_text_encoder(path)


def test_vae_kinds(tiny_ti2v, tiny_t2v):
    assert vae_kind(open_vae(tiny_ti2v / "Wan2.2_VAE.pth").shapes) == "2.2"
    assert vae_kind(open_vae(tiny_t2v / "Wan2.1_VAE.pth").shapes) == "2.1"


def test_everything_that_is_exported_exists():
    assert all(hasattr(checkpoint, name) for name in checkpoint.__all__)
