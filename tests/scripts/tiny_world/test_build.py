"""What `build` says of an asset and where it puts it; the training itself is left out."""

import json
import shutil
from pathlib import Path

import pytest

from scripts.tiny_world import build
from scripts.tiny_world.asset import ASSET, CONFIG_FILE, DIT_FILE, UMT5_FILE, VAE_FILE, read_quality
from scripts.tiny_world.drawing import Drawing

WEIGHTS = (DIT_FILE, UMT5_FILE, VAE_FILE, CONFIG_FILE)


@pytest.fixture
def trainings(monkeypatch) -> list[int]:
    """The seeds of what was trained; in place of training and measuring stand the committed results."""
    seeds: list[int] = []
    quality = read_quality()

    def train(directory: Path, states: Path, seed: int):
        seeds.append(seed)
        (states / "vae.pt").write_text("under way")
        for name in WEIGHTS:
            shutil.copyfile(ASSET / name, directory / name)
        return quality["vae"], 0.5

    monkeypatch.setattr(build, "train", train)
    monkeypatch.setattr(build, "sweep", lambda model, say: (Drawing(**quality["drawing"]), quality["sweep"]))
    monkeypatch.setattr(build, "measure_all", lambda model, drawing, say: quality["results"])
    return seeds


def test_the_asset_names_the_command_and_seed_that_made_it(trainings, tmp_path):
    out, work = tmp_path / "my asset", tmp_path / "work"
    assert build.main(["--out", str(out), "--work", str(work), "--seed", "7"]) == 0
    assert trainings == [7]
    quality = json.loads((out / "quality.json").read_text(encoding="utf-8"))
    command = f"python -m scripts.tiny_world.build --out '{out}' --work {work} --seed 7"
    assert (quality["command"], quality["seed"]) == (command, 7)
    assert quality["provenance"] == f"made by `{command}` with seed 7, from nothing in one run"
    assert quality["provenance"] in (out / "README.md").read_text(encoding="utf-8")
    assert quality["sha256"] == read_quality()["sha256"]
    assert {path.name for path in out.iterdir()} == set(build.ASSET_FILES)
    assert not list(work.iterdir())


def test_an_asset_says_that_its_building_was_interrupted_and_takes_the_place_of_another(trainings, tmp_path):
    out, work = tmp_path / "asset", tmp_path / "work"
    flags = ["--out", str(out), "--work", str(work), "--seed", "7"]
    assert build.main(flags) == 0
    (work / "seed7").mkdir()
    (work / "seed7" / "vae.pt").write_text("under way")
    assert build.main(flags) == 0
    assert read_quality(out)["provenance"].endswith("going on from what an interrupted run had left")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asset", "work"]


def test_what_is_no_asset_is_refused_before_anything_is_trained(trainings, tmp_path, capsys):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    assert build.main(["--out", str(home), "--work", str(tmp_path / "work")]) == 2
    assert (
        "is not empty and no such asset, as it has no dit.safetensors, quality.json"
        in capsys.readouterr().err
    )
    assert (home / "thesis.txt").read_text() == "years of work"
    assert not trainings
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(("out", "work"), [("a", "a"), ("a", "a/b"), ("a/seed0", "a"), ("a/seed0/b", "a")])
def test_the_two_places_do_not_lie_in_each_other(trainings, tmp_path, capsys, out, work):
    assert build.main(["--out", str(tmp_path / out), "--work", str(tmp_path / work)]) == 2
    assert "give two places" in capsys.readouterr().err
    assert not trainings


def test_an_asset_that_was_put_aside_outlives_a_refusal_and_comes_back(trainings, tmp_path):
    out, flags = tmp_path / "asset", ["--out", str(tmp_path / "asset"), "--work", str(tmp_path / "work")]
    assert build.main(flags) == 0
    aside = out.rename(tmp_path / ".asset.old.tmp")
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert build.main(flags) == 2
    assert (aside / DIT_FILE).is_file()
    shutil.rmtree(out)
    assert build.main(flags) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asset", "work"]
