"""Files of one kind among the runs of another. What holds for every kind is in test_adapter_runs.py."""

import os

import pytest

from utils.errors import UserError
from utils.saved_runs import SavedKind, find_saved_file, last_saved, newest_saved_run, run_of_saved_file

ENCODER = SavedKind("text_encoder.safetensors", "a text encoder", "--text_encoder")
ADAPTER = SavedKind("adapter_model.safetensors", "an adapter", "--adapter")


def save(run, epoch, kind, seconds):
    file = run / f"epoch{epoch}" / kind.name
    file.parent.mkdir(parents=True)
    file.touch()
    (run / "config.toml").touch()
    os.utime(file, (seconds, seconds))
    return file


def test_each_kind_has_its_own_newest_run(tmp_path):
    encoder = save(tmp_path / "te", 2, ENCODER, 100)
    adapter = save(tmp_path / "lora", 1, ADAPTER, 900)
    assert newest_saved_run(tmp_path, ENCODER).file == encoder
    assert newest_saved_run(tmp_path, ADAPTER).file == adapter
    assert last_saved(tmp_path / "lora", ENCODER) is None
    assert run_of_saved_file(adapter, ENCODER) is None
    assert run_of_saved_file(encoder, ENCODER).config == tmp_path / "te" / "config.toml"
    assert find_saved_file(tmp_path / "te", ENCODER) == encoder


def test_messages_name_the_kind(tmp_path):
    with pytest.raises(UserError, match="a text encoder"):
        find_saved_file(tmp_path / "gone", ENCODER)
    with pytest.raises(UserError, match=r"neither text_encoder\.safetensors .* a text encoder"):
        find_saved_file(tmp_path, ENCODER)
    with pytest.raises(UserError, match=r"epochN/text_encoder\.safetensors .* --text_encoder"):
        newest_saved_run(tmp_path, ENCODER)


def test_a_run_without_its_config_is_told_from_an_empty_folder(tmp_path):
    save(tmp_path / "te", 2, ENCODER, 100)
    (tmp_path / "te" / "config.toml").unlink()
    with pytest.raises(UserError, match=r"holds epoch2 but no config\.toml, so it is no whole run"):
        find_saved_file(tmp_path / "te", ENCODER)
