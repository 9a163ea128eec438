"""Whole runs with what saves memory: the same losses and files, also where a run is continued in another way."""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.workspace import Workspace, check_refused, make_workspace
from utils.metrics import read_metrics

RUN = ("max_steps=4", "checkpoint_every_n_steps=2", "adapter.dropout=0.2")
SAVING = ("blocks_to_swap=3", 'activation_checkpointing="offload"')


@pytest.fixture
def workspace(tmp_path, tiny_ti2v, tiny_dataset) -> Workspace:
    return make_workspace(tmp_path, tiny_ti2v, tiny_dataset)


def results(workspace: Workspace) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the newest run, and its last adapter."""
    run = workspace.runs()[-1]
    adapters = sorted(run.glob("epoch*/adapter_model.safetensors"))
    return [row["loss"] for row in read_metrics(run)], load_file(adapters[-1])


def test_a_run_may_go_on_with_another_way_of_saving_memory(workspace, capsys):
    assert workspace.train("dit_lora", *RUN, "activation_checkpointing=false") == 0
    losses, adapter = results(workspace)
    (workspace.out).rename(workspace.root / "plain")
    assert workspace.train("dit_lora", *RUN, *SAVING, "max_steps=2") == 0
    resume = ["--resume_from_checkpoint"]
    others = ("blocks_to_swap=1", 'activation_checkpointing="selective"')
    assert workspace.train("dit_lora", *RUN, *others, flags=resume) == 0
    again, continued = results(workspace)
    assert again == losses and len(losses) == 4
    assert all(torch.equal(continued[name], adapter[name]) for name in adapter)
    capsys.readouterr()
    # Weights in 8 bits are other weights: such a run is another one.
    code = workspace.train("dit_lora", *RUN, 'model.transformer_dtype="float8"', "max_steps=5", flags=resume)
    check_refused(code, capsys.readouterr().err, "model.transformer_dtype: (not set) -> 'float8'")


@pytest.mark.parametrize("mode", ["dit_lora", "encoder_ft"])
def test_float8_trains_and_says_what_it_keeps(mode, workspace, capsys):
    flags = ("max_steps=2", 'model.transformer_dtype="float8"', "blocks_to_swap=2")
    assert workspace.train(mode, *flags) == 0
    said = capsys.readouterr().err
    (table,) = [line for line in said.splitlines() if " (" in line and ".. head)" in line]
    assert table.split()[-1] == "MB"  # in host memory: the swapped blocks
    rows = read_metrics(workspace.run())
    assert len(rows) == 2 and all(0 < row["loss"] < 10 and row["grad_norm"] > 0 for row in rows)


def test_more_blocks_than_can_be_swapped_are_refused_before_anything_is_read(workspace, capsys):
    code = workspace.train("dit_lora", "blocks_to_swap=4")
    check_refused(code, capsys.readouterr().err, "blocks_to_swap", "at most 3 can be swapped")
    assert workspace.runs() == []
