"""Runs killed at random moments lose nothing; and the checks that say so notice what they have to."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scripts.chaos import check_checkpoints, look, losses
from tests.helpers.workspace import make_workspace
from utils.checkpoint import LATEST, LoopState, loop_document
from utils.errors import TrainingStoppedError


@pytest.mark.long
def test_killed_runs_lose_nothing(tmp_path, tiny_ti2v, tiny_dataset, run_script) -> None:
    media = make_workspace(tmp_path, tiny_ti2v, tiny_dataset).media
    places = ("--out", tmp_path / "chaos", "--checkpoint", tiny_ti2v, "--media", media)
    done = run_script("chaos.py", "--kills", 3, *places)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": equal\n") == 3
    assert "3 runs killed, " in done.stdout


@pytest.fixture
def run(tmp_path) -> Path:
    """What a run leaves that was killed after step 2."""
    run = tmp_path / "20300101_000000"
    checkpoint = run / "global_step2"
    checkpoint.mkdir(parents=True)
    (run / "config.toml").write_text("")
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2))
    )
    save_file({"param/a": torch.zeros(3)}, checkpoint / "stage_0.safetensors")
    (checkpoint / "stage_0.json").write_text("{}")
    (checkpoint / "loop.json").write_text(loop_document(LoopState(2, 4, 2, 0.0), 1, ["stage_0"]))
    (run / LATEST).write_text("global_step2\n")
    return run


def test_what_is_whole_passes(run) -> None:
    check_checkpoints(run)
    assert losses(run) == [1.0, 1.0]
    assert not look(run.parent).in_save
    (run / ".global_step3.tmp").mkdir()
    assert look(run.parent).in_save and look(run.parent).step == 2


@pytest.mark.parametrize("damage", ["truncated", "missing", "pointer", "doubled"])
def test_what_is_not_is_noticed(run, damage) -> None:
    tensors = run / "global_step2" / "stage_0.safetensors"
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-4])
    elif damage == "missing":
        (run / "global_step2" / "stage_0.json").unlink()
    elif damage == "pointer":
        (run / LATEST).write_text("global_step3\n")
    else:
        with (run / "metrics.jsonl").open("a") as metrics:
            metrics.write('{"step": 2, "loss": 1.0}\n')
    with pytest.raises(TrainingStoppedError):
        look(run.parent)
