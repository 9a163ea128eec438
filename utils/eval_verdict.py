"""Did an adapter lower the loss on fixed samples? Read off the evaluations of its run (see `utils.eval_records`)."""

from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.eval_records import EVAL_FILE
from utils.metrics import read_rows
from utils.report_summary import Verdict


@dataclass(frozen=True)
class EvalEffect:
    """What an adapter did to the loss of one dataset.

    Attributes:
        dataset: its name.
        step: optimizer steps done when it was measured.
        num_samples: how many pairs.
        loss: with the adapter.
        loss_adapter_off: without.
        effect: mean of the paired differences, on minus off; below 0 is better.
        low, high: ends of its interval at 95 %; None where there is none (a single sample).
    """

    dataset: str
    step: int
    num_samples: int
    loss: float | None
    loss_adapter_off: float | None
    effect: float | None
    low: float | None
    high: float | None

    @property
    def verdict(self) -> Verdict:
        """Better beyond doubt passes; worse beyond doubt, or a loss that is not finite, fails; else it is open."""
        if self.loss is None or (self.low is not None and self.low > 0):
            return "fail"
        return "pass" if self.high is not None and self.high < 0 else "inconclusive"

    def __str__(self) -> str:
        if self.loss is None:
            return f"{self.dataset}: the loss is not finite"
        if self.effect is None:
            return f"{self.dataset}: the loss without the adapter is not finite"
        ends = (
            "no interval" if self.low is None or self.high is None else f"[{self.low:.3g}, {self.high:.3g}]"
        )
        return f"{self.dataset}: {self.effect:+.3g} {ends}"


def read_effects(run_dir: Path, step: int | None) -> list[EvalEffect]:
    """Of each dataset that was evaluated with the adapter on and off: the evaluation at `step`.

    Args:
        run_dir: of the training.
        step: at which the adapter was saved; None: not known, so the last evaluation counts.

    Returns:
        One for each dataset, by name; none where nothing was evaluated. Where there is no evaluation at `step` itself,
        the last one before.

    Raises:
        UserError: the file of evaluations is not one.
    """
    path = run_dir / EVAL_FILE
    latest: dict[str, EvalEffect] = {}
    for number, row in enumerate(read_rows(path), start=1):
        try:
            if "adapter_effect" not in row or (step is not None and row["step"] > step):
                continue
            effect = _effect(row)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: line {number} is no evaluation ({type(error).__name__}: {error}); put the file of the run back"
            ) from None
        if effect.dataset not in latest or effect.step >= latest[effect.dataset].step:
            latest[effect.dataset] = effect
    return [latest[name] for name in sorted(latest)]


def judge_effects(effects: list[EvalEffect]) -> tuple[Verdict, str]:
    """The verdict over all datasets: the worst of them; open where there is none."""
    if not effects:
        return (
            "inconclusive",
            "The run has no evaluation with the adapter on and off; set eval_datasets in its config.",
        )
    verdicts = {effect.verdict for effect in effects}
    if "fail" in verdicts:
        bad = [str(effect) for effect in effects if effect.verdict == "fail"]
        return "fail", f"The adapter makes the loss worse on {'; '.join(bad)}."
    if "inconclusive" in verdicts:
        unclear = [str(effect) for effect in effects if effect.verdict == "inconclusive"]
        return "inconclusive", f"It is open whether the adapter lowers the loss on {'; '.join(unclear)}."
    return "pass", f"The adapter lowers the loss on {'; '.join(map(str, effects))}."


def _effect(row: dict[str, object]) -> EvalEffect:
    ends = row["adapter_effect_interval"]
    low, high = (None, None) if ends is None else map(float, ends)  # type: ignore[call-overload]
    if not (isinstance(row["dataset"], str) and isinstance(row["step"], int)):
        raise ValueError("dataset or step")
    return EvalEffect(
        row["dataset"],
        row["step"],
        int(row["num_samples"]),  # type: ignore[call-overload]
        _number(row["loss"]),
        _number(row["loss_adapter_off"]),
        _number(row["adapter_effect"]),
        low,
        high,
    )


def _number(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is no number")
    return float(value)
