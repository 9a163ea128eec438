import itertools
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.flow_matching import (
    NUM_SIGMA_BINS,
    SigmaLaw,
    add_noise,
    per_sample_loss,
    sigma_bin,
    velocity_target,
)
from utils.rng import generator

NUM_DRAWS = 4000


def draw(law: SigmaLaw, seed: int = 0, count: int = NUM_DRAWS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor([law.sample(generator) for _ in range(count)], dtype=torch.float64)


@pytest.mark.parametrize(
    ("law", "boundary", "share"),
    [
        # Computed by integration for the boundaries of the two A14B models.
        (SigmaLaw("logit_normal", shift=1.0), 0.875, 0.026),
        (SigmaLaw("logit_normal", shift=3.0), 0.900, 0.136),
        (SigmaLaw("logit_normal", shift=5.0), 0.875, 0.368),
        (SigmaLaw("logit_normal", shift=12.0), 0.900, 0.613),
        (SigmaLaw("uniform", shift=5.0), 0.875, 0.417),
        (SigmaLaw("uniform", shift=12.0), 0.875, 0.632),
        (SigmaLaw("uniform"), 0.9, 0.1),
    ],
)
def test_share_of_the_high_noise_expert(law, boundary, share):
    assert 1 - law.probability_below(boundary) == pytest.approx(share, abs=6e-4)
    assert (draw(law) >= boundary).double().mean().item() == pytest.approx(share, abs=0.03)


def test_logit_normal_is_a_normal_in_logit_space():
    logits = torch.logit(draw(SigmaLaw("logit_normal", sigmoid_scale=1.5, shift=3.0)))
    # A shift is an offset of ln(shift) there.
    assert logits.mean().item() == pytest.approx(math.log(3.0), abs=0.1)
    assert logits.std().item() == pytest.approx(1.5, abs=0.1)


def test_uniform_is_uniform():
    sigmas = draw(SigmaLaw("uniform"))
    expected = (torch.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS
    # Kolmogorov-Smirnov at 1 in a million.
    assert (sigmas.sort().values - expected).abs().max() < 2.7 / NUM_DRAWS**0.5


@given(
    st.sampled_from(["logit_normal", "uniform"]),
    st.floats(0.1, 4.0),
    st.floats(0.1, 20.0),
    st.floats(0.02, 0.98),
)
@settings(max_examples=100)
def test_quantiles_and_probabilities_are_inverse(method, scale, shift, probability):
    law = SigmaLaw(method, scale, shift)
    assert law.probability_below(law.quantile(probability)) == pytest.approx(probability, abs=1e-9)


@given(
    st.sampled_from(["logit_normal", "uniform"]),
    st.floats(0.1, 20.0),
    st.floats(0.0, 0.99),
    st.floats(0.001, 1.0),
    st.integers(0, 2**32),
)
@settings(max_examples=200)
def test_every_draw_is_inside_the_range(method, shift, low, width, seed):
    high = min(1.0, low + width)
    sigma = SigmaLaw(method, shift=shift, min_t=low, max_t=high).sample(torch.Generator().manual_seed(seed))
    assert max(low, 1e-6) <= sigma <= high


def test_a_range_keeps_the_shape_of_the_law_inside():
    whole = SigmaLaw("logit_normal", shift=5.0)
    cut = draw(SigmaLaw("logit_normal", shift=5.0, min_t=0.875))
    assert cut.min() >= 0.875
    mass = 1 - whole.probability_below(0.875)
    for threshold in (0.9, 0.95, 0.98):
        expected = (1 - whole.probability_below(threshold)) / mass
        assert (cut >= threshold).double().mean().item() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("method", ["logit_normal", "uniform"])
@pytest.mark.parametrize("shift", [0.001, 1.0, 1000.0])
def test_the_ends_of_the_range_may_be_as_near_to_0_and_1_as_floats_are(method, shift):
    nearest_to_one = 1 - 2**-53
    law = SigmaLaw(method, 100.0, shift, min_t=5e-324, max_t=nearest_to_one)
    assert 0 <= law.probability_below(5e-324) <= law.probability_below(nearest_to_one) <= 1
    assert 0 < law.sample(torch.Generator().manual_seed(0)) <= nearest_to_one


def test_extremes_are_finite_and_never_zero():
    for law in (
        SigmaLaw("logit_normal", shift=1000.0, sigmoid_scale=100.0),
        SigmaLaw("uniform", shift=0.001),
    ):
        sigmas = draw(law, count=200)
        assert sigmas.isfinite().all()
        assert sigmas.min() > 0
        assert sigmas.max() <= 1
    assert SigmaLaw().probability_below(0.0) == 0.0
    assert SigmaLaw().probability_below(1.0) == 1.0


def test_a_draw_depends_on_its_generator_alone():
    law = SigmaLaw(shift=3.0)
    assert torch.equal(draw(law, 5, 10), draw(law, 5, 10))
    assert not torch.equal(draw(law, 5, 10), draw(law, 6, 10))


def test_noising_is_that_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 4, 2, 4, 4, generator=generator) for _ in range(2))
    timesteps = scheduler.timesteps[[10, 500, 990]]
    theirs = scheduler.scale_noise(latents, timesteps, noise)
    sigma_B = (timesteps / 1000).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(add_noise(latents, noise, sigma_B), theirs, rtol=1e-6, atol=1e-6)


def test_the_target_leads_from_noise_to_latents():
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 3, generator=generator) for _ in range(2))
    for sigma in (0.0, 0.3, 1.0):
        noisy = add_noise(latents, noise, sigma)
        torch.testing.assert_close(noisy - sigma * velocity_target(latents, noise), latents)
    assert torch.equal(add_noise(latents, noise, 0.0), latents)
    assert torch.equal(add_noise(latents, noise, 1.0), noise)


def test_loss_is_the_mean_square_of_each_sample_in_float32():
    velocity = torch.zeros(2, 1, 1, 2, 2, dtype=torch.bfloat16)
    target = torch.tensor([[1.0, -1.0, 3.0, 1.0], [0.0, 0.0, 0.0, 1001.0]]).view(2, 1, 1, 2, 2)
    losses_B = per_sample_loss(velocity, target)
    assert losses_B.dtype == torch.float32
    assert losses_B.tolist() == [3.0, 1001.0**2 / 4]


def test_a_masked_loss_is_the_mean_over_what_counts():
    """By hand: one channel, two frames of 1 x 2 positions, whose errors are 1, 2 in frame 0 and 3, 4 in frame 1."""
    velocity = torch.zeros(3, 1, 2, 1, 2, dtype=torch.bfloat16)
    target = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 1, 2).repeat(3, 1, 1, 1, 1)
    mask_BHW = torch.tensor([[[1.0, 0.0]], [[0.25, 0.75]], [[0.0, 0.125]]])
    losses_B = per_sample_loss(velocity, target, mask_BHW[:, None])
    assert losses_B.dtype == torch.float32
    # (1 + 9) / 2; (0.25 (1 + 9) + 0.75 (4 + 16)) / 2; (4 + 16) / 2, however little counts.
    assert losses_B.tolist() == [5.0, 8.75, 10.0]
    mask_BFHW = mask_BHW[:, None].repeat(1, 2, 1, 1)
    assert torch.equal(per_sample_loss(velocity, target, mask_BFHW), losses_B)
    mask_BFHW[:, 0] = 0.0
    # Frame 1 alone: 9; 0.25 * 9 + 0.75 * 16; 16.
    assert per_sample_loss(velocity, target, mask_BFHW).tolist() == [9.0, 14.25, 16.0]


def test_what_does_not_count_gets_no_gradient():
    velocity = torch.zeros(1, 2, 1, 1, 2, requires_grad=True)
    target = torch.ones(1, 2, 1, 1, 2)
    per_sample_loss(velocity, target, torch.tensor([[[[1.0, 0.0]]]])).sum().backward()
    assert velocity.grad[0, :, 0, 0].tolist() == [[-1.0, 0.0], [-1.0, 0.0]]


def test_a_mask_of_ones_changes_no_bit():
    draws = generator(0, "masked")
    velocity, target = (torch.randn(4, 16, 3, 5, 7, generator=draws) for _ in range(2))
    plain = per_sample_loss(velocity, target)
    for frames in (1, 3):
        mask_BFHW = torch.ones(4, frames, 5, 7)
        assert torch.equal(per_sample_loss(velocity, target, mask_BFHW), plain)
        mask_BFHW[2, 0, :, 3:] = 0.0
        mixed = per_sample_loss(velocity, target, mask_BFHW)
        assert torch.equal(mixed[[0, 1, 3]], plain[[0, 1, 3]]) and mixed[2] != plain[2]


def test_sigma_bins():
    sigmas = torch.tensor([0.0, 0.05, 0.1, 0.55, 0.999, 1.0])
    assert sigma_bin(sigmas).tolist() == [0, 0, 1, 5, NUM_SIGMA_BINS - 1, NUM_SIGMA_BINS - 1]


@pytest.mark.parametrize(
    "law",
    [
        SigmaLaw(),
        SigmaLaw("uniform", shift=3.0, min_t=0.2, max_t=0.7),
        SigmaLaw(shift=5.0, min_t=0.875),
        SigmaLaw(sigmoid_scale=0.01, shift=1000.0, max_t=0.5),  # all draws on the upper end
    ],
)
def test_shares_are_those_of_draws(law):
    draws = generator(0, "draws")
    sigmas = torch.tensor([law.sample(draws) for _ in range(20_000)])
    edges = [0.0, 0.3, 0.6, 0.9, 1.0]
    shares = [law.share_between(low, high) for low, high in itertools.pairwise(edges)]
    drawn = [
        ((sigmas >= low) & (sigmas < high)).float().mean().item() for low, high in itertools.pairwise(edges)
    ]
    # Standard error of a share: at most 0.0035.
    assert shares == pytest.approx(drawn, abs=0.015)
