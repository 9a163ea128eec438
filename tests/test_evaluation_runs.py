"""Evaluation as a person runs it: fixed values in every layout, paired with the first, and no trace in training."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.workspace import Workspace, check_refused, make_workspace
from utils.eval_records import EVAL_FILE, SAMPLES_DIR
from utils.metrics import read_metrics, read_rows

# Everything random is on: what evaluation must not touch in training, and what it must leave out itself.
LORA = (
    "max_steps=5",
    "uncond_fraction=0.3",
    "adapter.dropout=0.2",
    "checkpoint_every_n_steps=1",
    "keep_checkpoints=9",
)
QUANTILES = "eval_quantiles=[0.2,0.8]"
ENCODER = ("max_steps=2", "model.text_encoder_dropout=0.1", "uncond_fraction=0.3")
AUG = ('model.caption_aug={enable=true,keywords=["circle","square","triangle"],single_token=0.5}',)


def evaluation(workspace: Workspace, *more: str) -> tuple[str, ...]:
    table = f'eval_datasets=[{{name = "holdout", config = "{workspace.root / "dataset.toml"}"}}]'
    return (table, QUANTILES, *more)


def rows_of(run: Path) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key != "seconds"} for row in read_rows(run / EVAL_FILE)
    ]


def samples_of(run: Path, step: int) -> dict:
    return json.loads((run / SAMPLES_DIR / "holdout" / f"step{step}.json").read_text())


@pytest.fixture
def workspace(tmp_path, tiny_ti2v, tiny_dataset) -> Workspace:
    return make_workspace(tmp_path, tiny_ti2v, tiny_dataset)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tiny_ti2v, tiny_dataset) -> Workspace:
    """An uninterrupted translator run, evaluated before it, after steps 2 and 4, and at the end."""
    workspace = make_workspace(tmp_path_factory.mktemp("evaluated"), tiny_ti2v, tiny_dataset)
    extra = evaluation(workspace, "eval_every_n_steps=2", "eval_every_n_epochs=0")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert workspace.train("dit_lora", *LORA, *extra) == 0
    (workspace.root / "said").write_text(said.getvalue())
    return workspace


def test_rows_stand_where_they_are_due_and_say_what_they_should(evaluated) -> None:
    run = evaluated.run()
    rows = rows_of(run)
    assert [(row["step"], row["epoch"]) for row in rows] == [(0, 0), (2, 1), (4, 2), (5, 2)]
    for row in rows:
        assert row["dataset"] == "holdout" and row["num_samples"] == 6 and row["first_step"] == 0
        assert set(row["loss_by_quantile"]) == {"0.2", "0.8"}
        assert row["loss"] == pytest.approx(sum(row["loss_by_quantile"].values()) / 2)
        losses = [sum(sample["loss"]) / 2 for sample in samples_of(run, row["step"])["samples"]]
        assert row["loss"] == pytest.approx(sum(losses) / 6)
    for row in rows[1:]:
        assert row["change"] == pytest.approx(row["loss"] - rows[0]["loss"], abs=1e-12) and row["change"] < 0
        assert row["change_interval"][0] < row["change"] < row["change_interval"][1]
        assert row["loss_adapter_off"] == rows[0]["loss_adapter_off"]
        assert row["adapter_effect"] == row["change"]
    said = (evaluated.root / "said").read_text()
    assert said.count("evaluation at step ") == 4
    assert f"evaluation at step 5: holdout: loss {rows[-1]['loss']:.4f}; {rows[-1]['change']:+.4f} [" in said
    events = EventAccumulator(str(run)).Reload()
    found = {event.step: event.value for event in events.Scalars("eval/holdout/loss")}
    assert found == pytest.approx({row["step"]: row["loss"] for row in rows})
    assert (run / "inputs" / "eval_holdout_dataset.toml").read_text() == (
        evaluated.root / "dataset.toml"
    ).read_text()


def test_without_its_adapter_the_model_is_the_base(evaluated, workspace) -> None:
    """Bit for bit: before the first step B is zero, and switched off after training it is as if it were."""
    first = samples_of(evaluated.run(), 0)["samples"]
    assert all(sample["loss"] == sample["loss_adapter_off"] for sample in first)
    late = evaluation(workspace, "eval_before_first_step=false")
    assert workspace.train("dit_lora", *LORA, *late, "max_steps=3") == 0
    trained = samples_of(workspace.run(), 3)["samples"]
    assert [s["loss_adapter_off"] for s in trained] == [s["loss_adapter_off"] for s in first]
    assert all(s["loss"] != s["loss_adapter_off"] for s in trained)
    (row,) = rows_of(workspace.run())  # the end of the epoch and of the run: once
    assert "change" not in row and row["adapter_effect"] < 0


@pytest.mark.parametrize(("mode", "settings"), [("dit_lora", LORA), ("encoder_ft", (*ENCODER, *AUG))])
def test_training_goes_on_as_if_nothing_had_happened(mode, settings, workspace, tiny_ti2v) -> None:
    assert workspace.train(mode, *settings) == 0
    extra = evaluation(workspace, "eval_every_n_steps=1", "eval_micro_batch_size_per_gpu=2")
    assert workspace.train(mode, *settings, *extra) == 0
    without, with_it = workspace.runs()
    expected = [(row["loss"], row["grad_norm"]) for row in read_metrics(without)]
    assert [(row["loss"], row["grad_norm"]) for row in read_metrics(with_it)] == expected
    assert len(rows_of(with_it)) == len(expected) + 1
    mine, other = (max(run.glob("epoch*/*.safetensors")) for run in (with_it, without))
    tensors, others = load_file(mine), load_file(other)
    assert tensors and all(torch.equal(tensors[name], others[name]) for name in others)
    assert not workspace.leftovers()


def test_the_encoder_is_evaluated_live_on_whole_captions(workspace) -> None:
    extra = evaluation(workspace)
    assert workspace.train("encoder_ft", *ENCODER, *AUG, *extra) == 0
    assert workspace.train("encoder_ft", "max_steps=1", *extra) == 0
    augmented, plain = (rows_of(run) for run in workspace.runs())
    assert augmented[0] == plain[0]  # no dropout, no empty caption, no keyword alone
    assert [row["step"] for row in augmented] == [0, 2]
    assert augmented[1]["loss"] != augmented[0]["loss"] and "loss_adapter_off" not in augmented[1]


@pytest.mark.long
def test_a_run_that_goes_on_has_each_evaluation_once(evaluated, workspace, capsys) -> None:
    extra = evaluation(workspace, "eval_every_n_steps=2", "eval_every_n_epochs=0")
    assert workspace.train("dit_lora", *LORA, *extra) == 0
    run = workspace.run()
    # As a kill after step 3 leaves it: evaluations of later steps, and the checkpoint before.
    for step in (4, 5):
        for path in (run / f"global_step{step}").iterdir():
            path.unlink()
        (run / f"global_step{step}").rmdir()
    (run / "latest").write_text("global_step3\n")
    capsys.readouterr()
    assert workspace.train("dit_lora", *LORA, *extra, flags=["--resume_from_checkpoint"]) == 0
    assert capsys.readouterr().err.count("evaluation at step ") == 2
    assert rows_of(run) == rows_of(evaluated.run())
    for step in (0, 2, 4, 5):
        assert samples_of(run, step)["samples"] == [
            sample | {"sample": sample["sample"].replace(str(evaluated.root), str(workspace.root))}
            for sample in samples_of(evaluated.run(), step)["samples"]
        ]
    events = EventAccumulator(str(run)).Reload().Scalars("eval/holdout/loss")
    assert [event.step for event in events] == [0, 2, 4, 5]
    # When to evaluate may change, what is evaluated not.
    longer = ("max_steps=6", "eval_every_n_steps=3")
    flags = ["--resume_from_checkpoint"]
    capsys.readouterr()
    code = workspace.train("dit_lora", *LORA, *extra, *longer, "eval_quantiles=[0.5]", flags=flags)
    check_refused(code, capsys.readouterr().err, "step0.json", "another name")
    assert workspace.train("dit_lora", *LORA, *extra, *longer, flags=flags) == 0
    assert [row["step"] for row in rows_of(run)] == [0, 2, 4, 5, 6]


def test_more_in_a_micro_batch_change_rounding_only(evaluated, workspace) -> None:
    extra = evaluation(workspace, "eval_micro_batch_size_per_gpu=5")
    assert workspace.train("dit_lora", *LORA, *extra, "max_steps=1") == 0
    alone = [loss for sample in samples_of(evaluated.run(), 0)["samples"] for loss in sample["loss"]]
    together = [loss for sample in samples_of(workspace.run(), 0)["samples"] for loss in sample["loss"]]
    assert together == pytest.approx(alone, rel=2e-6)  # measured: 2e-7


@pytest.mark.parametrize(
    ("processes", "stages"),
    [(2, 2), pytest.param(4, 2, marks=pytest.mark.long), pytest.param(3, 3, marks=pytest.mark.long)],
)
def test_every_layout_has_the_same_bits(processes, stages, evaluated, workspace) -> None:
    accumulation = 2 * stages // processes
    extra = evaluation(workspace, "eval_every_n_steps=2", "eval_every_n_epochs=0")
    layout = (f"pipeline_stages={stages}", f"gradient_accumulation_steps={accumulation}")
    launcher = ["torchrun", "--standalone", "--nproc_per_node", str(processes)]
    done = workspace.launch(launcher, "dit_lora", *LORA, *layout, *extra)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("evaluation at step ") == 4
    run = workspace.run()
    for step in (0, 2, 4, 5):
        ours, theirs = samples_of(run, step)["samples"], samples_of(evaluated.run(), step)["samples"]
        assert [sample["loss"] for sample in ours] == [sample["loss"] for sample in theirs], step
    assert rows_of(run) == rows_of(evaluated.run())


def test_an_empty_or_missing_eval_dataset_is_refused_before_training(workspace, capsys) -> None:
    code = workspace.train("dit_lora", 'eval_datasets=["nowhere.toml"]')
    check_refused(code, capsys.readouterr().err, 'eval_datasets[0].config: "nowhere.toml" does not exist')
    empty = workspace.root / "empty"
    empty.mkdir()
    (workspace.root / "empty.toml").write_text(f'[[directory]]\npath = "{empty}"\n')
    code = workspace.train("dit_lora", f'eval_datasets=["{workspace.root / "empty.toml"}"]')
    check_refused(code, capsys.readouterr().err, str(empty))
    assert not workspace.runs()
