"""200 configurations with one slip each, through the whole program: it trains or it refuses, and never trips."""

import random
import tomllib
from pathlib import Path

import pytest
import tomli_w

from tests.helpers.mutations import mutate
from tests.helpers.workspace import ROOT, Workspace, make_workspace
from train import main

NUM_MUTATIONS = 200
NUM_IN_EVERY_SUITE = 60
TRAININGS = ("smoke_dit_lora", "smoke_te_ft", "wan22_dit_lora_translator", "wan22_te_ft")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_ti2v, tiny_dataset) -> Workspace:
    """One for all: the cache is filled once for all that do not change it."""
    return make_workspace(tmp_path_factory.mktemp("mutations"), tiny_ti2v, tiny_dataset)


def documents(name: str, workspace: Workspace) -> tuple[dict, dict]:
    """A training configuration of the repository and its dataset, at the size of the tiny checkpoint."""
    training = tomllib.loads((ROOT / "configs" / f"{name}.toml").read_text(encoding="utf-8"))
    training |= {"output_dir": str(workspace.out), "pipeline_stages": 1}
    training["model"]["ckpt_path"] = str(workspace.checkpoint)
    if "train_blocks_range" in training.get("adapter", {}):
        training["adapter"]["train_blocks_range"] = [1, 2]
    if "text_train_blocks" in training["model"]:
        training["model"]["text_train_blocks"] = 1
    return training, tomllib.loads((workspace.root / "dataset.toml").read_text(encoding="utf-8"))


def check_mutation(seed: int, workspace: Workspace, place: Path, capsys) -> int:
    """Dry-run one mutation in the empty directory `place`; returns the exit status."""
    rng = random.Random(seed)
    training, dataset = documents(TRAININGS[seed % len(TRAININGS)], workspace)
    training["dataset"] = str(place / "dataset.toml")
    if seed % 5 == 4:
        dataset, done = mutate(dataset, rng)
    else:
        training, done = mutate(training, rng)
    (place / "dataset.toml").write_text(tomli_w.dumps(dataset), encoding="utf-8")
    (place / "training.toml").write_text(tomli_w.dumps(training), encoding="utf-8")
    code = main(["--config", str(place / "training.toml"), "--dry_run"])
    said = capsys.readouterr().err
    assert code in (0, 2), f"{done}: {said}"
    assert "Traceback" not in said and said.count("error: ") == (code == 2), f"{done}: {said}"
    assert not workspace.out.exists() and not list(place.rglob("*.tmp")), done
    return code


@pytest.mark.parametrize("seed", range(NUM_IN_EVERY_SUITE))
def test_a_mutated_configuration_trains_or_is_refused(seed, workspace, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    check_mutation(seed, workspace, tmp_path, capsys)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(NUM_IN_EVERY_SUITE, NUM_MUTATIONS))
def test_more_mutated_configurations(seed, workspace, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    check_mutation(seed, workspace, tmp_path, capsys)


def test_the_configurations_that_are_mutated_are_sound(workspace, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name in TRAININGS:
        training, dataset = documents(name, workspace)
        (tmp_path / "dataset.toml").write_text(tomli_w.dumps(dataset), encoding="utf-8")
        training["dataset"] = str(tmp_path / "dataset.toml")
        (tmp_path / "training.toml").write_text(tomli_w.dumps(training), encoding="utf-8")
        assert main(["--config", str(tmp_path / "training.toml"), "--dry_run"]) == 0, capsys.readouterr().err
