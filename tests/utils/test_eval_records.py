"""Each evaluation stands once in the files of a run, whatever happened in between, and like is compared with like."""

import json

import numpy as np
import pytest

from utils.errors import UserError
from utils.eval_records import EVAL_FILE, SAMPLES_DIR, EvalRecords, Measured, make_row
from utils.metrics import read_rows


def measured(step: int, shift: float = 0.0, identity: str = "same", off: bool = False) -> Measured:
    losses = np.array([[1.0, 2.0], [3.0, 5.0], [1 / 3, 0.1]]) + shift
    return Measured(
        "shapes", identity, step, ("a", "b", "c"), (0.25, 0.75), losses, losses - 0.5 if off else None
    )


def steps(run_dir) -> list[int]:
    return [row["step"] for row in read_rows(run_dir / EVAL_FILE)]


def add(run_dir, from_step: int, *evaluations: Measured) -> None:
    records = EvalRecords(run_dir, from_step)
    for one in evaluations:
        first = records.first("shapes", "same") or one
        records.add(one, first, epoch=1, seconds=0.5)


def test_rows_and_samples_come_back(tmp_path) -> None:
    add(tmp_path, 0, measured(0, off=True), measured(4, shift=0.25))
    before, after = read_rows(tmp_path / EVAL_FILE)
    assert before["loss"] == pytest.approx(measured(0).losses.mean())
    assert before["loss_by_quantile"] == pytest.approx({"0.25": 13 / 9, "0.75": 7.1 / 3})
    assert before["adapter_effect"] == pytest.approx(0.5) and "change" not in before
    assert (after["change"], after["first_step"]) == (pytest.approx(0.25), 0)
    assert after["change_interval"] == pytest.approx([0.25, 0.25])
    # The adapter's effect is taken against what was measured at first.
    assert after["adapter_effect"] == pytest.approx(0.75)
    found = EvalRecords(tmp_path, 4).first("shapes", "same")
    expected = measured(0, off=True)
    assert (found.samples, found.quantiles, found.step) == (expected.samples, expected.quantiles, 0)
    assert np.array_equal(found.losses, expected.losses)  # every bit
    assert np.array_equal(found.adapter_off, expected.adapter_off)


def test_a_run_that_goes_on_drops_what_it_makes_anew(tmp_path) -> None:
    add(tmp_path, 0, measured(0), measured(4), measured(8))
    add(tmp_path, 4)
    assert steps(tmp_path) == [0, 4]
    assert sorted(path.name for path in (tmp_path / SAMPLES_DIR / "shapes").iterdir()) == [
        "step0.json",
        "step4.json",
    ]
    records = EvalRecords(tmp_path, 4)
    assert records.has("shapes", 4) and not records.has("shapes", 8) and not records.has("other", 4)
    add(tmp_path, 4, measured(8, shift=1.0))
    assert steps(tmp_path) == [0, 4, 8]


def test_a_kill_in_the_middle_leaves_nothing_that_counts(tmp_path) -> None:
    """Samples without a row, a torn line, a temporary file."""
    add(tmp_path, 0, measured(0), measured(4))
    with (tmp_path / EVAL_FILE).open("a") as file:
        file.write('{"step": 8, "da')
    folder = tmp_path / SAMPLES_DIR / "shapes"
    (folder / "step8.json").write_text("{")
    (folder / ".step8.json.x.tmp").write_text("{")
    add(tmp_path, 4, measured(8))
    assert steps(tmp_path) == [0, 4, 8]
    assert {path.name for path in folder.iterdir()} == {"step0.json", "step4.json", "step8.json"}


def test_unlike_things_are_not_compared(tmp_path) -> None:
    add(tmp_path, 0, measured(0))
    with pytest.raises(UserError, match="step0.json.*other samples.*another name"):
        EvalRecords(tmp_path, 0).first("shapes", "something else")
    assert EvalRecords(tmp_path, 0).first("other", "something else") is None
    (tmp_path / SAMPLES_DIR / "shapes" / "step0.json").unlink()
    with pytest.raises(UserError, match=r"step0\.json: cannot be read"):
        EvalRecords(tmp_path, 0).first("shapes", "same")


def test_a_loss_that_is_not_finite_is_null(tmp_path) -> None:
    bad = measured(4)
    bad.losses[1, 0] = np.nan
    row = make_row(bad, measured(0), 1, 0.5)
    assert row["loss"] is None and row["change"] is None and row["change_interval"] is None
    assert row["loss_by_quantile"]["0.25"] is None and row["loss_by_quantile"]["0.75"] > 0
    add(tmp_path, 0, bad)
    json.loads((tmp_path / EVAL_FILE).read_text(), parse_constant=pytest.fail)
    assert np.isnan(EvalRecords(tmp_path, 4).first("shapes", "same").losses[1, 0])
