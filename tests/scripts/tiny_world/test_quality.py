import random

import numpy as np

from scripts.tiny_world.captions import evaluation_prompts
from scripts.tiny_world.drawing import Drawing
from scripts.tiny_world.quality import judge
from scripts.tiny_world.world import draw_scene, render


def test_real_pictures_of_the_prompts_are_all_right_and_others_are_not():
    prompts = evaluation_prompts("short", 36, 0)
    generator = random.Random(0)
    real = np.stack([render(draw_scene(generator, p.colour, p.shape))[None] for p in prompts])
    assert judge(prompts, real) == {"n": 36, "colour_right": 1.0, "shape_right": 1.0, "both_right": 1.0}
    squares = np.stack([render(draw_scene(generator, p.colour, "square"))[None] for p in prompts])
    found = judge(prompts, squares)
    assert found["colour_right"] == 1.0
    assert found["shape_right"] == found["both_right"] == round(12 / 36, 4)
    red = np.stack([render(draw_scene(generator, "red", p.shape))[None] for p in prompts])
    assert judge(prompts, red)["both_right"] == round(6 / 36, 4)


def test_levels_fall_from_noise_to_nothing():
    assert Drawing(4, 1.0, 1.0).levels() == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = Drawing(4, 1.0, 3.0).levels()
    assert shifted == [1.0, 0.9, 0.75, 0.5, 0.0]
