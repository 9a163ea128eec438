"""Checkpoints: their format, what a damaged one says, which one is the latest, and which are kept."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from utils.checkpoint import (
    FORMAT,
    LATEST,
    LoopState,
    complete_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    read_state,
)
from utils.checkpoint_writer import CheckpointWriter
from utils.distributed import init_processes, shutdown
from utils.errors import UserError

STATE = LoopState(
    step=3,
    samples_seen=6,
    micro_batches_per_step=2,
    train_seconds=1.5,
    micro_batches_seen=6,
    fingerprints={"the dataset": "0123"},
    descriptions={"the dataset": "6 samples"},
)


@dataclass
class Stage:
    """What checkpoints need of a `Pipeline`: one stage's parameters and their optimizer."""

    shapes: dict[str, tuple[int, ...]]
    seed: int = 0
    stage_id: int = 0
    num_stages: int = 1
    dp_rank: int = 0
    trainables: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.trainables = {
            name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in self.shapes.items()
        }
        self.optimizer = torch.optim.AdamW(list(self.trainables.values()), lr=0.1)

    def step(self) -> None:
        self.optimizer.zero_grad()
        sum(parameter.square().sum() for parameter in self.trainables.values()).backward()
        self.optimizer.step()

    def values(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.trainables.items()}


def save_checkpoint(run_dir: Path, stage: Stage, state: LoopState, keep: int) -> None:
    writer = CheckpointWriter(run_dir, stage, keep)
    writer.save(state)
    writer.finish()


SHAPES = {"blocks.0.a": (3, 4), "blocks.1.a": (2,), "blocks.2.a": (5, 1)}


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    init_processes(1.0)
    yield
    shutdown()


@pytest.fixture
def trained() -> Stage:
    stage = Stage(SHAPES)
    stage.step()
    stage.step()
    return stage


@pytest.fixture
def saved(trained, tmp_path) -> Path:
    save_checkpoint(tmp_path, trained, STATE, keep=2)
    return tmp_path / "global_step3"


# ---------------------------------------------------------------------- format


def test_a_checkpoint_holds_state_parameters_and_moments_by_name(saved, trained) -> None:
    assert {path.name for path in saved.iterdir()} == {"loop.json", "stage_0.json", "stage_0.safetensors"}
    document = json.loads((saved / "loop.json").read_text())
    assert document.pop("format") == FORMAT == 2 and document.pop("num_stages") == 1
    assert document.pop("files") == ["stage_0.safetensors", "stage_0.json"]
    assert LoopState(**document) == STATE
    stored = load_file(saved / "stage_0.safetensors")
    assert set(stored) == {
        *(f"param/{name}" for name in SHAPES),
        *(f"optim/{name}/{key}" for name in SHAPES for key in ("exp_avg", "exp_avg_sq", "step")),
    }
    assert torch.equal(stored["param/blocks.0.a"], trained.values()["blocks.0.a"])
    assert (saved.parent / LATEST).read_text() == "global_step3\n"


def test_state_comes_back(saved) -> None:
    assert read_state(saved) == STATE


def test_training_goes_on_to_the_same_bits(saved, trained) -> None:
    other = Stage(SHAPES, seed=9)
    load_checkpoint(saved, other)
    for stage in (trained, other):
        stage.step()
    expected, found = trained.values(), other.values()
    assert all(torch.equal(expected[name], found[name]) for name in SHAPES)


def test_another_number_of_stages_can_go_on(saved, trained) -> None:
    """Names do not mention stages: what one process saved, two read, each its own."""
    names = list(SHAPES)
    parts = [Stage({name: SHAPES[name] for name in part}, seed=5) for part in (names[:1], names[1:])]
    for part in parts:
        load_checkpoint(saved, part)
    for stage in (trained, *parts):
        stage.step()
    found = parts[0].values() | parts[1].values()
    assert all(torch.equal(trained.values()[name], found[name]) for name in SHAPES)


# ---------------------------------------------------------------------- which one


def test_only_the_newest_are_kept(trained, tmp_path) -> None:
    for step in (2, 9, 10, 11):
        save_checkpoint(tmp_path, trained, LoopState(step, 0, 1, 0.0), keep=2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["global_step10", "global_step11"]
    assert latest_checkpoint(tmp_path) == tmp_path / "global_step11"
    assert {path.name for path in tmp_path.iterdir()} == {"global_step10", "global_step11", LATEST}


def test_a_step_that_is_saved_again_is_replaced(trained, saved) -> None:
    trained.step()
    save_checkpoint(saved.parent, trained, STATE, keep=2)
    stored = load_file(saved / "stage_0.safetensors")
    assert torch.equal(stored["param/blocks.0.a"], trained.values()["blocks.0.a"])


def test_a_run_without_checkpoints_has_no_latest(tmp_path) -> None:
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / ".global_step5.tmp").mkdir()
    (tmp_path / "global_step").mkdir()
    (tmp_path / "global_stepX").mkdir()
    assert complete_checkpoints(tmp_path) == [] and latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("pointer", [None, b"global_step99\n", b"", b".", b"..", b"\xff\xfe", b"inputs"])
def test_a_latest_that_points_nowhere_is_not_believed(tmp_path, pointer) -> None:
    for name in ("global_step9", "global_step10", "inputs"):
        (tmp_path / name).mkdir()
    if pointer is not None:
        (tmp_path / LATEST).write_bytes(pointer)
    assert latest_checkpoint(tmp_path) == tmp_path / "global_step10"


def test_latest_decides_where_it_can(tmp_path) -> None:
    """A kill between the renaming of a checkpoint and of `latest` leaves one that nobody has pointed at yet."""
    for name in ("global_step9", "global_step10"):
        (tmp_path / name).mkdir()
    (tmp_path / LATEST).write_text("global_step9\n")
    assert latest_checkpoint(tmp_path) == tmp_path / "global_step9"


# ---------------------------------------------------------------------- damage


def refuse(checkpoint: Path, *expected: str) -> None:
    with pytest.raises(UserError) as raised:
        read_state(checkpoint)
        load_checkpoint(checkpoint, Stage(SHAPES))
    for text in expected:
        assert text in str(raised.value)


@pytest.mark.parametrize("name", ["loop.json", "stage_0.json", "stage_0.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"[]"])
def test_a_damaged_file_is_named_with_the_way_out(saved, name, content) -> None:
    path = saved / name
    path.unlink() if content is None else path.write_bytes(content)
    refuse(saved, str(path), f"delete {saved}")


def test_a_truncated_stage_is_named(saved) -> None:
    path = saved / "stage_0.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    refuse(saved, str(path), f"delete {saved}")


def test_a_stage_of_several_that_is_missing_is_named(saved) -> None:
    document = json.loads((saved / "loop.json").read_text())
    files = [f"stage_{stage}{suffix}" for stage in (0, 1) for suffix in (".safetensors", ".json")]
    (saved / "loop.json").write_text(json.dumps(document | {"files": files}))
    refuse(saved, str(saved / "stage_1.safetensors"), "missing")


def test_a_newer_format_is_not_guessed_at(saved) -> None:
    (saved / "loop.json").write_text(json.dumps({"format": FORMAT + 1, "something": "else"}))
    refuse(saved, f"checkpoint format {FORMAT + 1}, this version reads formats 1 and {FORMAT}")


def test_the_format_before_is_still_read(saved, trained) -> None:
    """Format 1 had no list of files and no descriptions."""
    document = json.loads((saved / "loop.json").read_text())
    old = {key: value for key, value in document.items() if key not in ("files", "descriptions")}
    (saved / "loop.json").write_text(json.dumps(old | {"format": 1}))
    assert read_state(saved) == replace(STATE, descriptions={})
    other = Stage(SHAPES, seed=9)
    load_checkpoint(saved, other)
    assert all(torch.equal(trained.values()[name], value) for name, value in other.values().items())
    (saved / "stage_0.json").unlink()
    refuse(saved, str(saved / "stage_0.json"), "missing")


def test_a_checkpoint_of_deepspeeds_own_is_recognised_and_named(tmp_path) -> None:
    theirs = tmp_path / "global_step7"
    theirs.mkdir()
    (theirs / "mp_rank_00_model_states.pt").write_bytes(b"x")
    (tmp_path / LATEST).write_text("global_step7")
    found = latest_checkpoint(tmp_path)
    assert found == theirs
    refuse(theirs, str(theirs), "DeepSpeed's own format", "adapter.init_from_existing")


def test_files_elsewhere_are_not_read(saved) -> None:
    document = json.loads((saved / "loop.json").read_text())
    (saved / "loop.json").write_text(json.dumps(document | {"files": ["../stage_0.safetensors"]}))
    refuse(saved, "loop.json", "damaged")


def test_other_parameters_are_refused(saved) -> None:
    with pytest.raises(UserError, match=r"holds no blocks\.7\.a"):
        load_checkpoint(saved, Stage({"blocks.7.a": (2,)}))
    with pytest.raises(UserError, match=r"blocks\.0\.a has shape \[3, 4\] there and \[3, 5\] in this run"):
        load_checkpoint(saved, Stage({"blocks.0.a": (3, 5)}))


def test_a_save_that_fails_leaves_the_old_checkpoint_and_its_pointer(saved, trained, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.checkpoint_writer.save_file", full)
    with pytest.raises(UserError, match="global_step4: the disk is full"):
        save_checkpoint(saved.parent, trained, LoopState(4, 8, 2, 2.0), keep=2)
    assert {path.name for path in saved.parent.iterdir()} == {"global_step3", LATEST}
    assert latest_checkpoint(saved.parent) == saved and read_state(saved) == STATE


def test_what_is_stored_beside_is_not_read(saved) -> None:
    """An unrelated file in the directory is not taken for a stage's."""
    save_file({"param/blocks.0.a": torch.zeros(3, 4)}, saved / "notes.safetensors")
    stage = Stage(SHAPES)
    load_checkpoint(saved, stage)
    assert stage.values()["blocks.0.a"].any()
