"""The stopwatch around a run's parts, and (long) a real run. No test says how long anything takes."""

import json

import pytest

from scripts.bench import e2e
from scripts.bench.e2e import main, shares, sum_of
from scripts.bench.e2e_worker import Parts


def test_a_parts_time_is_its_own():
    now = 0.0

    def pass_time(seconds):
        nonlocal now
        now += seconds

    parts = Parts(clock=lambda: now)
    inner = parts.timed("inner", lambda: pass_time(2.0))

    def work():
        pass_time(1.0)
        inner()
        inner()

    parts.timed("outer", work)()
    assert parts.seconds == {"inner": 4.0, "outer": 1.0} and parts.calls == {"inner": 2, "outer": 1}


def test_a_part_that_fails_is_counted_and_fails():
    class Owner:
        def work(self):
            raise KeyError("x")

    parts = Parts()
    parts.watch(Owner, "work", "part")
    with pytest.raises(KeyError):
        Owner().work()
    assert parts.calls == {"part": 1}


def test_shares_are_of_their_group():
    seconds = {"start: imports": 1.0, "start: data": 3.0, "loop: forward": 5.0}
    rows = shares(seconds, {"start: data": 2})
    assert [(row["part"], row["share"], row["calls"]) for row in rows] == [
        ("start: data", 0.75, 2),
        ("start: imports", 0.25, 1),
        ("loop: forward", 1.0, 1),
    ]
    assert sum_of(seconds, "start: ") == 4.0


def test_a_command_that_fails_is_reported_with_its_last_words(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(e2e, "make_inputs", lambda scratch: ["--no_such_flag"])
    assert main(["--reports_dir", str(tmp_path / "r"), "--scratch", str(tmp_path)]) == 2
    assert "train.py ended with status 2" in capsys.readouterr().err
    assert not (tmp_path / "r").exists() and not list(tmp_path.iterdir()), "the scratch folder is left"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_real_run(tmp_path, capsys):
    assert (
        main(["--steps", "2", "--reports_dir", str(tmp_path), "--run_tag", "t"]) == 0
    ), capsys.readouterr().err
    rows = (tmp_path / "bench_e2e/t/parts.csv").read_text()
    for part in ("data", "forward", "backward", "optimizer", "logging", "saving", "the rest"):
        assert f"loop: {part}," in rows, part
    for part in ("imports", "config and headers", "data and cache", "building the model"):
        assert f"start: {part}," in rows, part
    summary = json.loads((tmp_path / "bench_e2e/t/summary.json").read_text())
    assert 0 <= summary["metrics"]["data_share"] <= 1 and summary["metrics"]["loop_seconds"] > 0
