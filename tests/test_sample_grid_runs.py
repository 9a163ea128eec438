"""`[samples]` as a person runs it: a grid of what an epoch has saved, in reports/, in TensorBoard and in the translator's report.

What really draws is long: each grid is a process that loads the libraries of sampling.
"""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import make_once
from tests.helpers.probes import DRAWING, REPORTING, write_probe
from tests.helpers.workspace import ROOT, Workspace, check_refused, environment, make_workspace
from utils import probe_runner
from utils.metrics import read_metrics
from utils.probe_outcomes import read_outcomes
from utils.report_summary import Summary, read_summary

SECRETS = ("a zorp beside a lake", "a zorp on a table")
SMALL = ("samples.size=64x64", "samples.steps=2", "samples.max_prompts=1", "samples.seeds=1")
LORA = ("epochs=2", "adapter.dropout=0.2", "uncond_fraction=0.3", "save_every_n_epochs=2")
TOOL = "prompt_grid"


def launch(workspace: Workspace, mode: str, *settings: str) -> str:
    done = workspace.launch(["python"], mode, *settings)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def grid_of(workspace: Workspace, name: str) -> tuple[Path, Summary]:
    directory = workspace.root / "reports" / TOOL / name
    return directory, read_summary(directory)


def changes_of(directory: Path) -> list[dict[str, str]]:
    with (directory / "changes.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def pixels(data: Path | bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as picture:
        return np.asarray(picture.convert("RGB"))


class Drawn:
    """A run with `[samples]` and the translator's report, and what it said."""

    def __init__(self, workspace: Workspace) -> None:
        (workspace.root / "domain.txt").write_text("\n".join(SECRETS) + "\n")
        self.workspace = workspace
        settings = ("samples.every_n_epochs=2", "samples.domain_prompts=domain.txt", *SMALL)
        probes = ('probes.run=["dit_lora_translator"]', "probes.every_n_epochs=2")
        self.said = launch(workspace, "dit_lora", *LORA, *settings, *probes)
        self.run = workspace.run()
        self.step = read_metrics(self.run)[-1]["step"]
        self.directory, self.summary = grid_of(workspace, f"{self.run.name}_epoch2")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, tiny_ti2v, tiny_dataset) -> Drawn:
    return Drawn(make_workspace(tmp_path_factory.mktemp("grid"), tiny_ti2v, tiny_dataset))


@pytest.mark.long
def test_the_grid_of_an_epoch_lies_in_reports(drawn) -> None:
    assert {path.name for path in drawn.directory.iterdir()} == {
        "report.md",
        "summary.json",
        "changes.csv",
        "cells.csv",
        "grid.png",
    }
    assert drawn.summary.metrics["settings"].startswith("ti2v-5b, 64x64 px, 1 frame; unipc, 2 steps")
    # The empty prompt and the first neutral one, and the first domain one.
    rows = {(row["column"], row["group"]): int(row["prompts"]) for row in changes_of(drawn.directory)}
    assert rows == {("adapter", "neutral"): 2, ("adapter", "domain"): 1}
    adapters = [entry.path for entry in drawn.summary.inputs if entry.role.startswith("adapter of")]
    assert adapters == [f"out/{drawn.run.name}/epoch2/adapter_model.safetensors"]
    assert list((drawn.workspace.root / "reports" / TOOL).iterdir()) == [drawn.directory]


@pytest.mark.long
def test_outcomes_stand_where_those_of_probes_stand(drawn) -> None:
    rows = read_outcomes(drawn.run)
    assert [(row["tool"], row["epoch"], row["step"]) for row in rows] == [
        (TOOL, 2, drawn.step),
        ("dit_lora_translator", 2, drawn.step),
    ]
    assert rows[0]["result"] == drawn.summary.verdict
    assert rows[0]["report"] == f"reports/{TOOL}/{drawn.directory.name}"
    assert "waiting for probes: prompt_grid on epoch2, dit_lora_translator on epoch2" in drawn.said
    assert f"probe prompt_grid on epoch2: {drawn.summary.verdict}" in drawn.said


@pytest.mark.long
def test_tensorboard_has_the_picture_and_its_numbers(drawn) -> None:
    events = EventAccumulator(str(drawn.run)).Reload()
    (image,) = events.Images("samples/grid")
    assert image.step == drawn.step
    assert np.array_equal(pixels(image.encoded_image_string), pixels(drawn.directory / "grid.png"))
    (change,) = events.Scalars("samples/neutral_change")
    assert change.step == drawn.step
    assert change.value == pytest.approx(drawn.summary.metrics["neutral_change"]["adapter"])
    assert "samples/domain_change" in events.Tags()["scalars"]


@pytest.mark.long
def test_the_report_on_the_translator_shows_it(drawn) -> None:
    directory = drawn.workspace.root / "reports" / "dit_lora_translator" / drawn.directory.name
    metrics = read_summary(directory).metrics
    assert metrics["grid_neutral_change"] == drawn.summary.metrics["neutral_change"]["adapter"]
    assert metrics["grid_domain_change"] == drawn.summary.metrics["domain_change"]["adapter"]
    assert np.array_equal(pixels(directory / "grid.png"), pixels(drawn.directory / "grid.png"))
    assert f"(../../{TOOL}/{drawn.directory.name}/report.md)" in (directory / "report.md").read_text()


@pytest.mark.long
def test_private_prompts_stand_nowhere(drawn) -> None:
    texts = [path for path in drawn.workspace.root.rglob("*") if path.is_file() and path.name != "domain.txt"]
    assert "zorp" not in drawn.said
    assert not [path for path in texts if b"zorp" in path.read_bytes()]
    assert "domain 1 (" in (drawn.directory / "cells.csv").read_text()
    assert "domain.txt" not in (drawn.directory / "report.md").read_text()


def steps_of(run: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(run)]


def check_same_training(run: Path, other: Path) -> None:
    """Bit for bit."""
    assert steps_of(run) == steps_of(other)
    tensors, others = (load_file(one / "epoch2" / "adapter_model.safetensors") for one in (run, other))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


@pytest.mark.long
def test_nothing_of_it_reaches_the_training(drawn, tmp_path, tiny_ti2v, tiny_dataset) -> None:
    workspace = make_workspace(tmp_path, tiny_ti2v, tiny_dataset)
    launch(workspace, "dit_lora", *LORA)
    check_same_training(drawn.run, workspace.run())


@pytest.mark.parametrize("verdict", ["fail", pytest.param("inconclusive", marks=pytest.mark.long)])
def test_whatever_it_finds_training_goes_on(
    verdict, tmp_path, tiny_ti2v, tiny_dataset, monkeypatch, capsys
) -> None:
    """With a grid that is not really drawn, whose verdict is a warning also where those of [probes] stop the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe_runner, "SCRIPTS_DIR", tmp_path / "scripts")
    write_probe(tmp_path / "scripts", DRAWING, TOOL, verdict=verdict)
    write_probe(tmp_path / "scripts", REPORTING)
    workspace = make_workspace(tmp_path, tiny_ti2v, tiny_dataset)
    assert workspace.train("dit_lora", *LORA) == 0
    probes = ('probes.run=["lora_delta_budget"]', "probes.on_fail=stop")
    assert workspace.train("dit_lora", *LORA, "samples.every_n_epochs=2", *probes) == 0
    without, with_it = workspace.runs()
    check_same_training(with_it, without)
    rows = read_outcomes(with_it)
    assert [(row["tool"], row["epoch"], row["result"]) for row in rows] == [
        ("lora_delta_budget", 2, "pass"),
        (TOOL, 2, verdict),
    ]
    assert f"warning: probe {TOOL} on epoch2: {verdict}: because of the test" in capsys.readouterr().err
    events = EventAccumulator(str(with_it)).Reload()
    assert [event.value for event in events.Scalars("samples/neutral_change")] == [0.25]
    assert ("samples/grid" in events.Tags()["images"]) == (verdict == "fail")


@pytest.mark.long
def test_by_hand_it_is_the_same_grid(drawn) -> None:
    """What the run drew, its config says."""
    save = drawn.run / "epoch2"
    script = str(ROOT / "scripts" / "diagnostics" / "prompt_grid.py")
    flags = [
        "--config",
        str(drawn.run),
        "--run",
        f"adapter={save}",
        "--run_tag",
        "by_hand",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [sys.executable, script, *flags, "--reports_dir", "elsewhere"],
        capture_output=True,
        text=True,
        cwd=drawn.workspace.root,
        env=environment(),
        timeout=120,
    )
    assert done.returncode in (0, 3), done.stderr
    assert "what no flag says is as [samples] of" in done.stdout
    directory = drawn.workspace.root / "elsewhere" / TOOL / "by_hand"
    metrics = read_summary(directory).metrics
    assert metrics["settings"] == drawn.summary.metrics["settings"]
    assert metrics["neutral_change"] == drawn.summary.metrics["neutral_change"]


def test_what_cannot_be_drawn_is_refused_before_anything_is_loaded(
    tmp_path, tiny_ti2v, tiny_dataset, capsys
) -> None:
    workspace = make_workspace(tmp_path, tiny_ti2v, tiny_dataset)
    code = workspace.train("dit_lora", "samples.size=60x64", "samples.frames=4", "samples.every_n_epochs=3")
    said = capsys.readouterr().err
    check_refused(code, said, "samples.size: 60x64 px", "samples.frames: 4 frames", "1 or 5")
    code = workspace.train("dit_lora", "samples.every_n_epochs=3", "save_every_n_epochs=2")
    check_refused(code, capsys.readouterr().err, "does not save epoch 3", "write 2 or 4")
    assert not workspace.runs() and not workspace.cache.exists()


@pytest.mark.long
def test_an_encoder_is_drawn_against_the_one_that_it_was(tmp_path, tiny_ti2v, tiny_dataset) -> None:
    workspace = make_workspace(tmp_path, tiny_ti2v, tiny_dataset)
    said = launch(workspace, "encoder_ft", "max_steps=2", "optimizer.lr=1e-3", *SMALL)
    run = workspace.run()
    (row,) = read_outcomes(run)
    assert (row["tool"], row["epoch"]) == (TOOL, 1), said
    directory, summary = grid_of(workspace, f"{run.name}_epoch1")
    assert summary.metrics["neutral_latent_distance"]["encoder"] > 1e-4
    roles = {entry.role: entry.path for entry in summary.inputs}
    assert roles["text_encoder of encoder"] == f"out/{run.name}/epoch1/text_encoder.safetensors"
    events = EventAccumulator(str(run)).Reload()
    assert len(events.Images("samples/grid")) == 1 and "samples/neutral_change" in events.Tags()["scalars"]
    assert changes_of(directory)[0]["column"] == "encoder"


@pytest.mark.long
def test_of_a_pair_each_half_is_drawn_with_the_base_of_the_other(
    tmp_path, tmp_path_factory, tiny_dataset
) -> None:
    """On the trained tiny Wan, which draws what it is told: so there is something to change."""
    checkpoint = make_once(tmp_path_factory, "trained", "make_tiny_wan.py", "--trained")
    workspace = make_workspace(tmp_path, checkpoint, tiny_dataset)
    (tmp_path / "shapes.txt").write_text("a red circle\na blue square\n")
    settings = ("model.expert=both", "model.shift=5.0", "epochs=1", "optimizer.lr=0.03")
    samples = ("samples.prompts=shapes.txt", "samples.size=48x48", "samples.steps=4", "samples.seeds=1")
    launch(workspace, "dit_lora", *settings, *samples, "samples.max_neutral_change=2.0")
    pair = workspace.run()
    for expert in ("high_noise", "low_noise"):
        directory, summary = grid_of(workspace, f"{pair.name}_{expert}_epoch1")
        (adapter,) = [entry.path for entry in summary.inputs if entry.role.startswith("adapter of")]
        assert adapter == f"out/{pair.name}/{expert}/epoch1/adapter_model.safetensors"
        bases = [entry.path for entry in summary.inputs if entry.role == "base"]
        assert any("high_noise_model" in path for path in bases)
        assert any("low_noise_model" in path for path in bases)
        assert summary.metrics["neutral_change"]["adapter"] > 1e-3
        assert pixels(directory / "grid.png").std() > 20
    rows = json.loads((pair / "pair.json").read_text())
    assert "prompt_grid" in json.dumps(rows)
