import random

import numpy as np
import pytest
from scipy import ndimage

from scripts.tiny_world.checker import NOTHING, nearest_colour, read_clip, read_picture
from scripts.tiny_world.world import COLOURS, RADIUS, SHAPES, SIZE, draw_scene, render, render_clip


def superellipse(exponent: float, radius: float, x: float, y: float) -> np.ndarray:
    """A red |x|^n + |y|^n <= r^n on a dark ground: 2 is a circle, many a square."""
    places = (np.arange(SIZE * 8) + 0.5) / 8
    inside = (abs(places[None] - x) / radius) ** exponent + (
        abs(places[:, None] - y) / radius
    ) ** exponent <= 1
    alpha = inside.reshape(SIZE, 8, SIZE, 8).mean((1, 3))[:, :, None]
    return np.rint(alpha * np.array(COLOURS["red"]) + (1 - alpha) * 40).astype(np.uint8)


def shapes_seen(exponent: float, count: int = 25) -> set:
    generator = random.Random(0)
    seen = set()
    for _ in range(count):
        radius = generator.uniform(*RADIUS) * SIZE
        x, y = (generator.uniform(radius + 1, SIZE - 1 - radius) for _ in range(2))
        seen.add(read_picture(superellipse(exponent, radius, x, y)).shape)
    return seen


@pytest.mark.parametrize("size", [32, 48, 64])
def test_real_pictures_are_read_rightly_at_all_sizes_and_places(size):
    generator = random.Random(size)
    drawn = [draw_scene(generator) for _ in range(600)]
    read = [read_picture(render(scene, size=size)) for scene in drawn]
    right = [(r.colour, r.shape) == (s.colour, s.shape) for r, s in zip(read, drawn, strict=True)]
    assert np.mean(right) >= 0.995  # measured: all 600 at each size
    for reading, scene in zip(read, drawn, strict=True):
        # The centre of mass of a triangle lies below the middle of its box, a third of its height above the base.
        lower = scene.radius / 3 if scene.shape == "triangle" else 0
        assert (reading.x, reading.y) == pytest.approx((scene.x, scene.y + lower), abs=0.02)


def test_real_clips_are_read_rightly():
    generator = random.Random(7)
    drawn = [draw_scene(generator) for _ in range(150)]
    read = [read_clip(render_clip(scene)) for scene in drawn]
    right = [
        (r.colour, r.shape, r.motion) == (s.colour, s.shape, s.motion)
        for r, s in zip(read, drawn, strict=True)
    ]
    assert np.mean(right) >= 0.995  # measured: all 150


def test_the_smallest_and_the_largest_are_read_in_every_colour():
    for shape in SHAPES:
        for colour in COLOURS:
            for radius in RADIUS:
                scene = draw_scene(random.Random(1), colour=colour, shape=shape, motion="still")
                scene = type(scene)(**vars(scene) | {"radius": radius, "x": 0.5, "y": 0.5})
                reading = read_picture(render(scene))
                assert (reading.colour, reading.shape) == (colour, shape)


def test_squarish_circles_are_neither_circle_nor_square():
    for exponents, shape in (
        ((2.0, 2.25, 2.5), "circle"),
        ((3.0, 3.5, 4.0), None),
        ((6.0, 8.0, 12.0), "square"),
    ):
        for exponent in exponents:
            assert shapes_seen(exponent) == {shape}, exponent
    assert "circle" not in shapes_seen(5.0)
    # What fits best is said all the same, apart.
    assert read_picture(superellipse(3.0, 10, 24, 24)).nearest == "circle"
    assert read_picture(superellipse(4.0, 10, 24, 24)).nearest == "square"


def test_blur_does_not_hide_a_shape():
    generator = random.Random(2)
    drawn = [draw_scene(generator) for _ in range(60)]
    read = [
        read_picture(ndimage.gaussian_filter(render(scene).astype(float), (1, 1, 0)).round().astype(np.uint8))
        for scene in drawn
    ]
    assert [r.colour for r in read] == [s.colour for s in drawn]
    assert np.mean([r.shape == s.shape for r, s in zip(read, drawn, strict=True)]) > 0.9


def test_what_is_no_single_shape_is_nothing():
    assert read_picture(np.full((SIZE, SIZE, 3), 90, np.uint8)) == NOTHING
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    assert read_picture(noise).shape is None
    left = render(draw_scene(random.Random(3), colour="red", shape="circle"))
    both = np.concatenate((left, left[:, ::-1]), axis=1)
    assert read_picture(np.concatenate((both, np.full_like(both, left[0, 0, 0])), axis=0)) == NOTHING
    oblong = np.full((SIZE, SIZE, 3), 40, np.uint8)
    oblong[18:28, 8:40] = COLOURS["green"]
    assert (read_picture(oblong).colour, read_picture(oblong).shape) == ("green", None)


def test_colours_are_named_only_where_they_are_near():
    for name, rgb in COLOURS.items():
        assert nearest_colour(rgb) == name
        assert nearest_colour([value * 0.9 for value in rgb]) == name
    assert nearest_colour((255, 140, 0)) is None
    distances = [
        np.linalg.norm(np.subtract(a, b)) for a in COLOURS.values() for b in COLOURS.values() if a != b
    ]
    assert min(distances) > 2 * 55


def test_the_majority_of_frames_decides_and_a_lost_frame_leaves_no_motion():
    scene = draw_scene(random.Random(6), motion="left")
    clip = render_clip(scene)
    clip[1] = 128
    clip[3] = 128
    reading = read_clip(clip)
    assert (reading.colour, reading.shape, reading.motion) == (scene.colour, scene.shape, None)
    clip[4] = 128
    assert read_clip(clip).shape is None


def test_a_diagonal_is_no_direction():
    scene = draw_scene(random.Random(8), colour="red", shape="square", motion="still")
    frames = [
        render(type(scene)(**vars(scene) | {"x": 0.35 + 0.07 * k, "y": 0.35 + 0.07 * k})) for k in range(5)
    ]
    assert read_clip(np.stack(frames)).motion is None
