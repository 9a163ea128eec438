"""A run's directory: made whole, found again, and refused to another configuration."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

import utils.run_dir as run_dir
from utils.checkpoint import checkpoint_name
from utils.config.load import load_config
from utils.config.schema import LoadedConfig
from utils.errors import UserError
from utils.run_dir import NEWEST, create_run_dir, find_run_dir, newest_run, record_config, remove_leftovers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path, monkeypatch) -> LoadedConfig:
    monkeypatch.chdir(ROOT)
    return load_config("configs/smoke_dit_lora.toml", [f"output_dir={tmp_path / 'out'}"])


def describe(directory: Path) -> None:
    (directory / "targets.json").write_text("[]")


def changed(config: LoadedConfig, **values: object) -> LoadedConfig:
    return replace(config, train=replace(config.train, **values))


def test_a_new_run_has_its_config_inputs_and_description(config, tmp_path) -> None:
    run = create_run_dir(config, describe)
    assert datetime.strptime(run.path.name, "%Y%m%d_%H%M%S")
    assert load_config(run.path / "config.toml").train == config.train
    assert sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()) == [
        "config.toml",
        "inputs/dataset_smoke_dataset.toml",
        "inputs/train_smoke_dit_lora.toml",
        "targets.json",
    ]
    assert run.checkpoint is None and run.state is None


def test_what_overrides_say_is_in_the_resolved_config(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    overrides = [f"output_dir={tmp_path}", "adapter.rank=7", "max_steps=9"]
    run = create_run_dir(load_config("configs/smoke_dit_lora.toml", overrides), describe)
    saved = load_config(run.path / "config.toml").train
    assert saved.adapter is not None and saved.adapter.rank == 7 and saved.max_steps == 9


def test_a_description_that_fails_leaves_nothing(config, tmp_path) -> None:
    def fail(directory: Path) -> None:
        describe(directory)
        raise UserError("no room")

    with pytest.raises(UserError, match="no room"):
        create_run_dir(config, fail)
    assert list((tmp_path / "out").iterdir()) == []
    assert find_run_dir(config, NEWEST) is None


class FrozenClock(datetime):
    """It is always the same second."""

    @classmethod
    def now(cls, tz=None):
        return datetime(2030, 1, 2, 3, 4, 5, tzinfo=tz)


def test_runs_of_one_second_get_numbers_and_the_last_is_the_newest(config, monkeypatch) -> None:
    monkeypatch.setattr(run_dir, "datetime", FrozenClock)
    runs = [create_run_dir(config, describe).path for _ in range(12)]
    names = ["20300102_030405", *(f"20300102_030405_{number}" for number in range(1, 12))]
    assert [path.name for path in runs] == names
    assert newest_run(Path(config.train.output_dir)) == runs[-1]


def test_only_whole_runs_named_by_time_can_be_the_newest(config, tmp_path) -> None:
    out = tmp_path / "out"
    assert newest_run(out) is None and find_run_dir(config, NEWEST) is None
    for name in (
        ".20990101_000000.x.tmp",
        "zzz_best",
        "20240101_000000",
        "20240101_000000_2",
        "20231231_235959",
    ):
        (out / name).mkdir(parents=True)
        (out / name / "config.toml").write_text("")
    (out / "20980101_000000").mkdir()  # without a config.toml it is no run
    assert newest_run(out) == out / "20240101_000000_2"


def test_a_run_is_found_by_path_by_name_and_as_the_newest(config) -> None:
    run = create_run_dir(config, describe).path
    (run / checkpoint_name(3)).mkdir()
    for wanted in (NEWEST, run.name, str(run)):
        found = find_run_dir(config, wanted)
        assert found is not None and found.path == run
        assert found.checkpoint == run / "global_step3"


def test_a_run_that_is_none_is_refused(config, tmp_path) -> None:
    with pytest.raises(
        UserError, match="--resume_from_checkpoint nope: neither nope nor .*out/nope is a run"
    ):
        find_run_dir(config, "nope")


def test_leftovers_of_a_killed_process_are_removed(tmp_path) -> None:
    (tmp_path / ".global_step3.tmp").mkdir()
    (tmp_path / ".global_step3.tmp" / "loop.json").write_text("{")
    (tmp_path / ".latest.abc.tmp").write_text("")
    kept = [tmp_path / "global_step2", tmp_path / "notes.tmp", tmp_path / ".hidden"]
    for path in kept:
        path.mkdir()
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_longer_run_records_its_config_and_keeps_the_old_one(config) -> None:
    run = create_run_dir(config, describe)
    before = (run.path / "config.toml").read_text()
    record_config(run.path, config.train, step=3)
    assert not list((run.path / "inputs").glob("config_until*"))
    longer = changed(config, epochs=7).train
    record_config(run.path, longer, step=3)
    assert (run.path / "inputs" / "config_until_step3.toml").read_text() == before
    assert load_config(run.path / "config.toml").train == longer
