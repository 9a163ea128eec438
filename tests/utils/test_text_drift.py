"""The drift of text states, worked out by hand."""

import math

import pytest
import torch

from utils.text_drift import compare_states, drift_of, mean_drift


def token_cosine(base, tuned):
    return compare_states(base, tuned).cosine


def test_cosines_of_tokens():
    base = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert token_cosine(base, 3 * base) == pytest.approx(1.0, abs=1e-15)
    assert token_cosine(base, -base) == pytest.approx(-1.0, abs=1e-15)
    turned = torch.tensor([[1.0, 1.0], [0.0, 5.0]])  # the first token by 45 degrees
    assert token_cosine(base, turned) == pytest.approx((0.5**0.5 + 1) / 2)


def test_equal_states_have_no_drift_in_any_dtype():
    states = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        assert drift_of([states.to(dtype)], [states.to(dtype)]) == 0.0


def test_states_of_zeros():
    zeros, other = torch.zeros(2, 3), torch.ones(2, 3)
    assert token_cosine(zeros, zeros) == 1.0 and token_cosine(zeros, other) == 0.0


def test_not_a_number_stays_one_and_shapes_must_fit():
    states = torch.ones(2, 3)
    assert not token_cosine(states, states * float("nan")) <= 1.0
    assert math.isnan(drift_of([states], [states * math.nan]))
    with pytest.raises(ValueError, match="do not compare"):
        token_cosine(states, torch.ones(3, 3))
    with pytest.raises(ValueError, match="no prompt"):
        mean_drift([])


def test_the_mean_over_prompts_and_what_stands_beside_the_cosine():
    base = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    turned = torch.tensor(
        [[0.0, 2.0], [2.0, 0.0]]
    )  # both tokens by 90 degrees and twice as long; their mean only longer
    found = compare_states(base, turned)
    assert (found.cosine, found.norm_ratio) == (0.0, 2.0)
    assert found.pooled_cosine == pytest.approx(1.0) and found.distance == pytest.approx((10 / 2) ** 0.5)
    assert drift_of([base, base], [base, turned]) == 0.5
