"""Nothing half-written, whichever library does the writing."""

import errno
import os

import pytest
from safetensors import SafetensorError

from utils.errors import UserError
from utils.files import atomic_directory, atomic_path, atomic_write_text, disk_errors_as_user_errors


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "out: the disk is full; free some space"),
        (errno.EDQUOT, "out: the disk is full"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EACCES, "out: not writable (Permission denied)"),
        (errno.EROFS, "out: not writable (Read-only file system)"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_errors_of_the_disk_are_the_users_to_mend(number, said, wrapped) -> None:
    text = f"I/O error: something (os error {number})"
    error = SafetensorError(text) if wrapped else OSError(number, os.strerror(number))
    with pytest.raises(UserError) as raised, disk_errors_as_user_errors("out"):
        raise error
    assert said in str(raised.value) and raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "x"), SafetensorError("no header"), ValueError("x"), UserError("(os error 28)")],
)
def test_other_errors_pass_unchanged(error) -> None:
    with pytest.raises(type(error)) as raised, disk_errors_as_user_errors("out"):
        raise error
    assert raised.value is error


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path) -> None:
    target = tmp_path / "file.txt"
    atomic_write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_directory_appears_whole_or_not_at_all(tmp_path) -> None:
    target = tmp_path / "run"
    with pytest.raises(RuntimeError), atomic_directory(target) as temporary:
        (temporary / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_directory(target) as temporary:
        (temporary / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x" and list(tmp_path.iterdir()) == [target]
    with pytest.raises(UserError, match="exists already"), atomic_directory(target):
        pass
