import csv
import json
import re
import threading
from datetime import UTC, datetime

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
import torch

from tests.helpers.rights import locked_folder
from utils.errors import UserError
from utils.files import quick_fingerprint
from utils.report import Report, read_summary, utc_run_tag


def write_one(reports_dir, run_tag="first", **changes):
    report = Report("a_probe", "Is it so?", reports_dir, run_tag)
    report.metric("max_ratio", 0.03125, "the largest ratio")
    return report.write(
        **(
            {"verdict": "pass", "explanation": "It is so.", "how_to_read": "Down.", "next_steps": "Rest."}
            | changes
        )
    )


def test_a_report_holds_everything_that_was_put_in(tmp_path):
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"circle")
    report = Report("a_probe", "Is it so?", tmp_path / "reports", "first", seed=7)
    report.add_input("adapter", weights)
    report.metric("max_ratio", torch.tensor(0.03125), "the largest ratio")
    report.metric("per_type", {"cross_attn": {"mean": np.float32(0.5), "num_modules": np.int64(4)}})
    report.metric("list", [1, 2.5, "three", None, True])
    report.cap("max_delta_ratio", 0.05, "the cap")
    report.note("something\nwas assumed")
    report.section("More", "Free *text*.")
    report.table("modules", [{"module": "a|b", "ratio": 1 / 3}, {"module": "c", "ratio": 2}], "Per module")
    report.table("frame", pd.DataFrame({"block": [0, 1], "ratio": [0.25, 0.5]}))
    figure = matplotlib.figure.Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    report.plot("ratios", figure, "Ratios")
    directory = report.write("fail", "Too far.", "How.", "What.")

    assert directory == tmp_path / "reports" / "a_probe" / "first"
    assert sorted(path.name for path in directory.iterdir()) == [
        "frame.csv",
        "modules.csv",
        "ratios.png",
        "report.md",
        "summary.json",
    ]
    summary = read_summary(directory)
    assert (summary.tool, summary.run_tag, summary.question, summary.seed) == (
        "a_probe",
        "first",
        "Is it so?",
        7,
    )
    assert (summary.verdict, summary.explanation) == ("fail", "Too far.")
    assert summary.metrics["max_ratio"] == 0.03125
    assert summary.metrics["per_type"] == {"cross_attn": {"mean": 0.5, "num_modules": 4}}
    assert summary.metrics["list"] == [1, 2.5, "three", None, True]
    assert summary.caps == {"max_delta_ratio": 0.05}
    assert summary.notes == ("something was assumed",)
    assert [(entry.role, entry.size_bytes, entry.fingerprint) for entry in summary.inputs] == [
        ("adapter", 6, quick_fingerprint(weights))
    ]
    assert {"python", "ai-model-sandbox", "torch"} <= summary.versions.keys()
    assert abs((datetime.now(UTC) - datetime.fromisoformat(summary.created)).total_seconds()) < 600

    with (directory / "modules.csv").open() as file:
        assert list(csv.reader(file)) == [["module", "ratio"], ["a|b", repr(1 / 3)], ["c", "2"]]
    assert (directory / "frame.csv").read_text() == "block,ratio\n0,0.25\n1,0.5\n"
    assert (directory / "ratios.png").read_bytes().startswith(b"\x89PNG")
    text = (directory / "report.md").read_text()
    for expected in (
        "**Verdict: FAIL.** Too far.",
        "Is it so?",
        "| max_ratio | 0.03125 | the largest ratio |",
        "| per_type.cross_attn.num_modules | 4 |",
        "| cap: max_delta_ratio | 0.05000 | the cap |",
        "| a\\|b | 0.3333 |",
        "## More\n\nFree *text*.",
        "![Ratios](ratios.png)",
        "## How to read it\n\nHow.",
        "## What to do next\n\nWhat.",
        quick_fingerprint(weights),
        "seed 7",
    ):
        assert expected in text


def test_paths_are_relative_to_the_working_directory_where_possible(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    for name in ("here/inside.bin", "outside.bin"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path / "here")
    report = Report("a_probe", "Is it so?", run_tag="first")
    report.add_input("in", tmp_path / "here" / "inside.bin")
    report.add_input("out", tmp_path / "outside.bin")
    summary = read_summary(report.write("pass", "Yes.", "-", "-"))
    assert [entry.path for entry in summary.inputs] == ["inside.bin", (tmp_path / "outside.bin").as_posix()]


def test_never_over_an_existing_report(tmp_path):
    directory = write_one(tmp_path)
    before = {path: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(UserError, match="choose another --run_tag"):
        Report("a_probe", "Is it so?", tmp_path, "first")
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


def test_two_reports_of_the_same_second_get_two_names(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.report.utc_run_tag", lambda: "20300131T120000Z")
    tags = [write_one(tmp_path, None).name for _ in range(3)]
    assert tags == ["20300131T120000Z", "20300131T120000Z-2", "20300131T120000Z-3"]


def test_default_run_tag_is_a_utc_stamp():
    assert re.fullmatch(r"\d{8}T\d{6}Z", utc_run_tag())


@pytest.mark.parametrize("run_tag", ["", "..", ".hidden", "a/b", "/a", "a\\b", "a b", "a\n", "-a", "x" * 121])
def test_a_run_tag_that_is_no_folder_name_is_refused(tmp_path, run_tag):
    with pytest.raises(UserError, match="--run_tag"):
        Report("a_probe", "Is it so?", tmp_path / "reports", run_tag)
    assert not (tmp_path / "reports").exists()


def test_a_report_that_fails_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr("utils.report._write_csv", broken)
    report = Report("a_probe", "Is it so?", tmp_path, "first")
    report.table("rows", [{"a": 1}])
    with pytest.raises(RuntimeError, match="broken"):
        report.write("pass", "Yes.", "-", "-")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not list((tmp_path / "a_probe").iterdir())


def test_what_breaks_the_schema_is_never_put_in_its_place(tmp_path):
    with pytest.raises(UserError, match="verdict"):
        write_one(tmp_path, verdict="maybe")
    assert not list((tmp_path / "a_probe").iterdir())
    assert not (tmp_path / "INDEX.md").exists()


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), torch.tensor(float("nan")), np.float32("-inf")]
)
def test_what_is_not_finite_becomes_null_with_a_note(tmp_path, value):
    report = Report("a_probe", "Is it so?", tmp_path, "first")
    report.metric("nested", {"ratio": [0.5, value]})
    summary = read_summary(report.write("inconclusive", "Not a number.", "-", "-"))
    assert summary.metrics == {"nested": {"ratio": [0.5, None]}}
    assert len(summary.notes) == 1 and "nested.ratio[1] is" in summary.notes[0]


def test_a_metric_that_json_cannot_hold_is_a_programming_error(tmp_path):
    with pytest.raises(TypeError, match="metric weights: Tensor"):
        Report("a_probe", "Is it so?", tmp_path).metric("weights", torch.zeros(2))


def test_two_tables_of_one_name_are_a_programming_error(tmp_path):
    report = Report("a_probe", "Is it so?", tmp_path)
    report.table("rows", [{"a": 1}])
    with pytest.raises(ValueError, match="rows"):
        report.table("rows", [{"a": 1}])


def test_a_long_table_is_cut_in_the_text_and_whole_in_the_file(tmp_path):
    report = Report("a_probe", "Is it so?", tmp_path, "first")
    report.table("rows", [{"number": index} for index in range(30)], inline_rows=3)
    directory = report.write("pass", "Yes.", "-", "-")
    text = (directory / "report.md").read_text()
    assert "The first 3 of 30 rows" in text and "| 2 |" in text and "| 3 |" not in text
    assert len((directory / "rows.csv").read_text().splitlines()) == 31


def test_index_has_one_line_per_report(tmp_path):
    write_one(tmp_path, "first", explanation="One | two\nthree.")
    write_one(tmp_path, "second", verdict="fail")
    lines = [line for line in (tmp_path / "INDEX.md").read_text().splitlines() if line.startswith("| 2")]
    assert len(lines) == 2
    assert lines[0].endswith("| a_probe | [first](a_probe/first/report.md) | pass | One \\| two three. |")
    assert "| fail |" in lines[1]


def test_reports_that_end_together_all_get_their_line(tmp_path):
    threads = [threading.Thread(target=write_one, args=(tmp_path, f"tag{index}")) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = (tmp_path / "INDEX.md").read_text()
    assert all(text.count(f"[tag{index}]") == 1 for index in range(8))


def test_a_report_inside_a_training_run_is_refused(tmp_path):
    run = tmp_path / "output" / "run"
    run.mkdir(parents=True)
    (run / "config.toml").touch()
    (run / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="--reports_dir"):
        Report("a_probe", "Is it so?", run / "reports")
    Report("a_probe", "Is it so?", run.parent / "reports")


def test_a_reports_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "reports").touch()
    with pytest.raises(UserError, match="--reports_dir"):
        Report("a_probe", "Is it so?", tmp_path / "reports")


def test_an_input_that_is_missing_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"missing\.bin"):
        Report("a_probe", "Is it so?", tmp_path).add_input("adapter", tmp_path / "missing.bin")


def change(values, key, value):
    values[key] = value


BROKEN = {
    "missing key": lambda values: values.pop("caps"),
    "unknown key": lambda values: change(values, "extra", 1),
    "verdict": lambda values: change(values, "verdict", "maybe"),
    "no time zone": lambda values: change(values, "created", "2030-01-31T12:00:00"),
    "no time": lambda values: change(values, "created", "yesterday"),
    "empty question": lambda values: change(values, "question", ""),
    "metrics": lambda values: change(values, "metrics", []),
    "cap is a text": lambda values: change(values, "caps", {"a": "0.05"}),
    "cap is true": lambda values: change(values, "caps", {"a": True}),
    "seed": lambda values: change(values, "seed", 1.5),
    "versions": lambda values: change(values, "versions", {"python": 3.11}),
    "notes": lambda values: change(values, "notes", [1]),
    "inputs": lambda values: change(values, "inputs", {}),
    "input without size": lambda values: change(
        values, "inputs", [{"role": "a", "path": "b", "fingerprint": "c"}]
    ),
    "input of negative size": lambda values: change(
        values, "inputs", [{"role": "a", "path": "b", "fingerprint": "c", "size_bytes": -1}]
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_summary_that_departs_from_the_schema_is_refused(tmp_path, name):
    path = write_one(tmp_path) / "summary.json"
    values = json.loads(path.read_text())
    BROKEN[name](values)
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"summary\.json: does not follow the schema"):
        read_summary(path)


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, '{"metrics": NaN}', "\udc80"])
def test_a_summary_that_is_no_json_is_refused(tmp_path, content):
    path = tmp_path / "summary.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"summary\.json: not readable"):
        read_summary(path)


def test_a_summary_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_summary(tmp_path)


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_a_place_without_rights_is_refused_before_anything_is_measured(mode):
    with locked_folder(mode) as folder, pytest.raises((UserError, PermissionError)) as raised:
        Report("probe", "Is it so?", folder / "reports")
    assert str(folder) in str(raised.value)
    if mode == 0o555:
        assert "is not writable; choose another --reports_dir" in str(raised.value)
