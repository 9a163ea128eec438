"""The histogram of the noise law, and the end of a range that belongs to the next one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.sigma_law import NUM_SIGMA_BINS, SigmaLaw, last_below, sigma_histogram


def timestep(sigma: float) -> float:
    """What the model is told, by the operations of `WanBatches.prepare`."""
    return (torch.tensor([sigma], dtype=torch.float32) * 1000).item()


@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.5, 1.0])
def test_the_last_level_below_a_boundary_is_below_it_in_every_precision(boundary):
    below = last_below(boundary)
    assert below < boundary and timestep(below) < timestep(boundary) and timestep(below) < 1000 * boundary
    # And none above it is.
    following = float(np.nextafter(np.float32(below), np.float32(2)))
    assert not (following < boundary and timestep(following) < min(timestep(boundary), 1000 * boundary))


@given(st.floats(0.001, 1.0))
@settings(max_examples=200)
def test_that_holds_for_any_boundary(boundary):
    below = last_below(boundary)
    assert 0 < below < boundary and timestep(below) < 1000 * boundary


@pytest.mark.parametrize("boundary", [0.875, 0.9])
def test_draws_next_to_the_boundary_stay_on_their_side(boundary):
    nearly_one = 1 - 2**-53
    low = SigmaLaw("uniform", max_t=boundary, is_open_above=True)
    assert timestep(low.restricted_quantile(nearly_one)) < 1000 * boundary
    assert timestep(SigmaLaw("uniform", max_t=boundary).restricted_quantile(nearly_one)) >= 1000 * boundary
    high = SigmaLaw("uniform", min_t=boundary)
    assert timestep(high.restricted_quantile(0.0)) >= 1000 * boundary


def test_an_open_end_changes_no_other_draw():
    laws = [SigmaLaw(shift=5.0, max_t=0.875, is_open_above=is_open) for is_open in (True, False)]
    draws = [[law.sample(torch.Generator().manual_seed(seed)) for seed in range(50)] for law in laws]
    assert draws[0] == draws[1]


def test_the_histogram_is_that_of_the_draws():
    law = SigmaLaw(shift=5.0, min_t=0.3, max_t=0.875, is_open_above=True)
    generator = torch.Generator().manual_seed(0)
    draws = np.array([law.sample(generator) for _ in range(4000)])
    counted = np.histogram(draws, bins=NUM_SIGMA_BINS, range=(0, 1))[0] / len(draws)
    shares = [one.share for one in sigma_histogram(law)]
    assert sum(shares) == pytest.approx(1.0)
    assert np.allclose(counted, shares, atol=0.03)
    assert [str(one) for one in sigma_histogram(law)][8] == "0.8-0.9"
