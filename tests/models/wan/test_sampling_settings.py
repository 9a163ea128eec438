"""What is sampled by default, and what a variant cannot make."""

from dataclasses import replace

import pytest

from models.wan.arch import VARIANTS
from models.wan.sampling_settings import check_settings, official_settings, size_for_image
from utils.errors import UserError


def settings_of(variant, **values):
    return replace(official_settings(VARIANTS[variant]), **values)


@pytest.mark.parametrize("variant", ["ti2v-5b", "t2v-a14b", "i2v-a14b"])
def test_official_defaults_can_be_made(variant):
    check_settings(official_settings(VARIANTS[variant]), has_image=variant == "i2v-a14b")


def test_official_defaults_are_those_of_the_official_code():
    found = {
        name: (s.steps, s.shift, s.guidance, s.guidance_low_noise, s.num_frames, s.solver)
        for name, s in ((name, official_settings(info)) for name, info in VARIANTS.items())
    }
    assert found == {
        "ti2v-5b": (50, 5.0, 5.0, None, 121, "unipc"),
        "t2v-a14b": (40, 12.0, 4.0, 3.0, 81, "unipc"),
        "i2v-a14b": (40, 5.0, 3.5, 3.5, 81, "unipc"),
    }


def test_latent_shapes():
    assert settings_of("ti2v-5b").latent_shape == (48, 31, 44, 80)
    assert settings_of("i2v-a14b").latent_shape == (16, 21, 90, 160)


@pytest.mark.parametrize(
    ("variant", "values", "message"),
    [
        ("ti2v-5b", {"width": 1280, "height": 720}, "multiples of 32, up to 32768; the nearest is 1280x704"),
        ("t2v-a14b", {"width": 840, "height": 481}, "multiples of 16, up to 16384; the nearest is 832x480"),
        ("t2v-a14b", {"width": 0, "height": -5}, "the nearest is 16x16"),
        ("ti2v-5b", {"num_frames": 120}, r"4n\+1 frames \(1, 5, 9, ...\); the nearest is 117 or 121"),
        ("ti2v-5b", {"num_frames": 0}, "the nearest is 1$"),
        ("ti2v-5b", {"num_frames": 100000}, "the nearest is 4093$"),
        ("ti2v-5b", {"steps": 0}, "from 1 to 1000"),
        ("ti2v-5b", {"shift": 0.0}, "--shift 0: write a number above 0"),
        ("ti2v-5b", {"guidance": float("nan")}, "--guidance nan"),
        ("ti2v-5b", {"guidance_low_noise": 3.0}, "has no low-noise expert"),
        ("i2v-a14b", {}, "give it with --image"),
    ],
)
def test_what_cannot_be_made_is_refused(variant, values, message):
    with pytest.raises(UserError, match=message):
        check_settings(settings_of(variant, **values), has_image=False)


def test_a_first_frame_is_refused_where_it_does_nothing():
    with pytest.raises(UserError, match="takes no first frame"):
        check_settings(settings_of("t2v-a14b"), has_image=True)
    with pytest.raises(UserError, match="nothing to make of 1 frame"):
        check_settings(settings_of("ti2v-5b", num_frames=1), has_image=True)


@pytest.mark.parametrize(
    ("variant", "image", "size"),
    [
        # Both sides down to a multiple of 16: sqrt(1280 * 720 * 3 / 4) = 831.4, sqrt(1280 * 720 * 4 / 3) = 1108.5.
        ("i2v-a14b", (400, 300), (1104, 816)),
        # 607.66: rounded first, it would reach 608.
        ("i2v-a14b", (3599, 1442), (1504, 592)),
        # Of 928 x 960 (by width) and 960 x 928 (by height), equally near to 1, the second.
        ("ti2v-5b", (300, 300), (960, 928)),
        # 1280 x 704 = 901120: by width 1088 x 800 (ratio 1.36), by height 1120 x 800 (1.4): the image has 1.333.
        ("ti2v-5b", (400, 300), (1088, 800)),
        # By width 672 x 1312 (0.512), by height 672 x 1312.
        ("ti2v-5b", (512, 1000), (672, 1312)),
        # By width 1472 x 608 (2.421), by height 1536 x 576 (2.667): the image has 2.45.
        ("ti2v-5b", (2450, 1000), (1472, 608)),
    ],
)
def test_the_size_of_a_sample_of_an_image(variant, image, size):
    assert size_for_image(settings_of(variant), *image) == size


def test_an_image_of_the_default_size_keeps_it():
    for variant in ("i2v-a14b", "ti2v-5b"):
        settings = settings_of(variant)
        assert size_for_image(settings, settings.width, settings.height) == (settings.width, settings.height)


def test_guidance_below_one_is_refused():
    for changes in ({"guidance": 0.5}, {"guidance_low_noise": 0.9}):
        with pytest.raises(UserError, match="below 1 there is no guidance"):
            check_settings(settings_of("t2v-a14b", **changes), has_image=False)
