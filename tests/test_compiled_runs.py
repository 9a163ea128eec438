"""Whole runs with `compile`: the losses of plain ones, what was compiled in the metrics, and a run that goes on."""

import shutil
from itertools import pairwise

import pytest

from tests.helpers.workspace import Workspace, check_refused, make_workspace
from utils.metrics import read_metrics

RUN = ("max_steps=4", "checkpoint_every_n_steps=2", "uncond_fraction=0.3")


@pytest.fixture
def workspace(tmp_path, tiny_ti2v, tiny_dataset) -> Workspace:
    return make_workspace(tmp_path, tiny_ti2v, tiny_dataset)


def losses(workspace: Workspace) -> list[float]:
    return [row["loss"] for row in read_metrics(workspace.runs()[-1])]


@pytest.mark.parametrize("mode", ["dit_lora", pytest.param("encoder_ft", marks=pytest.mark.long)])
def test_a_compiled_run_has_the_losses_of_a_plain_one(without_inductor, mode, workspace, capsys):
    assert workspace.train(mode, *RUN) == 0
    expected = losses(workspace)
    assert all("compiled_graphs" not in row for row in read_metrics(workspace.run()))
    shutil.rmtree(workspace.out)
    capsys.readouterr()
    assert workspace.train(mode, *RUN, "compile=true") == 0
    # Measured: 3e-7 of the loss.
    assert losses(workspace) == pytest.approx(expected, rel=5e-6)
    rows = read_metrics(workspace.run())
    counts = [row["compiled_graphs"] for row in rows]
    assert counts[0] > 0 and counts == sorted(counts)
    said = capsys.readouterr().err
    assert f"step 1: {counts[0]} graph(s) compiled" in said
    assert said.count("graph(s) compiled") == 1 + sum(a < b for a, b in pairwise(counts))


@pytest.mark.long
def test_it_goes_on_compiled_and_not_unasked_plain(without_inductor, workspace, capsys):
    assert workspace.train("dit_lora", *RUN, "compile=true", "max_steps=2") == 0
    resume = ["--resume_from_checkpoint"]
    capsys.readouterr()
    code = workspace.train("dit_lora", *RUN, flags=resume)
    check_refused(code, capsys.readouterr().err, "compile: True -> False")
    assert workspace.train("dit_lora", *RUN, "compile=true", flags=resume) == 0
    assert [row["step"] for row in read_metrics(workspace.run())] == [1, 2, 3, 4]


def test_without_a_compiler_it_is_refused_before_anything_is_made(workspace, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    code = workspace.train("dit_lora", *RUN, "compile=true")
    check_refused(code, capsys.readouterr().err, "compile: is true", "C++ compiler", "compile = false")
    assert not workspace.runs() and not workspace.cache.exists()


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_two_stages_compiled_in_earnest(workspace):
    layout = ("pipeline_stages=2", "gradient_accumulation_steps=4")
    assert workspace.train("dit_lora", *RUN, "gradient_accumulation_steps=4") == 0
    expected = losses(workspace)
    shutil.rmtree(workspace.out)
    launcher = ["torchrun", "--standalone", "--nproc_per_node", "2"]
    done = workspace.launch(launcher, "dit_lora", *RUN, *layout, "compile=true", time_limit=900)
    assert done.returncode == 0, done.stderr
    assert losses(workspace) == pytest.approx(expected, rel=5e-6)
    assert read_metrics(workspace.run())[0]["compiled_graphs"] >= 2
