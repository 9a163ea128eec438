"""Budgets in real runs: through the launcher, over stages and copies, stopped, projected, and resumed."""

import pytest
import torch
from safetensors.torch import load_file

from models.wan.checkpoint import open_transformer
from models.wan.probes.delta import measure_delta
from models.wan.probes.subject import Subject
from tests.helpers.workspace import Workspace, make_workspace
from utils.checkpoint import LATEST
from utils.metrics import read_metrics

TWO = ("deepspeed", "--num_gpus", "2")
TORCHRUN = ("torchrun", "--standalone", "--nproc_per_node", "2")
# At this rate every module passes the cap within two steps.
LORA = (
    "max_steps=6",
    "optimizer.lr=1e-2",
    "adapter.rank=4",
    "budget.max_delta_ratio=0.01",
    "save_every_n_epochs=0",
)
PROJECT = (*LORA, "budget.action=project", "budget.every_n_steps=2", "checkpoint_every_n_steps=3")
ENCODER = ("max_steps=6", "optimizer.lr=1e-2", "budget.every_n_steps=2", "checkpoint_every_n_steps=1")


@pytest.fixture
def workspace(tmp_path, tiny_ti2v, tiny_dataset) -> Workspace:
    return make_workspace(tmp_path, tiny_ti2v, tiny_dataset)


def saved_ratios(workspace, run):
    (adapter,) = run.glob("epoch*/adapter_model.safetensors")
    subject = Subject(adapter, workspace.checkpoint, None, None, None, ())
    result = measure_delta(
        subject, open_transformer(workspace.checkpoint), norms_directory=workspace.root / "norms"
    )
    return [delta.ratio for delta in result.deltas]


@pytest.mark.long
@pytest.mark.parametrize("launcher", [TORCHRUN])
def test_a_projected_adapter_lies_on_its_cap(workspace, launcher) -> None:
    done = workspace.launch(launcher, "dit_lora", *PROJECT, "pipeline_stages=2")
    assert done.returncode == 0, done.stderr
    ratios = saved_ratios(workspace, workspace.run())
    # Measured: 6e-8 from the cap.
    assert max(ratios) == pytest.approx(0.01, rel=1e-6) and len(ratios) == 8
    rows = read_metrics(workspace.run())
    measured = [row for row in rows if "max_delta_ratio" in row]
    assert [row["step"] for row in measured] == [2, 4, 6]
    for row in measured:
        assert row["projected_modules"] > 0 and row["max_delta_ratio"] == pytest.approx(0.01, rel=1e-6)
        assert row["max_delta_ratio_before_projection"] > 0.01
    assert "||dW|| / ||W|| at most 0.0100" in done.stderr


@pytest.mark.long
def test_a_projection_is_the_same_in_every_layout_and_after_a_resume(workspace, tmp_path) -> None:
    """One process, two stages, two copies with shared optimizer state, and a run that went on from step 3."""
    layouts = {
        "one": ((), ()),
        "stages": (TORCHRUN, ("pipeline_stages=2",)),
        "copies": (TORCHRUN, ("gradient_accumulation_steps=1", "zero_stage=1")),
    }
    losses, adapters = {}, {}
    for name, (launcher, overrides) in layouts.items():
        out = f"output_dir={workspace.out / name}"
        done = workspace.launch(launcher or ("python",), "dit_lora", *PROJECT, *overrides, out)
        assert done.returncode == 0, done.stderr
        (run,) = (workspace.out / name).iterdir()
        losses[name] = [row["loss"] for row in read_metrics(run)]
        (adapter,) = run.glob("epoch*/adapter_model.safetensors")
        adapters[name] = load_file(adapter)
    assert losses["one"] == losses["stages"] == losses["copies"]
    for name in ("stages", "copies"):
        assert all(torch.equal(adapters["one"][key], value) for key, value in adapters[name].items())
    half = f"output_dir={workspace.out / 'half'}"
    assert workspace.train("dit_lora", *PROJECT, "max_steps=3", half) == 0
    (run,) = (workspace.out / "half").iterdir()
    assert workspace.train("dit_lora", *PROJECT, half, flags=("--resume_from_checkpoint", str(run))) == 0
    assert [row["loss"] for row in read_metrics(run)] == losses["one"]
    last = max(run.glob("epoch*/adapter_model.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    assert all(torch.equal(adapters["one"][key], value) for key, value in load_file(last).items())


def test_a_budget_really_stops_a_launched_run(workspace) -> None:
    stop = (*LORA, "budget.action=stop", "budget.every_n_steps=3", "checkpoint_every_n_steps=2")
    done = workspace.launch(TWO, "dit_lora", *stop, "pipeline_stages=2")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "stopped: step" in line]
    # Step 2 is measured because it saves; the checkpoint that would have been over the cap is not written.
    assert len(said) == 1 and "stopped: step 2: 8 adapted module(s)" in said[0]
    assert "there is no checkpoint yet" in said[0]
    assert not (workspace.run() / LATEST).exists() and not list(workspace.run().glob("epoch*"))


def test_nothing_above_a_cap_that_stops_is_saved_because_somebody_asks_for_it(
    workspace, monkeypatch, capsys
) -> None:
    """`save_quit` in a step that neither the interval nor a schedule measures."""
    from utils.stopping import RunControl

    monkeypatch.setattr(RunControl, "wants_checkpoint", property(lambda self: True))
    overrides = (*LORA, "budget.action=stop", "budget.every_n_steps=100", "checkpoint_every_n_epochs=0")
    assert workspace.train("dit_lora", *overrides, "budget.max_delta_ratio=1e-6") == 1
    assert "stopped: step 1: 8 adapted module(s)" in capsys.readouterr().err
    assert not (workspace.run() / LATEST).exists() and not list(workspace.run().glob("global_step*"))


@pytest.mark.long
def test_a_projection_depends_on_no_precision_and_no_place_of_the_base(workspace) -> None:
    """The norm is that of the file's weight: in float32 and in bfloat16, in a block's own memory and swapped out."""
    ratios = {}
    for name, more in (
        ("plain", ()),
        ("swapped", ("blocks_to_swap=3",)),
        ("float8", ("model.transformer_dtype=float8",)),
    ):
        out = f"output_dir={workspace.out / name}"
        assert workspace.train("dit_lora", *LORA, "budget.every_n_steps=1", "max_steps=1", *more, out) == 0
        (run,) = (workspace.out / name).iterdir()
        ratios[name] = read_metrics(run)[0]["max_delta_ratio"]
        saved = saved_ratios(workspace, run)
        assert max(saved) == pytest.approx(ratios[name], rel=1e-9)
    assert ratios["plain"] == ratios["swapped"]


@pytest.mark.long
def test_the_drift_of_an_encoder_is_measured_and_stops_the_run(workspace) -> None:
    free = workspace.launch(
        TORCHRUN, "encoder_ft", *ENCODER, "budget.max_neutral_drift=1.0", "pipeline_stages=2"
    )
    assert free.returncode == 0, free.stderr
    rows = read_metrics(workspace.run())
    drifts = {row["step"]: row["neutral_drift"] for row in rows if "neutral_drift" in row}
    assert list(drifts) == [2, 4, 6] and 0 < drifts[2] < drifts[6] < 1
    assert f"drift of the neutral prompts {drifts[6]:.4f}" in free.stderr
    cap = (drifts[2] + drifts[4]) / 2
    limit = (
        f"budget.max_neutral_drift={cap}",
        "budget.action=stop",
        "budget.every_n_steps=2",
        f"output_dir={workspace.root / 'limited'}",
    )
    stop = [override for override in ENCODER if not override.startswith(("budget", "checkpoint"))]
    assert workspace.train("encoder_ft", *stop, *limit, "checkpoint_every_n_steps=3") == 1
    (run,) = (workspace.root / "limited").iterdir()
    limited = read_metrics(run)
    assert [row["step"] for row in limited][-1] in (3, 4)
    assert [row["loss"] for row in limited] == [row["loss"] for row in rows][: len(limited)]
    same = {row["step"]: row["neutral_drift"] for row in limited if "neutral_drift" in row}
    assert same[2] == drifts[2]  # in one process as on two stages


def test_measuring_the_drift_changes_no_number(workspace) -> None:
    losses = []
    for name, budget in (
        ("without", ()),
        ("with", ("budget.max_neutral_drift=1.0", "budget.every_n_steps=1")),
    ):
        dropout = ("model.text_encoder_dropout=0.1", "max_steps=3", f"output_dir={workspace.out / name}")
        assert workspace.train("encoder_ft", *dropout, *budget) == 0
        (run,) = (workspace.out / name).iterdir()
        losses.append([row["loss"] for row in read_metrics(run)])
    assert losses[0] == losses[1]


def test_a_resumed_run_is_held_against_the_base_and_not_against_its_checkpoint(workspace) -> None:
    whole = (
        "optimizer.lr=1e-2",
        "budget.max_neutral_drift=1.0",
        "budget.every_n_steps=2",
        "checkpoint_every_n_steps=2",
    )
    assert workspace.train("encoder_ft", *whole, "max_steps=4", f"output_dir={workspace.out / 'a'}") == 0
    assert workspace.train("encoder_ft", *whole, "max_steps=2", f"output_dir={workspace.out / 'b'}") == 0
    (first,), (second,) = (workspace.out / "a").iterdir(), (workspace.out / "b").iterdir()
    flags = ("--resume_from_checkpoint", str(second))
    assert (
        workspace.train("encoder_ft", *whole, "max_steps=4", f"output_dir={workspace.out / 'b'}", flags=flags)
        == 0
    )
    assert read_metrics(first)[-1]["neutral_drift"] == read_metrics(second)[-1]["neutral_drift"] > 0


def test_prompts_of_one_s_own(workspace, capsys) -> None:
    budget = (
        "budget.max_neutral_drift=0.5",
        f"budget.neutral_prompts={workspace.root / 'mine.txt'}",
        "max_steps=1",
    )
    assert workspace.train("encoder_ft", *budget) == 2
    assert "mine.txt" in capsys.readouterr().err
    (workspace.root / "mine.txt").write_bytes(b"caf\xe9\n")
    assert workspace.train("encoder_ft", *budget) == 2
    assert (
        "not UTF-8" in capsys.readouterr().err and not workspace.cache.exists()
    )  # before anything is cached
    (workspace.root / "mine.txt").write_text("a blue cube\n")
    assert workspace.train("encoder_ft", *budget) == 0
    assert "neutral_drift" in read_metrics(workspace.run())[-1]
    (workspace.root / "mine.txt").write_text("a green cube\n")
    resume = ("--resume_from_checkpoint", str(workspace.run()))
    assert workspace.train("encoder_ft", *budget, "max_steps=2", flags=resume) == 2
    assert "neutral_prompts" in capsys.readouterr().err  # it would be held against other prompts than before
