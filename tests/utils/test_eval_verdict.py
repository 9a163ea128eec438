"""What evaluations say about a save: the one of its step, and no more than its interval allows."""

import json

import pytest

from utils.errors import UserError
from utils.eval_verdict import EvalEffect, read_effects


@pytest.mark.parametrize(
    ("effect", "low", "high", "verdict"),
    [
        (-0.1, -0.2, -0.01, "pass"),
        (-0.1, -0.2, 0.01, "inconclusive"),
        (0.1, -0.2, 0.4, "inconclusive"),
        (0.1, 0.02, 0.4, "fail"),
        (-0.1, None, None, "inconclusive"),
        (None, None, None, "fail"),
    ],
)
def test_verdicts(effect, low, high, verdict):
    assert EvalEffect("d", 1, 3, 1.0, effect, low, high, "adapter off").verdict == verdict


def row(step, dataset="a", **more):
    return {"step": step, "dataset": dataset, "num_samples": 3, "loss": 0.5, "first_step": 0} | more


def test_the_evaluation_of_the_save_s_step_or_the_last_before_it(tmp_path):
    rows = [
        row(0),
        row(0, "b"),
        row(
            5,
            change=-0.1,
            change_interval=[-0.2, -0.05],
            adapter_effect=-0.3,
            adapter_effect_interval=[-0.4, -0.2],
        ),
        row(5, "b", change=0.1, change_interval=None),
        row(9, change=0.7, change_interval=[0.6, 0.8]),
    ]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    first, second = read_effects(tmp_path, 6)
    assert (first.dataset, first.step, first.effect, first.low, first.against) == (
        "a",
        5,
        -0.3,
        -0.4,
        "adapter off",
    )
    assert (second.dataset, second.effect, second.low, second.against) == ("b", 0.1, None, "step 0")
    assert [effect.step for effect in read_effects(tmp_path, None)] == [9, 5]
    assert read_effects(tmp_path, 3) == []  # first evaluations alone: nothing to hold them against
    assert read_effects(tmp_path / "nothing", None) == []


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1}',
        '{"dataset": "a"}',
        "[]",
        '{"step": "x", "dataset": "a"}',
        '{"step": 1, "dataset": "a", "num_samples": 1e999, "loss": 1, "adapter_effect": 1, "adapter_effect_interval": null}',
        '{"step": 1, "dataset": "a", "num_samples": 3, "loss": 1, "adapter_effect": "low", "adapter_effect_interval": null}',
        '{"step": 1, "dataset": "a", "num_samples": 3, "loss": 1, "adapter_effect": -1, "adapter_effect_interval": [1]}',
    ],
)
def test_a_line_that_is_no_evaluation_is_named(tmp_path, line):
    (tmp_path / "eval.jsonl").write_text(json.dumps(row(0)) + "\n" + line + "\n")
    with pytest.raises(UserError, match="eval.jsonl: line 2 is (no evaluation|not a row of a run)"):
        read_effects(tmp_path, 5)
