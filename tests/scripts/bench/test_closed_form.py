"""The benchmark runs, measures what it says and writes its report; how fast anything is, no test says."""

import json

import pytest

from models.wan.arch import PUBLISHED
from scripts.bench import closed_form
from scripts.bench.closed_form import main, targets_of

SIZES = ["--dim", "64", "--num_layers", "2", "--num_prompts", "20", "40", "--ranks", "2"]


@pytest.mark.long
def test_it_measures_every_case_and_reports(tmp_path, capsys):
    places = ["--reports_dir", str(tmp_path / "reports"), "--run_tag", "t", "--scratch", str(tmp_path)]
    assert main([*SIZES, *places]) == 0
    summary = json.loads((tmp_path / "reports/bench_closed_form/t/summary.json").read_text())
    assert summary["metrics"]["seconds"] > 0 and summary["metrics"]["gigabytes"] > 0.1
    assert summary["caps"] == {}, "targets are for the real sizes"
    rows = (tmp_path / "reports/bench_closed_form/t/cases.csv").read_text().splitlines()
    assert len(rows) == 3 and rows[0].startswith("variant,dim,num_layers,num_prompts,rank,threads,")
    assert "width 64, 2 blocks" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"reports"}, "the scratch folder is left"


def test_a_disk_that_is_too_small_is_not_filled(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        closed_form.shutil, "disk_usage", lambda path: closed_form.shutil._ntuple_diskusage(1, 1, 0)
    )
    assert main([*SIZES, "--reports_dir", str(tmp_path / "r"), "--scratch", str(tmp_path)]) == 2
    assert "--scratch" in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_the_real_sizes_have_60_and_80_targets():
    assert [len(targets_of(PUBLISHED[name])) for name in ("ti2v-5b", "t2v-a14b")] == [60, 80]
