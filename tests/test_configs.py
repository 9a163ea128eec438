"""Every file in configs/ loads, and no slip in one of them ends in anything but a clear report."""

import random
import re
import tomllib
from pathlib import Path

import pytest
import tomli_w

from tests.helpers.mutations import mutate
from utils.config.guardrails import mode_of
from utils.config.load import ConfigError, load_config, load_dataset
from utils.config.schema import LoadedConfig

ROOT = Path(__file__).resolve().parent.parent
ALL = sorted((ROOT / "configs").glob("*.toml"))
DATASETS = [path for path in ALL if path.stem.endswith("dataset")]
TRAININGS = [path for path in ALL if path not in DATASETS]
NUM_MUTATIONS = 200


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_expected_files_are_there() -> None:
    assert {path.name for path in ALL} >= {
        "wan22_te_ft.toml",
        "wan22_dit_lora_translator.toml",
        "smoke_te_ft.toml",
        "smoke_dit_lora.toml",
        "dataset.toml",
        "smoke_dataset.toml",
        "a14b_dataset.toml",
        "a14b_720p_dataset.toml",
        "i2v_dataset.toml",
        "ti2v_720p_dataset.toml",
    }


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_a_training_config_loads_with_its_dataset(path) -> None:
    loaded = load_config(path)
    assert loaded.dataset is not None
    assert mode_of(loaded.train) == ("encoder_ft" if "te_ft" in path.stem else "dit_lora")
    assert loaded.train.output_dir.startswith("output/")
    if path.stem.startswith("smoke"):
        assert loaded.train.pipeline_stages == 1 and loaded.train.output_dir.startswith("output/smoke/")


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_a_training_config_loads_from_any_working_directory(path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(path).train.seed == 0


@pytest.mark.parametrize("path", DATASETS, ids=lambda path: path.stem)
def test_a_dataset_loads(path) -> None:
    assert load_dataset(path).directory


def _with_one_key_uncommented(path: Path) -> list[str]:
    """The text of a config with one `# key = value` line made live, for each such line outside `# [[sections]]`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if line.startswith("# [")), len(lines))
    live = [number for number in range(end) if re.match(r"# \w+ = ", lines[number])]
    return ["\n".join([*lines[:number], lines[number][2:], *lines[number + 1 :]]) for number in live]


def test_a_commented_out_key_is_legal_too(tmp_path) -> None:
    """`# key = value` in a config invites to take the # away."""
    tried = [(path, text) for path in ALL for text in _with_one_key_uncommented(path)]
    recipes = {path.stem for path in TRAININGS if path.stem.startswith("wan22_")}
    assert {path.stem for path, _ in tried} == recipes | {"smoke_dit_lora", "dataset"}
    for path, text in tried:
        changed = tmp_path / path.name
        changed.write_text(text, encoding="utf-8")
        if path in DATASETS:
            load_dataset(changed)
        else:
            load_config(changed)


@pytest.mark.parametrize("seed", range(NUM_MUTATIONS))
def test_a_mutated_config_is_loaded_or_refused_and_never_trips_the_loader(seed, tmp_path) -> None:
    rng = random.Random(seed)
    path = ALL[seed % len(ALL)]
    document, done = mutate(tomllib.loads(path.read_text(encoding="utf-8")), rng)
    changed = tmp_path / path.name
    changed.write_text(tomli_w.dumps(document), encoding="utf-8")
    training = changed if path in TRAININGS else ROOT / "configs" / "smoke_te_ft.toml"
    overrides = [] if path in TRAININGS else [f"dataset={changed}"]
    for check_files in (False, True):
        try:
            assert isinstance(load_config(training, overrides, check_files=check_files), LoadedConfig)
        except ConfigError as error:
            assert error.problems and str(training) in str(error), done


def test_the_mutations_reach_both_outcomes_and_every_kind() -> None:
    outcomes: dict[str, set[bool]] = {}
    for seed in range(NUM_MUTATIONS):
        path = TRAININGS[seed % len(TRAININGS)]
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        changed, done = mutate(document, random.Random(seed))
        outcomes.setdefault(done.split()[0], set()).add(changed != document)
    assert set(outcomes) == {"delete", "rename", "retype", "range", "move", "negate"}
    assert all(True in changed for changed in outcomes.values())
