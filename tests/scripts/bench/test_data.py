"""The benchmark runs, measures what it says and writes its report; how fast anything is, no test says."""

import json

import pytest

from scripts.bench.data import main


@pytest.fixture
def run_dir(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    rows = [
        {"step": step, "step_seconds": 2.0, "data_seconds": 1.0 if step == 1 else 0.5} for step in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_it_measures_and_reports(tmp_path, run_dir, capsys):
    sizes = ["--items", "3", "--index_items", "45", "--files", "4", "--repeats", "2"]
    places = ["--reports_dir", str(tmp_path / "reports"), "--run_tag", "t", "--scratch", str(tmp_path)]
    assert main([*sizes, *places, "--run", str(run_dir)]) in (0, 1)
    summary = json.loads((tmp_path / "reports/bench_data/t/summary.json").read_text())
    metrics = summary["metrics"]
    assert metrics["waiting_share"] == 0.25  # the first step is not counted
    assert all(
        metrics[name] > 0 for name in ("read_ratio", "open_seconds", "first_scan_seconds", "rescan_seconds")
    )
    assert (tmp_path / "reports/bench_data/t/reading.csv").read_text().count("\n") == 4
    assert "open 45 items" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"reports", "run"}, "the scratch folder is left"


def test_a_run_without_the_figure_is_refused(tmp_path, run_dir, capsys):
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "step_seconds": 2.0}\n' * 2)
    sizes = ["--items", "1", "--index_items", "1", "--files", "1", "--repeats", "1"]
    assert main([*sizes, "--reports_dir", str(tmp_path / "r"), "--run", str(run_dir)]) == 2
    assert "data_seconds" in capsys.readouterr().err and not (tmp_path / "r").exists()
