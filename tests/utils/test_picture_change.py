"""How much two clips differ."""

import numpy as np
import pytest

from utils.picture_change import structural_similarity


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_known_values():
    clip = noise(2, 16, 16, 3)
    assert structural_similarity(clip, clip) == 1.0
    assert abs(structural_similarity(clip, noise(2, 16, 16, 3, seed=1))) < 0.1
    # Constant pictures: no variance, so only the luminance term, (2ab + C1) / (a^2 + b^2 + C1) with C1 = (0.01 * 255)^2.
    dark, light = np.full((1, 8, 8, 3), 100, np.uint8), np.full((1, 8, 8, 3), 200, np.uint8)
    c1 = 2.55**2
    expected = (2 * 100 * 200 + c1) / (100**2 + 200**2 + c1)
    assert structural_similarity(dark, light) == pytest.approx(expected, abs=1e-6)


def test_it_is_the_mean_over_frames():
    first, other = noise(1, 16, 16, 3), noise(1, 16, 16, 3, seed=1)
    half = structural_similarity(np.concatenate((first, first)), np.concatenate((first, other)))
    assert half == pytest.approx((1 + structural_similarity(first, other)) / 2)


def test_small_pictures_and_other_shapes():
    assert structural_similarity(noise(1, 4, 6, 3), noise(1, 4, 6, 3)) == 1.0
    with pytest.raises(ValueError, match="against"):
        structural_similarity(noise(1, 8, 8, 3), noise(2, 8, 8, 3))
