import random

import numpy as np

from scripts.tiny_world.captions import evaluation_prompts
from scripts.tiny_world.quality import judge
from scripts.tiny_world.world import draw_scene, render


def test_real_pictures_of_the_prompts_are_all_right_and_others_are_not():
    prompts = evaluation_prompts("short", 36, 0)
    generator = random.Random(0)
    real = np.stack([render(draw_scene(generator, p.colour, p.shape)) for p in prompts])
    assert judge(prompts, real) == {
        "n": 36,
        "colour_right": 1.0,
        "shape_right": 1.0,
        "both_right": 1.0,
        "nearest_right": 1.0,
    }
    squares = np.stack([render(draw_scene(generator, p.colour, "square")) for p in prompts])
    found = judge(prompts, squares)
    assert found["colour_right"] == 1.0
    assert found["shape_right"] == found["both_right"] == round(12 / 36, 4)
    assert found["nearest_right"] == round(12 / 36, 4)
    red = np.stack([render(draw_scene(generator, "red", p.shape)) for p in prompts])
    assert judge(prompts, red)["both_right"] == round(6 / 36, 4)
