"""What the end of a run says about its budget."""

import pytest

from utils.config.schema import BudgetConfig
from utils.run import _within_budget


@pytest.mark.parametrize(
    ("action", "largest", "mean", "is_scaled"),
    [
        ("project", 0.06, 0.01, True),
        ("project", 0.04, 0.03, True),
        ("project", 0.05, 0.02, False),
        ("warn", 0.06, 0.03, False),
    ],
)
def test_a_projected_run_says_that_what_it_saved_lies_on_the_caps(action, largest, mean, is_scaled) -> None:
    budget = BudgetConfig(max_delta_ratio=0.05, max_mean_delta_ratio=0.02, action=action)
    said = _within_budget({"max_delta_ratio": largest, "mean_delta_ratio": mean}, budget)
    assert said.startswith(f"; ||dW|| / ||W|| at most {largest:.4f}, {mean:.4f} on average")
    assert ("scaled onto the caps" in said) == is_scaled


def test_a_run_without_a_budget_says_nothing_of_one() -> None:
    assert _within_budget({"loss": 1.0}, None) == ""
    assert "drift of the neutral prompts 0.0123" in _within_budget({"neutral_drift": 0.0123}, BudgetConfig())
