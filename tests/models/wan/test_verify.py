"""`--verify`: a sound checkpoint is said to be, in every layout; every kind of damage is found and named, all at once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.wan.checkpoint import TEXT_ENCODER_FILE
from tests.helpers.layouts import INDEX, write_comfyui, write_diffusers
from tests.helpers.workspace import check_refused
from train import main

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "smoke_dit_lora.toml"


@pytest.fixture
def checkpoint(tiny_ti2v, tmp_path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_ti2v, tmp_path / "ckpt"))


@pytest.fixture
def verify(tmp_path, capsys):
    """Run `train.py --verify`; returns status, what it printed, what it complained about."""

    def run(checkpoint, *overrides):
        places = (f"model.ckpt_path={checkpoint}", f"output_dir={tmp_path / 'out'}", *overrides)
        words = [word for one in places for word in ("--set", one)]
        code = main(["--config", str(CONFIG), *words, "--verify"])
        said = capsys.readouterr()
        assert not (tmp_path / "out").exists()
        return code, said.out, said.err

    return run


def shards(checkpoint):
    return sorted(checkpoint.glob("*.safetensors"))


def test_a_sound_checkpoint(verify, tiny_ti2v):
    code, out, err = verify(tiny_ti2v)
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines[:4]] == ["DiT", "text encoder", "VAE", "tokenizer"]
    assert "3 files    123 tensors" in lines[0] and "NOT SOUND" not in out
    assert lines[-1] == "everything is there, whole and finite"
    assert "MiB read" in err


@pytest.mark.parametrize("write", [write_diffusers, write_comfyui])
def test_a_sound_checkpoint_in_another_layout(verify, tiny_t2v, tmp_path, write):
    code, out, err = verify(write(tiny_t2v, tmp_path / "other"), "model.expert=low_noise")
    assert code == 0, err
    assert ("transformer_2" in out) == (write is write_diffusers)


def test_both_experts_are_read_where_both_are_trained(verify, tiny_t2v, tmp_path):
    code, out, err = verify(tiny_t2v, "model.expert=both")
    assert code == 0, err
    labels = [line.split("  ")[0].strip() for line in out.splitlines()[:4]]
    assert labels == ["high_noise", "low_noise", "text encoder", "VAE"]
    damaged = Path(shutil.copytree(tiny_t2v, tmp_path / "ckpt"))
    shard = shards(damaged / "low_noise_model")[2]
    shard.write_bytes(shard.read_bytes()[:-10])
    code, out, err = verify(damaged, "model.expert=both")
    check_refused(code, err, str(shard))
    assert ["NOT SOUND" in line for line in out.splitlines()[:2]] == [False, True]


def test_everything_that_is_wrong_is_said_at_once(verify, checkpoint):
    first, second, third = shards(checkpoint)
    third.unlink()
    second.write_bytes(second.read_bytes()[:-10])
    tensors = load_file(first)
    name = next(iter(tensors))
    tensors[name].view(-1)[5] = torch.inf
    save_file(tensors, first)
    shutil.copy(first, checkpoint / "diffusion_pytorch_model-00009-of-00009.safetensors")
    encoder = checkpoint / TEXT_ENCODER_FILE
    weights = torch.load(encoder, weights_only=True)
    weights["blocks.1.ffn.fc1.weight"][3, 3] = torch.nan
    torch.save(weights, encoder)
    (checkpoint / "Wan2.2_VAE.pth").unlink()
    code, out, err = verify(checkpoint)
    check_refused(code, err, "6 problems with its weights")
    for part in (
        f"{third}: missing, but {INDEX} names it",
        f"{second}: truncated",
        f"{first}: {name} holds NaN or infinite values",
        "00009-of-00009.safetensors: is not one of the shards",
        f"{encoder}: blocks.1.ffn.fc1.weight holds NaN or infinite values",
        "Wan2.2_VAE.pth is missing -> download it (hf download Wan-AI/Wan2.2-TI2V-5B Wan2.2_VAE.pth",
    ):
        assert err.count(part) == 1, part
    assert out.count("NOT SOUND") == 2


def test_a_flipped_bit_in_a_pth_is_found_by_its_checksum(verify, checkpoint):
    path = checkpoint / "Wan2.2_VAE.pth"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, _, err = verify(checkpoint)
    check_refused(code, err, "Wan2.2_VAE.pth: damaged", "does not fit its checksum", "1 problem with")


def change_index(checkpoint, change):
    path = checkpoint / INDEX
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_an_index_that_places_a_tensor_elsewhere(verify, checkpoint):
    first, second, _ = (path.name for path in shards(checkpoint))
    change_index(checkpoint, lambda index: index["weight_map"].update({"patch_embedding.bias": second}))
    code, out, err = verify(checkpoint)
    # Each shard by itself is sound; the part is not.
    assert ["NOT SOUND" in line for line in out.splitlines()[:2]] == [True, False]
    check_refused(
        code,
        err,
        f"{second}: {INDEX} promises patch_embedding.bias in it, which is not there",
        f"{first}: holds patch_embedding.bias, which {INDEX} does not place there",
    )


def test_an_index_with_another_total(verify, checkpoint):
    change_index(checkpoint, lambda index: index["metadata"].update(total_size=12))
    code, _, err = verify(checkpoint)
    check_refused(code, err, "says that the shards hold 12 bytes of tensors, they hold")


def test_names_and_sizes_count_too(verify, checkpoint):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 5}))
    (checkpoint / "google/umt5-xxl/tokenizer.json").write_text("{}")
    code, _, err = verify(checkpoint)
    check_refused(code, err, "blocks.4.", "umt5-xxl: no tokenizer can be loaded", "2 problems")


@pytest.mark.parametrize("flag", ["--plan", "--dry_run", "--cache_only", "--resume_from_checkpoint"])
def test_what_would_be_ignored_is_refused(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(CONFIG), "--verify", flag])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "would be ignored" in said or "give one of the two" in said
