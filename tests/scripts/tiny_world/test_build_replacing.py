"""How `build` puts a new asset in the place of an old one."""

import shutil
from pathlib import Path

import pytest

from scripts.tiny_world.build import check_replaceable, replace_directory, restore
from utils.errors import UserError

MARKS, KNOWN = ("a.json", "b.bin"), ("a.json", "b.bin", "README.md")


def make(directory: Path, *names: str, text: str = "") -> Path:
    directory.mkdir()
    for name in names:
        (directory / name).write_text(text)
    return directory


def shown(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_what_is_no_such_directory_is_not_to_be_replaced(tmp_path):
    check_replaceable(tmp_path / "missing", KNOWN, MARKS)
    check_replaceable(make(tmp_path / "empty"), KNOWN, MARKS)
    check_replaceable(make(tmp_path / "whole", *KNOWN), KNOWN, MARKS)
    with pytest.raises(UserError, match=r"no such asset, as it has no a.json, b.bin"):
        check_replaceable(make(tmp_path / "other", "thesis.txt"), KNOWN, MARKS)
    with pytest.raises(UserError, match=r"has no b.bin"):
        check_replaceable(make(tmp_path / "half", "a.json"), KNOWN, MARKS)
    with pytest.raises(UserError, match=r"holds thesis.txt beside the asset"):
        check_replaceable(make(tmp_path / "more", *KNOWN, "thesis.txt"), KNOWN, MARKS)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no directory"):
        check_replaceable(tmp_path / "file", KNOWN, MARKS)


@pytest.mark.parametrize("is_there", [True, False])
def test_replacing_leaves_nothing_of_the_old_one_and_nothing_beside_it(tmp_path, is_there):
    if is_there:
        make(tmp_path / "target", "old.txt")
    fresh = make(tmp_path / "fresh", "new.txt", text="2")
    replace_directory(tmp_path / "target", fresh)
    assert shown(tmp_path / "target") == {"new.txt": "2"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "target"]


class Killed(BaseException):
    """What no `except` is there for, as a killed program."""


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_stopped_at_any_rename_the_next_run_has_a_whole_one(tmp_path, monkeypatch, moment):
    target = make(tmp_path / "target", "a.json", text="old")
    fresh = make(tmp_path / "fresh", "a.json", text="new")
    rename, done = Path.rename, []

    def renamed(path: Path, other: Path) -> Path:
        if len(done) == moment:
            raise Killed
        done.append(path)
        return rename(path, other)

    monkeypatch.setattr(Path, "rename", renamed)
    with pytest.raises(Killed):
        replace_directory(target, fresh)
    monkeypatch.undo()
    # Between the two renames, and only there, is there none.
    assert target.exists() == (moment != 2)
    restore(target)
    assert shown(target) == {"a.json": "old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "target"]
    replace_directory(target, fresh)
    assert shown(target) == {"a.json": "new"}


def test_stopped_while_the_old_one_is_removed_the_new_one_stays(tmp_path, monkeypatch):
    target = make(tmp_path / "target", "a.json", text="old")
    fresh = make(tmp_path / "fresh", "a.json", text="new")

    remove = shutil.rmtree

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.name == ".target.old.tmp":
            raise Killed
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr("scripts.tiny_world.build.shutil.rmtree", killed)
    with pytest.raises(Killed):
        replace_directory(target, fresh)
    monkeypatch.undo()
    restore(target)
    assert shown(target) == {"a.json": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "target"]


def test_an_empty_directory_does_not_stand_for_what_was_put_aside(tmp_path):
    target = make(tmp_path / "target", "a.json", text="old")
    shutil.move(target, tmp_path / ".target.old.tmp")
    make(target)
    restore(target)
    assert shown(target) == {"a.json": "old"}
