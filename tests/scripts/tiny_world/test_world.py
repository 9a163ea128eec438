import random

import numpy as np
import pytest

from scripts.tiny_world.world import (
    COLOURS,
    MOTIONS,
    NUM_FRAMES,
    SHAPES,
    SIZE,
    coverage,
    draw_scene,
    render,
    render_clip,
)


def scenes(seed: int, count: int, **given: str) -> list:
    generator = random.Random(seed)
    return [draw_scene(generator, **given) for _ in range(count)]


def test_a_seed_says_every_pixel_and_another_one_others():
    first, again, other = (np.stack([render_clip(scene) for scene in scenes(seed, 5)]) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("shape", "area"), [("circle", np.pi), ("square", 4.0), ("triangle", 2.0)])
def test_coverage_has_the_area_of_the_shape(shape, area):
    for radius in (7.0, 9.3, 12.8):
        assert coverage(shape, 24.3, 23.6, radius, SIZE).sum() == pytest.approx(area * radius**2, rel=0.01)


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="star"):
        coverage("star", 1, 1, 1, 8)


def test_nothing_is_cut_off_in_any_frame():
    for scene in scenes(3, 300):
        for frame in range(NUM_FRAMES):
            x, y = scene.centre(frame, NUM_FRAMES)
            assert scene.radius < x < 1 - scene.radius
            assert scene.radius < y < 1 - scene.radius


def test_what_is_given_is_kept_and_everything_comes_up():
    assert {scene.colour for scene in scenes(0, 20, colour="cyan")} == {"cyan"}
    drawn = scenes(0, 300)
    assert {scene.colour for scene in drawn} == set(COLOURS)
    assert {scene.shape for scene in drawn} == set(SHAPES)
    assert {scene.motion for scene in drawn} == set(MOTIONS)
    assert {scene.ground for scene in drawn} == {"dark", "light"}


def test_a_picture_is_the_middle_of_its_clip_and_a_clip_moves_as_it_says():
    for scene in scenes(4, 40):
        clip = render_clip(scene)
        assert clip.shape == (NUM_FRAMES, SIZE, SIZE, 3)
        assert np.array_equal(clip[NUM_FRAMES // 2], render(scene))
        assert np.array_equal(clip[0], clip[-1]) == (scene.motion == "still")
        (x0, y0), (x1, y1) = scene.centre(0, NUM_FRAMES), scene.centre(NUM_FRAMES - 1, NUM_FRAMES)
        assert tuple(np.sign([round(x1 - x0, 6), round(y1 - y0, 6)])) == MOTIONS[scene.motion]


def test_the_ground_is_grey_and_the_corner_shows_it():
    for scene in scenes(5, 20):
        assert render(scene)[0, 0].tolist() == [scene.grey] * 3
