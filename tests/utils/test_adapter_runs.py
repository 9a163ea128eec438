import os
from pathlib import Path

import pytest

from utils.adapter_runs import adapters_of_pair, find_adapter_file, newest_adapter_run, run_of_adapter
from utils.errors import UserError

NAME = "adapter_model.safetensors"


def make_run(directory, saves, config=True):
    """A run; `saves` maps a save's directory to the time of its file, in seconds."""
    for name, seconds in saves.items():
        (directory / name).mkdir(parents=True)
        (directory / name / NAME).touch()
        os.utime(directory / name / NAME, (seconds, seconds))
    if config:
        (directory / "config.toml").touch()
    return directory


def test_a_file_or_the_directory_it_is_in(tmp_path):
    file = tmp_path / "lora.safetensors"
    file.touch()
    assert find_adapter_file(file) == file
    assert find_adapter_file(tmp_path) == file
    (tmp_path / NAME).touch()
    assert find_adapter_file(tmp_path) == tmp_path / NAME


def test_what_names_no_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        find_adapter_file(tmp_path / "missing")
    with pytest.raises(UserError, match="neither"):
        find_adapter_file(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"2 \.safetensors files"):
        find_adapter_file(tmp_path)


def test_a_run_stands_for_its_last_save(tmp_path):
    run = make_run(tmp_path / "run", {"epoch2": 100, "epoch10": 100, "step7": 50})
    assert find_adapter_file(run) == run / "epoch10" / NAME
    later = make_run(tmp_path / "later", {"epoch2": 100, "step7": 150})
    assert find_adapter_file(later) == later / "step7" / NAME


def test_the_newest_run_of_all(tmp_path):
    make_run(tmp_path / "a" / "first", {"epoch1": 300})
    newest = make_run(tmp_path / "b" / "deeper" / "second", {"epoch1": 100, "epoch2": 400})
    make_run(tmp_path / "c", {"epoch9": 350})
    make_run(tmp_path / "no_config", {"epoch1": 900}, config=False)
    make_run(tmp_path / "half", {".epoch1.x.tmp": 900, "global_step3": 900})
    run = newest_adapter_run(tmp_path)
    assert (run.directory, run.config, run.adapter) == (
        newest,
        newest / "config.toml",
        newest / "epoch2" / NAME,
    )


def test_no_run_at_all_is_refused(tmp_path):
    make_run(tmp_path / "half", {".epoch1.x.tmp": 900})
    for root in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="--adapter and --base"):
            newest_adapter_run(root)


def test_the_run_that_an_adapter_lies_in(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", {"epoch2": 100, "elsewhere": 100})
    monkeypatch.chdir(run / "epoch2")
    for adapter in (run / "epoch2" / NAME, Path(NAME)):
        assert run_of_adapter(adapter).config == run / "config.toml"
    assert run_of_adapter(run / "elsewhere" / NAME) is None
    loose = make_run(tmp_path / "loose", {"epoch1": 1}, config=False)
    assert run_of_adapter(loose / "epoch1" / NAME) is None


def test_the_adapters_of_a_pair_belong_to_the_runs_they_were_copied_from(tmp_path):
    pair = tmp_path / "pair"
    for expert in ("high_noise", "low_noise"):
        make_run(pair / expert, {"epoch1": 100})
        (pair / f"adapter_{expert}.safetensors").touch()
    assert adapters_of_pair(pair) == ()  # nothing marks it as a pair
    (pair / "pair.json").touch()
    high, low = adapters_of_pair(pair)
    assert (high.name, low.name) == ("adapter_high_noise.safetensors", "adapter_low_noise.safetensors")
    with pytest.raises(UserError, match="the adapters of two experts; name one of them, .*high.* or .*low"):
        find_adapter_file(pair)
    assert find_adapter_file(low) == low
    assert run_of_adapter(low).directory == pair / "low_noise" and run_of_adapter(low).adapter == low
    (pair / "high_noise" / "config.toml").unlink()
    assert run_of_adapter(high) is None
