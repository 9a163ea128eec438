import pytest

from utils.errors import UserError
from utils.probe_cli import probe_parser, run_probe


def run(outcome, argv=()):
    def probe(_):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return run_probe(probe_parser("a_probe", "Answers a question."), probe, list(argv))


@pytest.mark.parametrize(("verdict", "status"), [("pass", 0), ("fail", 1), ("inconclusive", 3)])
def test_the_verdict_is_the_exit_status(verdict, status, capsys):
    assert run(verdict) == status
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("x.toml: is missing; make it"), 2, "error: x.toml: is missing; make it\n"),
        (
            PermissionError(13, "Permission denied", "reports"),
            2,
            "error: reports: Permission denied; check the path and its rights, and run the same command again\n",
        ),
        (
            OSError(13, "Permission denied"),
            70,
            "unexpected error: PermissionError: [Errno 13] Permission denied " "(--debug shows the trace)\n",
        ),
        (ValueError("odd\nvalue"), 70, "unexpected error: ValueError: odd value (--debug shows the trace)\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_error_is_one_line(error, status, line, capsys):
    assert run(error) == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(("error", "status"), [(UserError("mend it"), 2), (ValueError("odd"), 70)])
def test_debug_shows_the_trace(error, status, capsys):
    assert run(error, ["--debug"]) == status
    text = capsys.readouterr().err
    assert "Traceback" in text and text.splitlines()[-1].startswith(
        ("error: mend it", "unexpected error: ValueError: odd")
    )
    assert "--debug" not in text.splitlines()[-1]


def test_common_flags_and_their_defaults():
    parser = probe_parser("a_probe", "Answers a question.")
    defaults = parser.parse_args([])
    assert (defaults.run_tag, defaults.reports_dir, defaults.debug) == (None, "reports", False)
    given = parser.parse_args(["--run_tag", "a", "--reports_dir", "b", "--debug"])
    assert (given.run_tag, given.reports_dir, given.debug) == ("a", "b", True)


@pytest.mark.parametrize("argv", [["--unknown"], ["--run", "abbreviated"], ["--run_tag"]])
def test_wrong_use_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("pass", argv)
    assert stopped.value.code == 2
    assert "a_probe.py: error:" in capsys.readouterr().err


def test_help_explains_the_exit_status(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("pass", ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "Answers a question." in text and "3 inconclusive" in text
