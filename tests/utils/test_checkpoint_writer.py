"""Checkpoints written in the background: what is stored, when it gets its name, and what a failure leaves."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_file as really_save
from torch import nn

from utils import checkpoint_writer
from utils.checkpoint import LATEST, LoopState, complete_checkpoints, load_checkpoint, read_state
from utils.checkpoint_writer import CheckpointWriter, HostBuffers, WriteFlags
from utils.distributed import init_processes, shutdown
from utils.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    init_processes(1.0)
    yield
    shutdown()


@pytest.fixture
def stage() -> SimpleNamespace:
    weight = nn.Parameter(torch.arange(6.0).view(2, 3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return SimpleNamespace(
        trainables={"blocks.0.w": weight}, optimizer=optimizer, stage_id=0, num_stages=1, dp_rank=0
    )


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """The disk: it writes nothing before this is set."""
    event = threading.Event()

    def slow(tensors: dict, path: Path) -> None:
        assert event.wait(10)
        really_save(tensors, path)

    monkeypatch.setattr(checkpoint_writer, "save_file", slow)
    return event


def state(step: int) -> LoopState:
    return LoopState(step, 2 * step, 2, 0.0)


def write(writer: CheckpointWriter, step: int) -> None:
    writer.save(state(step))
    writer.finish()


def step_boundary(writer: CheckpointWriter) -> WriteFlags:
    """What the loop does at the end of each step, in a group of one."""
    flags = writer.flags()
    writer.advance(flags)
    return flags


def boundaries_until(writer: CheckpointWriter, condition) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        step_boundary(writer)
        time.sleep(0.002)
    assert condition()


def visible(run: Path) -> set[str]:
    return {path.name for path in run.iterdir() if not path.name.startswith(".")}


def test_training_goes_on_while_the_disk_works(tmp_path, stage, gate) -> None:
    writer = CheckpointWriter(tmp_path, stage, keep=2)
    before = stage.trainables["blocks.0.w"].detach().clone()
    moments = stage.optimizer.state[stage.trainables["blocks.0.w"]]["exp_avg"].clone()
    called: list[bool] = []
    times = writer.save(state(3), then=lambda: called.append((tmp_path / LATEST).exists()))
    assert times.stall >= times.copy >= 0
    stage.optimizer.step()  # what is written is what was, not what is
    assert step_boundary(writer) == WriteFlags(done=0, failed=0)
    assert visible(tmp_path) == set() and called == []
    gate.set()
    boundaries_until(writer, lambda: called)
    boundaries_until(writer, lambda: writer._job is None)
    assert called == [True] and visible(tmp_path) == {"global_step3", LATEST}
    assert not list(tmp_path.glob(".*"))
    stored = load_file(tmp_path / "global_step3" / "stage_0.safetensors")
    assert torch.equal(stored["param/blocks.0.w"], before)
    assert torch.equal(stored["optim/blocks.0.w/exp_avg"], moments)
    assert not torch.equal(before, stage.trainables["blocks.0.w"])


def test_nothing_is_named_before_the_last_rank_is_done(tmp_path, stage, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint_writer.dist, "get_world_size", lambda: 3)
    writer = CheckpointWriter(tmp_path, stage, keep=2)
    writer.save(state(3))
    deadline = time.monotonic() + 10
    while not writer.flags().done and time.monotonic() < deadline:
        time.sleep(0.002)
    writer.advance(WriteFlags(done=2, failed=0))
    time.sleep(0.05)
    assert visible(tmp_path) == set()
    writer.advance(WriteFlags(done=3, failed=0))
    deadline = time.monotonic() + 10
    while not writer.flags().done and time.monotonic() < deadline:
        time.sleep(0.002)
    assert visible(tmp_path) == {"global_step3", LATEST}
    writer.finish()


def test_a_second_save_waits_for_the_first(tmp_path, stage, gate) -> None:
    writer = CheckpointWriter(tmp_path, stage, keep=2)
    writer.save(state(1))
    threading.Timer(0.1, gate.set).start()
    writer.save(state(2))
    assert (tmp_path / LATEST).read_text() == "global_step1\n"
    writer.finish()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["global_step1", "global_step2"]
    assert (tmp_path / LATEST).read_text() == "global_step2\n"


@pytest.mark.parametrize("part", ["save_file", "atomic_write_text"])
@pytest.mark.parametrize(
    ("error", "words"),
    [(OSError(28, "No space left"), "the disk is full"), (OSError(5, "Input/output error"), "Input/output")],
)
def test_a_failed_write_is_raised_at_the_next_boundary(
    tmp_path, stage, monkeypatch, part, error, words
) -> None:
    writer = CheckpointWriter(tmp_path, stage, keep=2)
    write(writer, 1)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint_writer, part, fail)
    writer.save(state(2))
    with pytest.raises(UserError, match=f"global_step2.*{words}") as raised:
        boundaries_until(writer, lambda: False)
    assert raised.value.on_every_rank
    assert (tmp_path / LATEST).read_text() == "global_step1\n"
    assert read_state(tmp_path / "global_step1") == state(1)
    assert not list(tmp_path.glob(".*"))
    writer.finish()  # nothing is in flight any more


def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path, stage, monkeypatch) -> None:
    writer = CheckpointWriter(tmp_path, stage, keep=2)
    write(writer, 1)
    free = 1_900_000
    monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(UserError) as raised:
        writer.save(state(2))
    # The tensors and, for each of two files, a spare mebibyte.
    assert "global_step2: the disk is full: the checkpoint needs 2.10 MB" in str(raised.value)
    assert f"{tmp_path} has 1.90 MB free" in str(raised.value) and "untouched" in str(raised.value)
    assert visible(tmp_path) == {"global_step1", LATEST} and not list(tmp_path.glob(".*"))
    free = 2_200_000
    write(writer, 2)
    assert (tmp_path / LATEST).read_text() == "global_step2\n"


def test_old_ones_are_out_of_sight_before_they_are_removed(tmp_path, stage, monkeypatch) -> None:
    writer = CheckpointWriter(tmp_path, stage, keep=2)
    for step in (1, 2):
        write(writer, step)
    remove, removed = checkpoint_writer.shutil.rmtree, []

    def watch(path: Path, **options: object) -> None:
        if path.exists():
            removed.append((path.name, sorted(visible(tmp_path))))
        remove(path, **options)

    monkeypatch.setattr(checkpoint_writer.shutil, "rmtree", watch)
    write(writer, 3)
    assert removed == [(".global_step1.old.tmp", ["global_step2", "global_step3", LATEST])]
    assert not list(tmp_path.glob(".*"))


def test_another_copy_has_nothing_to_write_unless_state_is_shared_out(tmp_path, stage) -> None:
    stage.dp_rank = 1
    write(CheckpointWriter(tmp_path, stage, keep=2), 1)
    assert json.loads((tmp_path / "global_step1" / "loop.json").read_text())["files"] == []


def test_an_optimizer_that_begins_anew_gets_parameters_only(tmp_path, stage) -> None:
    write(CheckpointWriter(tmp_path, stage, keep=2), 1)
    weight = nn.Parameter(torch.zeros(2, 3))
    fresh = SimpleNamespace(trainables={"blocks.0.w": weight}, optimizer=torch.optim.AdamW([weight]))
    load_checkpoint(tmp_path / "global_step1", fresh, with_optimizer=False)
    assert torch.equal(weight, stage.trainables["blocks.0.w"]) and not fresh.optimizer.state
    load_checkpoint(tmp_path / "global_step1", fresh)
    assert set(fresh.optimizer.state[weight]) == {"exp_avg", "exp_avg_sq", "step"}


def test_host_memory_is_used_again() -> None:
    buffers = HostBuffers()
    source = torch.ones(3, 4).t()
    first = buffers.copy({"a": source})["a"]
    assert torch.equal(first, source) and first.data_ptr() != source.data_ptr() and first.is_contiguous()
    second = buffers.copy({"a": source * 2})["a"]
    assert second.data_ptr() == first.data_ptr() and torch.equal(second, source * 2)
    assert buffers.copy({"a": torch.zeros(5)})["a"].shape == (5,)
