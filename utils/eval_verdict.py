"""What a run's evaluations say about the adapter that it saved: better, worse, or not known."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.eval_records import EVAL_FILE
from utils.metrics import read_rows
from utils.report_summary import Verdict


@dataclass(frozen=True)
class EvalEffect:
    """The paired difference of one dataset's losses.

    Attributes:
        dataset: its name.
        step: of the evaluation.
        num_samples: pairs.
        loss: with the adapter.
        effect: mean of loss with minus loss without it (or minus that of the first evaluation); None where not finite.
        low, high: ends of its 95 % interval; None for a single sample.
        against: what it is the difference to: "adapter off" or "step N".
    """

    dataset: str
    step: int
    num_samples: int
    loss: float | None
    effect: float | None
    low: float | None
    high: float | None
    against: str

    @property
    def verdict(self) -> Verdict:
        """pass where the whole interval is below 0, fail where it is above 0 or no number, else inconclusive."""
        if self.effect is None or not math.isfinite(self.effect):
            return "fail"
        if self.low is None or self.high is None:
            return "inconclusive"
        return "pass" if self.high < 0 else "fail" if self.low > 0 else "inconclusive"


def read_effects(run: Path, step: int | None) -> list[EvalEffect]:
    """The evaluation of each dataset that fits a save: that of its step, else the last one before it.

    Args:
        run: the run's directory.
        step: of the save; None for the last evaluation there is.

    Raises:
        UserError: a line is no evaluation.
    """
    newest: dict[str, EvalEffect | None] = {}
    for number, row in enumerate(read_rows(run / EVAL_FILE), start=1):
        try:
            if step is None or row["step"] <= step:
                newest[row["dataset"]] = _effect(row)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{run / EVAL_FILE}: line {number} is no evaluation ({type(error).__name__}: {error}); put back the file that "
                "the run wrote"
            ) from None
    return [effect for _, effect in sorted(newest.items()) if effect is not None]


def _effect(row: dict[str, Any]) -> EvalEffect | None:
    """What a row of `eval.jsonl` says; None for the first evaluation, which is held against nothing."""
    if "adapter_effect" in row:
        key, against = "adapter_effect", "adapter off"
    elif "change" in row:
        key, against = "change", f"step {int(row['first_step'])}"
    else:
        return None
    low, high = row[f"{key}_interval"] or (None, None)
    return EvalEffect(
        str(row["dataset"]),
        int(row["step"]),
        int(row["num_samples"]),
        _number(row["loss"]),
        _number(row[key]),
        _number(low),
        _number(high),
        against,
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
