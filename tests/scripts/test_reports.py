import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tests.helpers.rights import locked_folder
from utils.report import Report
from utils.report_runs import change, choose_report, compare_inputs, compare_metrics, find_reports

ROOT = Path(__file__).resolve().parents[2]


def load_script():
    spec = importlib.util.spec_from_file_location("reports_script", ROOT / "scripts" / "reports.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["reports_script"] = module
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture
def make(tmp_path):
    """`make(tool, tag, metrics, inputs=..., ...)`: write a report through the one writer."""

    def write(tool, tag, metrics=None, *, verdict="pass", caps=None, inputs=(), headline="all is well"):
        report = Report(tool, "What is it?", tmp_path / "reports", tag)
        for name, value in (metrics or {}).items():
            report.metric(name, value)
        for name, value in (caps or {}).items():
            report.cap(name, value)
        for role, path in inputs:
            report.add_input(role, path)
        return report.write(verdict, headline, "-", "-")

    return write


@pytest.fixture
def call(tmp_path, capsys):
    """`call("list", ...)`: status, what was printed, and errors."""

    def run(*words):
        status = script.main([*map(str, words), "--reports_dir", str(tmp_path / "reports")])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def cells(text, name):
    """The cells of the row that begins with `name`."""
    (line,) = [line for line in text.splitlines() if line.split("  ")[0].strip() == name]
    return [cell.strip() for cell in line.split("  ") if cell.strip()][1:]


def test_list_shows_what_summaries_say(make, call):
    make("b_tool", "one", verdict="fail", headline="too far")
    make("a_tool", "two")
    status, out, err = call("list")
    assert (status, err) == (0, "")
    assert out.splitlines()[0].split() == ["created", "tool", "run_tag", "verdict", "headline"]
    assert {tuple(line.split()[1:4]) for line in out.splitlines()[2:]} == {
        ("a_tool", "two", "pass"),
        ("b_tool", "one", "fail"),
    }
    status, out, _ = call("list", "--tool", "b_tool")
    assert status == 0 and "too far" in out and "a_tool" not in out
    status, out, err = call("list", "--tool", "c_tool")
    assert status == 2 and err == err.splitlines()[0] + "\n" and "a_tool, b_tool" in err


def test_reports_are_listed_oldest_first(make, call, tmp_path):
    for tag, year in (("z", 2030), ("a", 2031), ("m", 2029)):
        path = make("tool", tag) / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"created": f"{year}-01-01T00:00:00Z"}))
    _, out, _ = call("list")
    assert [line.split()[2] for line in out.splitlines()[2:]] == ["m", "z", "a"]


DAMAGES = {
    "not JSON": lambda path: path.write_text("{"),
    "another schema": lambda path: path.write_text("{}"),
    "gone": lambda path: path.unlink(),
    "bytes": lambda path: path.write_bytes(b"\xff\xfe"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "renamed": lambda path: path.write_text(path.read_text().replace('"bad"', '"other"')),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_reports_are_named_and_skipped_in_a_list_and_refused_in_a_comparison(make, call, damage):
    make("tool", "good")
    DAMAGES[damage](make("tool", "bad") / "summary.json")
    status, out, err = call("list")
    assert (status, err) == (0, "")
    skipped = [line for line in out.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == 1 and "tool/bad" in skipped[0]
    assert "good" in out
    if damage != "renamed":
        status, out, err = call("compare", "good", "bad")
        assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1


def test_what_is_still_being_written_is_no_report(make, call, tmp_path):
    make("tool", "good")
    (tmp_path / "reports" / "tool" / ".x.abc.tmp").mkdir()
    assert "skipped" not in call("list")[1]


def test_comparison_has_values_changes_caps_inputs_and_verdicts(make, call, tmp_path):
    one, other = tmp_path / "one.bin", tmp_path / "other.bin"
    one.write_bytes(b"1")
    other.write_bytes(b"2")
    make(
        "tool",
        "a",
        {"ratio": 0.04, "count": 10, "same": 1, "group": {"x": 1.0}, "odd": True},
        caps={"max": 0.05},
        inputs=[("base", one), ("kept", one)],
    )
    make(
        "tool",
        "b",
        {"ratio": 0.05, "count": 4, "same": 1, "group": {"x": 0.0}, "new": "word", "odd": 1},
        caps={"max": 0.1},
        verdict="fail",
        inputs=[("base", other), ("kept", one)],
    )
    status, out, _ = call("compare", "tool/a", "tool/b")
    assert status == 0
    assert cells(out, "ratio") == ["0.04000", "0.05000", "+0.01", "+25.00%"]
    assert cells(out, "count") == ["10", "4", "-6", "-60.00%"]
    assert cells(out, "group.x") == ["1.000", "0", "-1", "-100.00%"]
    assert cells(out, "new") == ["-", "word"]
    assert cells(out, "odd") == ["yes", "1"]
    assert cells(out, "max") == ["0.05000", "0.1000", "+0.05", "+100.00%"]
    assert "one.bin" in out and "other.bin" in out and "kept" not in out
    assert "1 more metrics are equal" in out and not any(line.startswith("same") for line in out.splitlines())
    assert cells(call("compare", "a", "b", "--all")[1], "same") == ["1", "1", "0"]
    assert "the versions are the same" in out
    verdicts = [line for line in out.splitlines() if line.startswith(("A ", "B "))]
    assert "pass" in verdicts[0] and "fail" in verdicts[1]


def test_versions_that_differ_are_shown(make, call):
    make("tool", "a")
    path = make("tool", "b") / "summary.json"
    values = json.loads(path.read_text())
    values["versions"]["python"] = "3.99.0"
    path.write_text(json.dumps(values))
    assert "3.99.0" in cells(call("compare", "a", "b")[1], "python")


def test_three_reports_have_no_changes_but_all_values(make, call):
    for tag, value in (("a", 1), ("b", 2), ("c", 2)):
        make("tool", tag, {"n": value})
    _, out, _ = call("compare", "a", "b", "c")
    assert cells(out, "n") == ["1", "2", "2"]
    assert "change" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "at least two"),
        (["a", "nothing"], "no such report"),
        (["a", "twice"], "several tools have a report of this name"),
        (["tool/a", "other/twice"], "different tools"),
        (["a", ""], "no such report"),
        (["a", "../reports"], "no such report"),
    ],
)
def test_wrong_use_is_one_line(make, call, words, message):
    make("tool", "a")
    make("tool", "twice")
    make("other", "twice")
    status, out, err = call("compare", *words)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1


def test_reports_are_named_in_three_ways(make, tmp_path):
    directory = make("tool", "a")
    for name in ("a", "tool/a", str(directory), str(directory / "summary.json")):
        assert choose_report(tmp_path / "reports", name).run_tag == "a"


def test_a_directory_that_is_not_there_and_one_that_is_empty(call, tmp_path):
    assert call("list")[0] == 2
    (tmp_path / "reports").mkdir()
    status, out, _ = call("list")
    assert status == 0 and "no reports" in out


def test_lists_of_named_tables_are_compared_by_name(make, tmp_path):
    make("tool", "a", {"parts": [{"name": "x", "n": 1}, {"name": "y", "n": 2}], "list": [1, 2]})
    make("tool", "b", {"parts": [{"name": "y", "n": 2}, {"name": "x", "n": 5}], "list": [1, 3]})
    summaries = find_reports(tmp_path / "reports").summaries
    lines = {line.name: line.values for line in compare_metrics(summaries) if line.differs}
    assert lines == {"parts.x.n": (1, 5), "list": ("1, 2", "1, 3")}


def test_the_same_content_elsewhere_is_no_other_input(make, tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).write_bytes(b"same")
        make("tool", name, inputs=[("base", tmp_path / name)])
    assert compare_inputs(find_reports(tmp_path / "reports").summaries) == []


def test_changes_of_what_is_no_number():
    assert change("a", "b") == ("", "") and change(True, 2) == ("", "") and change(None, 1) == ("", "")
    assert change(0, 3) == ("+3", "") and change(-2.0, -1.0) == ("+1", "+50.00%")
    assert change(10**400, 1) == ("", "")


@pytest.mark.parametrize("tool", [False, True])
def test_a_directory_that_may_not_be_read_is_an_error(tool, capsys):
    """Not "no reports": whoever lists them would believe it."""
    with locked_folder(0o000) as folder:
        place = folder.parent if tool else folder
        status = script.main(["list", "--reports_dir", str(place), *(["--tool", "folder"] if tool else [])])
    said = capsys.readouterr()
    assert status == 2 and said.out == ""
    assert said.err.startswith(f"error: {folder}") and "Permission denied" in said.err
