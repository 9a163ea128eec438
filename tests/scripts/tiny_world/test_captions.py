import random
from collections import Counter

from scripts.tiny_world import captions
from scripts.tiny_world.captions import (
    EVALUATION,
    MOTION_CLAUSES,
    TRAINING,
    evaluation_prompts,
    fill,
    training_caption,
    words,
)
from scripts.tiny_world.world import COLOURS, MOTIONS, SHAPES, draw_scene


def test_training_never_sees_a_template_of_the_evaluation_but_the_bare_name():
    held_out = {template for name, some in EVALUATION.items() if name != "single" for template in some}
    seen = {*TRAINING, *captions.COLOUR_ONLY, *captions.SHAPE_ONLY, *captions.GENERAL}
    assert not held_out & seen
    generator = random.Random(0)
    said = {
        training_caption(generator, draw_scene(generator), is_clip=index % 2 == 0) for index in range(20000)
    }
    asked = {
        prompt.text for name in EVALUATION if name != "single" for prompt in evaluation_prompts(name, 720, 0)
    }
    assert len(asked) > 200
    assert not asked & said


def test_words_of_the_evaluation_occur_in_training():
    def bare(templates) -> set[str]:
        text = " ".join(templates)
        for slot in ("thing", "colour", "shape", "ground", "motion"):
            text = text.replace("{" + slot + "}", " ")
        return set(text.replace(",", " ").split())

    assert bare(t for some in EVALUATION.values() for t in some) <= bare(TRAINING)
    assert {"red", "circle", "moving", "dark", "background"} <= set(words())
    assert words() == sorted(set(words()))


def test_captions_say_what_is_shown_or_less():
    generator = random.Random(1)
    kinds: Counter[str] = Counter()
    for _ in range(4000):
        scene = draw_scene(generator)
        said = training_caption(generator, scene, is_clip=False).replace(",", " ").split()
        assert not {word for word in said if word in COLOURS} - {scene.colour}
        assert not {word for word in said if word in SHAPES} - {scene.shape}
        assert not {"moving", "moves", "still"} & set(said)
        kinds["empty" if not said else f"{scene.colour in said}{scene.shape in said}"] += 1
    shares = {kind: count / 4000 for kind, count in kinds.items()}
    expected = {"empty": 0.10, "TrueFalse": 0.07, "FalseTrue": 0.07, "FalseFalse": 0.05, "TrueTrue": 0.71}
    assert shares.keys() == expected.keys()
    for kind, share in expected.items():
        assert abs(shares[kind] - share) < 0.02, kind


def test_a_clip_is_said_to_move():
    assert set(MOTION_CLAUSES) == set(MOTIONS)
    generator = random.Random(2)
    said = {training_caption(generator, draw_scene(generator, motion="up"), is_clip=True) for _ in range(200)}
    assert any(caption.endswith(("moves up", "moving up")) for caption in said)
    assert not any("down" in caption or "left" in caption for caption in said)


def test_prompts_cover_all_combinations_evenly_and_hold_their_answers():
    for name in EVALUATION:
        prompts = evaluation_prompts(name, 36, 5)
        assert set(Counter((prompt.colour, prompt.shape) for prompt in prompts).values()) == {2}
        assert prompts == evaluation_prompts(name, 36, 5)
        assert prompts != evaluation_prompts(name, 36, 6)
        for prompt in prompts:
            assert {prompt.colour, prompt.shape} <= set(prompt.text.replace(",", " ").split())


def test_a_new_word_can_stand_for_the_thing():
    template = EVALUATION["short"][0]
    assert fill(template, "red", "circle", "dark", None) == "one red circle"
    assert template.replace("{thing}", "zorp").format(motion="") == "one zorp"
