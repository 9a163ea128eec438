"""What refuses a number: noise, and outputs that disagree. How fast anything is, no test says."""

import time

import pytest
import torch

from utils import bench
from utils.bench import Comparison, check_agreement, compare, finish, machine_facts, note_machine, stopwatch
from utils.errors import UserError
from utils.report import Report, read_summary
from utils.timing import Timing

CPU = torch.device("cpu")


def test_the_quartiles_are_those_of_the_ratios_of_rounds():
    one = Comparison("x", Timing((1.0, 2.0, 3.0, 4.0, 5.0)), Timing((1.0, 1.0, 1.0, 1.0, 1.0)))
    assert one.ratio.quartiles == (2.0, 4.0) and one.ratio.spread == pytest.approx(2 / 3)
    assert one.is_noisy
    assert Timing((5.0,)).quartiles == (5.0, 5.0)


def test_a_noisy_comparison_has_no_number():
    noisy = Comparison("x", Timing((1.0, 1.8)), Timing((1.0, 0.9)))
    row = noisy.row()
    assert noisy.is_noisy and row["ratio"] is None and row["ours_ms"] is None and row["other_ms"] is None
    assert "refused" in row["note"]
    calm = Comparison("x", Timing((0.010, 0.011)), Timing((0.020, 0.022))).row()
    assert (calm["ratio"], calm["ours_ms"], calm["note"]) == (0.5, 10.5, "")
    assert list(calm) == list(row)


def test_a_drifting_machine_is_not_noise():
    """Both slow down together: the ratios do not."""
    assert not Comparison("x", Timing((1.0, 10.0, 100.0)), Timing((2.0, 20.0, 200.0))).is_noisy


def test_outputs_that_disagree_are_refused():
    reference = torch.ones(100)
    assert check_agreement("x", reference * 1.001, reference, 1e-2) == pytest.approx(1e-3, rel=1e-3)
    with pytest.raises(UserError, match=r"differ by 1.0e-01"):
        check_agreement("x", reference * 1.1, reference, 1e-2)
    with pytest.raises(UserError, match="differ by nan"):
        check_agreement("x", reference * float("nan"), reference, 1e-2)


def test_on_a_cpu_waiting_is_not_counted():
    measure = stopwatch(CPU)
    assert measure(lambda: time.sleep(0.2)) < 0.1
    calls: list[str] = []
    found = compare("x", lambda: calls.append("a"), lambda: calls.append("b"), 3, CPU, warmup=1)
    assert "".join(calls) == "abbaabba" and len(found.ours.seconds) == 3


def test_a_report_says_what_was_missed_and_what_could_not_be_told(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    for tag, missed, refused, verdict in (
        ("a", [], [], "pass"),
        ("b", ["speed"], ["noise"], "fail"),
        ("c", [], ["noise"], "inconclusive"),
    ):
        report = Report("bench_x", "Fast?", tmp_path, tag)
        note_machine(report, CPU)
        assert finish(report, missed, refused, "Nothing.") == verdict
        summary = read_summary(tmp_path / "bench_x" / tag)
        assert all(word in summary.explanation for word in (*missed, *refused))
        assert any("busy machine" in note for note in summary.notes)
    assert machine_facts(CPU)["cores"] >= 1
