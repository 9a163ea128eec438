"""Values of flags: what is taken, and what is refused before anything else is looked at."""

import argparse

import pytest
import torch

from utils.argument_types import config_file, positive_float, positive_int, seed
from utils.probe_cli import add_flags, probe_parser


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", "٣", " 4"])
def test_counts_are_whole_numbers_above_zero(text):
    assert positive_int("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="not a whole number above 0"):
        positive_int(text)


def test_a_seed_is_one_that_torch_takes_with_what_is_added_to_it():
    torch.Generator().manual_seed(seed(str(2**63)) + 10**6)
    for text in ("-1", "1.5", str(2**63 + 1), "", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="from 0 to"):
            seed(text)


def test_limits_are_numbers_above_zero():
    assert positive_float("5e-2") == 0.05
    for text in ("0", "-1", "nan", "inf", "a"):
        with pytest.raises(argparse.ArgumentTypeError, match="above 0"):
            positive_float(text)


def test_a_run_s_directory_stands_for_its_config(tmp_path):
    assert config_file(str(tmp_path / "x.toml")) == tmp_path / "x.toml"
    (tmp_path / "config.toml").touch()
    assert config_file(str(tmp_path)) == tmp_path / "config.toml"


@pytest.mark.parametrize("value", ["", "folder"])
def test_a_path_that_cannot_be_meant_is_wrong_use(value, tmp_path, monkeypatch, capsys):
    """An unset variable of a shell gives an empty one, which would mean the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    parser = probe_parser("x", "X?")
    add_flags(parser, "config")
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--config", value])
    assert stopped.value.code == 2
    assert (
        "is empty" if not value else "folder is a directory without config.toml"
    ) in capsys.readouterr().err
