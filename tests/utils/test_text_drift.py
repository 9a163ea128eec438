"""Cosines, ratios and distances of text states, by hand."""

import math

import pytest
import torch

from utils.text_drift import compare_states, drift_of, mean_drift, row_cosines


def test_states_that_did_not_move_have_exactly_no_drift() -> None:
    states = torch.randn(7, 5)
    found = compare_states(states, states.clone())
    assert (found.cosine, found.pooled_cosine, found.norm_ratio, found.distance) == (1.0, 1.0, 1.0, 0.0)
    assert drift_of([states], [states.clone()]) == 0.0


def test_known_angles_and_lengths() -> None:
    base = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    tuned = torch.tensor(
        [[0.0, 3.0], [0.0, 2.0]]
    )  # the first token turned by 90 degrees and three times as long
    found = compare_states(base, tuned)
    assert found.cosine == pytest.approx(0.5, abs=1e-12)
    assert found.norm_ratio == pytest.approx(2.0, abs=1e-12)
    assert found.distance == pytest.approx(math.sqrt(10 / 5), abs=1e-12)
    # Means are (0.5, 1) and (0, 2.5).
    assert found.pooled_cosine == pytest.approx(1 / math.sqrt(1.25), abs=1e-12)


def test_tokens_that_part_in_opposite_directions_do_not_cancel() -> None:
    base = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    tuned = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    found = compare_states(base, tuned)
    assert found.pooled_cosine == pytest.approx(1.0, abs=1e-12)
    assert found.cosine == pytest.approx(math.sqrt(0.5), abs=1e-12)


def test_longer_states_in_the_same_direction_are_seen_by_the_ratio_alone() -> None:
    base = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    found = compare_states(base, base * 1.25)
    assert found.cosine == pytest.approx(1.0, abs=1e-12)
    assert (found.norm_ratio, found.distance) == (pytest.approx(1.25), pytest.approx(0.25))


def test_zero_states() -> None:
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert row_cosines(zero, zero).tolist() == [1.0]
    assert row_cosines(zero, one).tolist() == [0.0]
    assert compare_states(zero, one).distance == math.inf


def test_the_drift_is_a_mean_over_prompts_and_not_over_tokens() -> None:
    turned = (torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    still = (torch.ones(9, 2), torch.ones(9, 2))
    assert drift_of([turned[0], still[0]], [turned[1], still[1]]) == pytest.approx(0.5)


def test_what_does_not_compare_is_refused() -> None:
    for base, tuned in (
        (torch.ones(2, 3), torch.ones(3, 3)),
        (torch.ones(0, 3), torch.ones(0, 3)),
        (torch.ones(3), torch.ones(3)),
    ):
        with pytest.raises(ValueError, match="do not compare"):
            compare_states(base, tuned)
    with pytest.raises(ValueError, match="no prompt"):
        mean_drift([])


def test_equal_states_have_no_drift_in_any_dtype() -> None:
    states = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        assert drift_of([states.to(dtype)], [states.to(dtype)]) == 0.0


def test_not_a_number_stays_one() -> None:
    states = torch.ones(2, 3)
    assert not compare_states(states, states * math.nan).cosine <= 1.0
    assert math.isnan(drift_of([states], [states * math.nan]))
