"""Directories that become visible only when they are whole."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from utils.distributed import init_processes, shutdown
from utils.errors import UserError
from utils.saver import export_trained, write_together


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    init_processes(1.0)
    yield
    shutdown()


def write(name: str, text: str = "x"):
    return lambda directory: (directory / name).write_text(text)


def test_the_directory_is_not_there_before_it_is_whole(tmp_path) -> None:
    target = tmp_path / "epoch1"

    def finish(directory: Path) -> None:
        assert not target.exists() and (directory / "share").exists()
        (directory / "summary").write_text("")

    write_together(target, write("share"), finish)
    assert {path.name for path in target.iterdir()} == {"share", "summary"}
    assert list(tmp_path.iterdir()) == [target]


def test_an_older_one_and_the_rest_of_a_kill_give_way(tmp_path) -> None:
    target, rest = tmp_path / "epoch1", tmp_path / ".epoch1.tmp"
    for directory in (target, rest):
        directory.mkdir()
        (directory / "old").write_text("")
    write_together(target, write("new"), lambda directory: None)
    assert {path.name for path in target.iterdir()} == {"new"}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("part", ["share", "finish"])
@pytest.mark.parametrize(
    ("error", "becomes"),
    [(OSError(28, "full"), UserError), (UserError("no"), UserError), (RuntimeError("bug"), RuntimeError)],
)
def test_a_failure_leaves_what_was_there(tmp_path, part, error, becomes) -> None:
    target = tmp_path / "epoch1"
    write_together(target, write("good"), lambda directory: None)

    def fail(directory: Path) -> None:
        (directory / "half").write_text("")
        raise error

    shares = {"share": write("share"), "finish": lambda directory: None} | {part: fail}
    with pytest.raises(becomes):
        write_together(target, shares["share"], shares["finish"])
    assert {path.name for path in target.iterdir()} == {"good"}
    assert list(tmp_path.iterdir()) == [target]


def test_a_place_that_cannot_be_written_is_the_users_to_mend(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, OSError)):
        write_together(tmp_path / "file" / "epoch1", write("x"), lambda directory: None)


def test_export_gets_every_trained_tensor_and_keeps_only_what_it_writes(tmp_path) -> None:
    trained = {"a": nn.Parameter(torch.arange(6.0).view(2, 3)), "b": nn.Parameter(torch.ones(2).bfloat16())}
    pipeline = SimpleNamespace(stage_id=0, dp_rank=0, trainables=trained)

    def export(tensors, directory, metadata):
        path = directory / "adapter.safetensors"
        save_file({name: tensor * 2 for name, tensor in tensors.items()}, path, metadata=dict(metadata))
        return [path]

    export_trained(pipeline, tmp_path / "epoch1", export, {"epoch": "1"})
    assert [path.name for path in (tmp_path / "epoch1").iterdir()] == ["adapter.safetensors"]
    saved = load_file(tmp_path / "epoch1" / "adapter.safetensors")
    assert all(torch.equal(saved[name], trained[name].detach() * 2) for name in trained)
    assert saved["b"].dtype == torch.bfloat16
