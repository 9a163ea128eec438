"""Errors become one line and an exit status; of several processes one speaks."""

import pytest

from utils.cli import run_command
from utils.errors import TrainingStoppedError, UserError


def fail_with(error: BaseException):
    def body() -> int:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("a.toml: x is wrong"), 2, "error: a.toml: x is wrong\n"),
        (UserError("two\nlines"), 2, "error: two\nlines\n"),
        (TrainingStoppedError("step 3: no"), 1, "stopped: step 3: no\n"),
        (RuntimeError("first\nsecond"), 1, "failed: RuntimeError: first (--debug shows where)\n"),
        (
            PermissionError(13, "Permission denied", "/a/locked/place"),
            2,
            "error: /a/locked/place: Permission denied; check the path and its rights, and run the same command again\n",
        ),
        (
            OSError(5, "Input/output error"),
            1,
            "failed: OSError: [Errno 5] Input/output error (--debug shows where)\n",
        ),
        (KeyError(), 1, "failed: KeyError: KeyError (--debug shows where)\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_error_is_one_message_and_a_status(error, status, said, capsys) -> None:
    assert run_command(fail_with(error), debug=False) == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [UserError("x is wrong"), RuntimeError("x is wrong")])
def test_debug_shows_the_trace(error, capsys) -> None:
    assert run_command(fail_with(error), debug=True) == (2 if isinstance(error, UserError) else 1)
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "in body" in said and "x is wrong" in said


def test_the_status_of_the_body_is_passed_on(capsys) -> None:
    assert run_command(lambda: 3, debug=False) == 3
    assert capsys.readouterr().err == ""


def shared(text: str) -> UserError:
    error = UserError(text)
    error.on_every_rank = True
    return error


def own(text: str) -> UserError:
    error = UserError(text)
    error.is_own = True
    return error


@pytest.mark.parametrize(
    ("error", "has_joined", "said"),
    [
        (UserError("config"), False, ""),  # rank 0 reads the same file and says the same
        (shared("disk of rank 0"), True, ""),
        (UserError("own file"), True, "[rank 1] error: own file\n"),
        (own("no GPU"), False, "[rank 1] error: no GPU\n"),  # before the group has formed; rank 0 has one
        (TrainingStoppedError("not finite"), True, ""),  # raised alike on every rank
        (RuntimeError("own bug"), False, "[rank 1] failed: RuntimeError: own bug (--debug shows where)\n"),
    ],
)
def test_rank_1_says_only_what_rank_0_does_not_know(error, has_joined, said, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("utils.distributed.has_joined", lambda: has_joined)
    assert run_command(fail_with(error), debug=False) in (1, 2)
    assert capsys.readouterr().err == said


def test_a_rank_that_is_no_number_is_no_reason_to_fail_again(capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "many")
    assert run_command(fail_with(UserError("RANK is 'many'")), debug=False) == 2
    assert capsys.readouterr().err == "error: RANK is 'many'\n"


def test_a_name_that_is_too_long_is_cut_in_the_message(capsys) -> None:
    error = OSError(36, "File name too long", "/tmp/" + "x" * 5000)
    assert run_command(fail_with(error), debug=False) == 2
    said = capsys.readouterr().err
    assert len(said) < 400 and "File name too long" in said
