"""Which expert a file is for, by its header and by names, and refusing the other one."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from models.wan.checkpoint import open_transformer
from models.wan.expert_files import expert_of_adapter
from models.wan.layouts import named_expert
from models.wan.preflight import preflight
from tests.helpers.workspace import linked_copy


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_t2v_high_noise_14B_fp16.safetensors", "high_noise"),
        ("wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors", "low_noise"),
        ("low_noise_model", "low_noise"),
        ("Wan2_2-T2V-A14B-HIGH_fp8_e4m3fn.safetensors", "high_noise"),
        ("Wan2_2-I2V-A14B-LOW_bf16.safetensors", "low_noise"),
        ("transformer_2", "low_noise"),
        ("adapter_high_noise.safetensors", "high_noise"),
        ("HighNoise.safetensors", "high_noise"),
        ("transformer", None),
        ("high_quality.safetensors", None),
        ("slow_noise.safetensors", None),
        ("high_noise_and_low_noise.safetensors", None),
        ("diffusion_pytorch_model-00001-of-00006.safetensors", None),
    ],
)
def test_names(tmp_path, name, expert):
    if name == "transformer_2":
        (tmp_path / name).mkdir()
    assert named_expert(tmp_path / name) == expert


@pytest.mark.parametrize(
    ("name", "prefix", "metadata", "expert"),
    [
        ("a", "diffusion_model.", {"expert": "low_noise"}, "low_noise"),
        ("a_high_noise", "diffusion_model.", {"expert": "low_noise"}, "low_noise"),
        ("a_high_noise", "diffusion_model.", {"expert": "none"}, None),
        ("a_high_noise", "diffusion_model.", {}, "high_noise"),
        ("a", "transformer_2.", {}, "low_noise"),
        ("a", "transformer.", {}, None),
    ],
)
def test_adapters(tmp_path, name, prefix, metadata, expert):
    path = tmp_path / f"{name}.safetensors"
    save_file({f"{prefix}blocks.0.cross_attn.k.lora_A.weight": torch.zeros(2, 4)}, path, metadata=metadata)
    assert expert_of_adapter(path) == expert


def problems(make_config, root, expert, **model):
    return preflight(make_config("dit_lora", model={"ckpt_path": str(root), "expert": expert} | model))


def test_files_of_the_other_expert_are_refused(make_config, tiny_t2v, tmp_path):
    assert problems(make_config, tiny_t2v, "low_noise") == []
    folder = linked_copy(tiny_t2v / "high_noise_model", tmp_path / "own" / "wan_high_noise")
    assert problems(make_config, tiny_t2v, "high_noise", transformer_path=str(folder)) == []
    (problem,) = problems(make_config, tiny_t2v, "low_noise", transformer_path=str(folder))
    assert problem.key == "model.expert"
    assert f"is 'low_noise', but the weights are in {folder}" in problem.reason


def test_metadata_that_name_the_other_expert_are_refused(make_config, tiny_t2v, tmp_path):
    source = open_transformer(tiny_t2v / "high_noise_model")
    tensors = {name: source.get(name).clone() for name in source.shapes}
    file = tmp_path / "dit.safetensors"
    save_file(tensors, file, metadata={"expert": "high_noise"})
    assert problems(make_config, tiny_t2v, "high_noise", transformer_path=str(file)) == []
    (problem,) = problems(make_config, tiny_t2v, "low_noise", transformer_path=str(file))
    assert problem.key == "model.expert" and "say that it is the high_noise expert" in problem.reason


def test_a_pair_needs_two_transformers(make_config, tiny_t2v, tmp_path):
    assert problems(make_config, tiny_t2v, "both") == []
    folder = linked_copy(tiny_t2v / "high_noise_model", tmp_path / "one")
    (problem,) = problems(make_config, tiny_t2v, "both", transformer_path=str(folder))
    assert problem.key == "model.expert" and "holds one transformer" in problem.reason


@pytest.mark.parametrize("order", [1, -1])
def test_a_pair_is_of_one_model(make_config, tiny_t2v, tiny_i2v, tmp_path, order):
    """Each expert is sound by itself; only together they are wrong, and nothing else would see it before the second half."""
    high, low = [tiny_t2v, tiny_i2v][::order]
    root = linked_copy(high, tmp_path / "mixed")
    shutil.rmtree(root / "low_noise_model")
    linked_copy(low / "low_noise_model", root / "low_noise_model")
    for expert in ("high_noise", "low_noise"):
        assert not [
            problem for problem in problems(make_config, root, expert) if problem.key == "model.expert"
        ]
    (problem,) = [one for one in problems(make_config, root, "both") if one.key == "model.expert"]
    assert "no two experts of one model: model_type" in problem.reason
    assert "t2v-a14b" in problem.reason and "i2v-a14b" in problem.reason


def test_a_pair_needs_experts(make_config, tiny_ti2v):
    (problem,) = problems(make_config, tiny_ti2v, "both")
    assert problem.key == "model.expert" and "is 'both', but ti2v-5b has no experts" in problem.reason


def test_one_experts_directory_is_no_pair(make_config, tiny_t2v):
    (problem,) = problems(make_config, tiny_t2v / "high_noise_model", "both", transformer_path=None)
    assert problem.key == "model.expert" and "is 'both', but the weights are in" in problem.reason


def test_each_side_of_a_pair_is_checked_and_what_they_share_is_told_once(make_config, tiny_t2v):
    config = make_config(
        "dit_lora",
        model={
            "ckpt_path": str(tiny_t2v),
            "expert": "both",
            "vae_path": str(tiny_t2v / "absent.pth"),
            "max_t": 0.5,
        },
        blocks_to_swap=9,
    )
    assert sorted({problem.key for problem in preflight(config)}) == ["model.vae_path"]
    config = make_config(
        "dit_lora", model={"ckpt_path": str(tiny_t2v), "expert": "both", "max_t": 0.5}, blocks_to_swap=9
    )
    found = preflight(config)
    assert [problem.key for problem in found] == ["model.min_t", "blocks_to_swap"]
    assert "high_noise" in found[0].reason
