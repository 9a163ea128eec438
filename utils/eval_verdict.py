"""What a run's evaluations say about the adapter that it saved: better, worse, or not known."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """
    newest: dict[str, dict[str, Any]] = {}
    for row in read_rows(run / EVAL_FILE):
        if step is None or row["step"] <= step:
            newest[row["dataset"]] = row
    effects = []
    for name, row in sorted(newest.items()):
        if "adapter_effect" in row:
            key, against = "adapter_effect", "adapter off"
        elif "change" in row:
            key, against = "change", f"step {row['first_step']}"
        else:
            continue  # the first evaluation: there is nothing to hold it against
        low, high = row[f"{key}_interval"] or (None, None)
        effects.append(
            EvalEffect(name, row["step"], row["num_samples"], row["loss"], row[key], low, high, against)
        )
    return effects
