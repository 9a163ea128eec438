"""Which encoders, tokenizer and DiT are meant where flags leave it open."""

import argparse
import os

import pytest

from models.wan.checkpoint import TEXT_ENCODER_FILE, TOKENIZER_DIR
from models.wan.export import TEXT_ENCODER_WEIGHTS
from models.wan.probes.encoder_subject import (
    DEFAULT_MAX_NEUTRAL_DRIFT,
    SAVED_ENCODER,
    choose_drift_cap,
    choose_encoders,
)
from utils.config.schema import BudgetConfig
from utils.errors import UserError

FLAGS = ("config", "text_encoder", "base_text_encoder", "base", "expert", "tokenizer")
CONFIG = """
output_dir = "output"
dataset = "unused.toml"
[model]
type = "wan"
ckpt_path = "{checkpoint}"
cache_text_embeddings = false
train_text_encoder = true
freeze_transformer = true
[optimizer]
lr = 1e-4
"""


def arguments(**given):
    return argparse.Namespace(**(dict.fromkeys(FLAGS) | given))


def make_run(directory, checkpoint, **saves):
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text(CONFIG.format(checkpoint=checkpoint))
    for name, seconds in saves.items():
        file = directory / name / TEXT_ENCODER_WEIGHTS
        file.parent.mkdir()
        file.touch()
        os.utime(file, (seconds, seconds))
    return directory


def test_the_name_is_the_one_that_is_exported():
    assert SAVED_ENCODER.name == TEXT_ENCODER_WEIGHTS


def test_without_flags_the_newest_run_and_all_that_its_config_names(tiny_ti2v, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "output" / "a", tiny_ti2v, epoch9=100)
    run = make_run(tmp_path / "output" / "b" / "c", tiny_ti2v, epoch1=200, epoch2=300)
    found = choose_encoders(arguments())
    assert found.tuned.resolve() == run / "epoch2" / TEXT_ENCODER_WEIGHTS
    assert (found.base, found.tokenizer) == (tiny_ti2v / TEXT_ENCODER_FILE, tiny_ti2v / TOKENIZER_DIR)
    assert (found.transformer, found.run.directory.resolve()) == (tiny_ti2v, run)
    said = "\n".join(found.remarks)
    assert "of the newest run below output" in said and str(tiny_ti2v / TEXT_ENCODER_FILE) in said


def test_a_config_means_its_own_run(tiny_ti2v, tmp_path):
    run = make_run(tmp_path / "own", tiny_ti2v, epoch1=100)
    make_run(tmp_path / "newer", tiny_ti2v, epoch1=900)
    assert (
        choose_encoders(arguments(config=run / "config.toml")).tuned == run / "epoch1" / TEXT_ENCODER_WEIGHTS
    )


def test_files_that_lie_in_no_run(tiny_ti2v, tmp_path):
    tuned = tmp_path / "tuned.safetensors"
    tuned.touch()
    for base in (tiny_ti2v, tiny_ti2v / TEXT_ENCODER_FILE):
        found = choose_encoders(arguments(text_encoder=tuned, base_text_encoder=base))
        assert found.base == tiny_ti2v / TEXT_ENCODER_FILE
        assert found.tokenizer == tiny_ti2v / TOKENIZER_DIR
        assert found.transformer is None and found.config is None
        assert "without a DiT" in "\n".join(found.remarks)
    found = choose_encoders(arguments(text_encoder=tuned, base=tiny_ti2v))
    assert (found.base, found.transformer) == (tiny_ti2v / TEXT_ENCODER_FILE, tiny_ti2v)


def test_an_a14b_checkpoint_needs_its_expert(tiny_t2v, tmp_path):
    tuned = tmp_path / "tuned.safetensors"
    tuned.touch()
    with pytest.raises(UserError, match="--expert"):
        choose_encoders(arguments(text_encoder=tuned, base=tiny_t2v))
    found = choose_encoders(arguments(text_encoder=tuned, base=tiny_t2v, expert="low_noise"))
    assert found.transformer == tiny_t2v / "low_noise_model"


def test_what_is_missing_is_named(tiny_ti2v, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tuned = tmp_path / "tuned.safetensors"
    tuned.touch()
    (tmp_path / "empty").mkdir()
    run = make_run(tmp_path / "run", tmp_path / "gone", epoch1=100)
    (tmp_path / "loose").mkdir()
    loose = tmp_path / "loose" / "base.safetensors"
    loose.touch()
    for given, words in (
        ({}, "--text_encoder and --base_text_encoder"),
        ({"text_encoder": tmp_path / "missing"}, "no such file"),
        ({"text_encoder": tmp_path / "empty"}, "neither"),
        ({"text_encoder": tuned}, "--base_text_encoder"),
        ({"text_encoder": tuned, "base_text_encoder": tuned}, "against itself"),
        ({"text_encoder": tuned, "base_text_encoder": loose}, "--tokenizer"),
        ({"text_encoder": run}, "the checkpoint's directory with --base"),
        ({"text_encoder": run, "base_text_encoder": loose}, "--tokenizer"),
        (
            {"text_encoder": tuned, "base_text_encoder": tiny_ti2v, "base": tmp_path / "x"},
            "no such checkpoint",
        ),
    ):
        with pytest.raises(UserError) as raised:
            choose_encoders(arguments(**given))
        assert words in str(raised.value), given
        assert "\n" not in str(raised.value)


def test_a_run_whose_dit_is_gone_is_measured_without(tiny_ti2v, tmp_path):
    run = make_run(tmp_path / "run", tmp_path / "gone", epoch1=100)
    found = choose_encoders(
        arguments(text_encoder=run, base_text_encoder=tiny_ti2v, tokenizer=tiny_ti2v / TOKENIZER_DIR)
    )
    assert found.transformer is None
    assert "is not there" in "\n".join(found.remarks)


def test_the_cap(make_config, tmp_path):
    assert choose_drift_cap(0.5, None, None).value == 0.5
    default = choose_drift_cap(None, make_config("encoder_ft"), None)
    assert (default.value, default.source) == (DEFAULT_MAX_NEUTRAL_DRIFT, "default")
    budgeted = make_config("encoder_ft", budget=BudgetConfig(max_neutral_drift=0.3))
    cap = choose_drift_cap(None, budgeted, tmp_path / "config.toml")
    assert cap.value == 0.3 and "[budget]" in cap.source
    assert choose_drift_cap(0.5, budgeted, tmp_path).source == "--max_neutral_drift"
