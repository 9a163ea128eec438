"""encoder_ft with `expert = "both"`: one encoder, the frozen experts in turn, whatever the layout and wherever it was cut."""

import json
import os
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.helpers.workspace import Workspace, check_refused, linked_copy, make_workspace
from utils.metrics import read_metrics, read_rows
from utils.trainer import Trainer

SETTINGS = (
    "model.shift=5.0",
    "max_steps=4",
    "checkpoint_every_n_steps=1",
    "gradient_accumulation_steps=2",
    "seed=0",
)
BOTH = ("model.expert=both", *SETTINGS)
SAVED = "epoch2/text_encoder.safetensors"


@pytest.fixture
def workspace(tmp_path, tiny_t2v, tiny_dataset) -> Workspace:
    return make_workspace(tmp_path, tiny_t2v, tiny_dataset)


def evaluated(workspace: Workspace) -> str:
    # Micro-batches of 3 out of 5 levels a sample hold both experts'.
    return f'eval_datasets=["{workspace.root / "dataset.toml"}"]'


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_t2v, tiny_dataset) -> Workspace:
    workspace = make_workspace(tmp_path_factory.mktemp("turns"), tiny_t2v, tiny_dataset)
    values = (*BOTH, evaluated(workspace), "eval_micro_batch_size_per_gpu=3")
    ended = workspace.launch(["python"], "encoder_ft", *values)
    assert ended.returncode == 0, ended.stderr
    (workspace.root / "said").write_text(ended.stderr)
    return workspace


def losses(workspace: Workspace) -> list[float]:
    return [row["loss"] for row in read_metrics(workspace.run())]


def test_each_step_lies_on_the_side_of_its_expert(done) -> None:
    ranges = [row["timesteps"] for row in read_metrics(done.run())]
    assert [one["min"] >= 875 for one in ranges] == [True, False, True, False]
    assert [one["max"] < 875 for one in ranges] == [False, True, False, True]
    said = (done.root / "said").read_text()
    assert "both experts" in said and "take turns by optimizer step" in said


@pytest.mark.parametrize(("seed", "expert"), [(0, "high_noise"), (1, "low_noise")])
def test_the_first_step_is_that_of_the_expert_whose_turn_the_seed_makes_it(workspace, seed, expert) -> None:
    both, alone = Workspace(workspace.root / "a", workspace.checkpoint), workspace
    same = (*SETTINGS, "max_steps=1", f"seed={seed}", f"dataset={workspace.root / 'dataset.toml'}")
    assert both.train("encoder_ft", "model.expert=both", *same) == 0
    assert alone.train("encoder_ft", f"model.expert={expert}", *same) == 0
    assert losses(both) == losses(alone)
    found, expected = (load_file(place.run() / "epoch1/text_encoder.safetensors") for place in (both, alone))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_metadata_and_evaluations_are_of_both(done) -> None:
    with safe_open(done.run() / SAVED, framework="pt") as file:
        facts = file.metadata()
    assert (facts["expert"], facts["boundary"]) == ("both", "0.875")
    rows = read_rows(done.run() / "eval.jsonl")
    assert rows[0]["step"] == 0 and rows[-1]["step"] == 4
    assert all(loss is not None for loss in rows[-1]["loss_by_quantile"].values())


@pytest.mark.parametrize(
    ("processes", "values"),
    [
        pytest.param(2, ("pipeline_stages=2",), marks=pytest.mark.long),
        pytest.param(2, ("gradient_accumulation_steps=1",), marks=pytest.mark.long),
        (1, ("blocks_to_swap=2",)),
    ],
    ids=["stages", "copies", "swapped"],
)
def test_whose_turn_it_is_does_not_depend_on_the_layout(done, workspace, processes, values) -> None:
    own = (*BOTH, *values, evaluated(workspace), "eval_micro_batch_size_per_gpu=3")
    if processes == 1:
        assert workspace.train("encoder_ft", *own) == 0
    else:
        launcher = ["torchrun", "--standalone", "--nproc_per_node", str(processes)]
        ended = workspace.launch(launcher, "encoder_ft", *own)
        assert ended.returncode == 0, ended.stderr
    assert losses(workspace) == losses(done)
    ours, theirs = (read_rows(place.run() / "eval.jsonl") for place in (workspace, done))
    assert [row["loss"] for row in ours] == [row["loss"] for row in theirs]


def test_a_run_that_was_cut_between_turns_goes_on_with_the_other(done, workspace, monkeypatch) -> None:
    real = Trainer._step

    def stepping(self, state, ahead):
        if state.step == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, state, ahead)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stepping)
        assert workspace.train("encoder_ft", *BOTH) == 0
    assert len(losses(workspace)) == 1
    assert workspace.train("encoder_ft", *BOTH, flags=["--resume_from_checkpoint"]) == 0
    assert losses(workspace) == losses(done)
    found, expected = (load_file(place.run() / SAVED) for place in (workspace, done))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_expert_that_is_missing_is_named(workspace, tmp_path, tiny_t2v, capsys) -> None:
    half = linked_copy(tiny_t2v, tmp_path / "half")
    for path in (half / "low_noise_model").iterdir():
        path.unlink()
    (half / "low_noise_model").rmdir()
    code = workspace.train("encoder_ft", *BOTH, f"model.ckpt_path={half}")
    check_refused(code, capsys.readouterr().err, "low_noise_model is missing")


def test_the_plan_counts_both(workspace, capsys) -> None:
    numbers = []
    for expert in ("both", "high_noise"):
        assert workspace.train("encoder_ft", f"model.expert={expert}", flags=["--plan", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        numbers.append((document["model"]["parameters"], len(document["model"]["files"])))
        text = sum(stage["bytes"]["weights"] for stage in document["stages"])
        numbers[-1] += (text,)
    assert numbers[0][:2] == (2 * numbers[1][0], 2 * numbers[1][1])
    assert numbers[1][2] < numbers[0][2] < 2 * numbers[1][2], "the encoder is there once"


@pytest.mark.long
def test_probes_run_on_what_both_have_trained(workspace) -> None:
    reports = workspace.root / "reports"
    values = ('probes.run=["te_eval"]', f"probes.reports_dir={reports}", "max_steps=1")
    assert workspace.train("encoder_ft", *BOTH, *values) == 0
    (row,) = read_rows(workspace.run() / "probes.jsonl")
    assert row["result"] in ("pass", "inconclusive", "fail") and row["report"], row
