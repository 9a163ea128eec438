import json
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.tiny_world.captions import EVALUATION
from scripts.tiny_world.checker import read_picture
from scripts.tiny_world.proof_data import (
    COLOUR_WORDS,
    HELD_OUT,
    LENGTHS,
    NEUTRAL,
    NEW_WORDS,
    SEEN,
    SHAPE_WORDS,
    THINGS,
    Amounts,
    held_out_prompts,
    known_prompts,
    meaning,
    neutral_prompts,
    new_prompts,
    write_data,
)
from scripts.tiny_world.world import COLOURS, SHAPES

AMOUNTS = Amounts(thing=2, combination=2, known=1)


def captions_of(directory: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads((directory / "captions.json").read_text(encoding="utf-8"))
    return found


def shown(path: Path) -> tuple[str | None, str | None]:
    seen = read_picture(np.asarray(Image.open(path)))
    return seen.colour, seen.shape


def named(caption: str) -> tuple[str, str]:
    """The colour and shape that a caption names, by new or known words."""
    words = set(caption.replace(",", " ").split())
    for word in words & set(THINGS):
        return THINGS[word]
    (colour,) = words & (set(COLOURS) | set(COLOUR_WORDS))
    (shape,) = words & (set(SHAPES) | set(SHAPE_WORDS))
    return meaning(colour, shape)


def test_pictures_show_what_every_caption_of_theirs_names(tmp_path):
    write_data(tmp_path / "data", 0, AMOUNTS)
    counts = {}
    for folder in ("new", "rehearsal"):
        captions = captions_of(tmp_path / "data" / folder)
        counts[folder] = len(captions)
        for name, texts in captions.items():
            assert len(set(texts)) == 4
            assert {named(text) for text in texts} == {shown(tmp_path / "data" / folder / name)}
    assert counts == {"new": 2 * len(THINGS) + 2 * len(SEEN), "rehearsal": len(COLOURS) * len(SHAPES)}


def test_no_caption_of_training_has_a_template_of_the_evaluation_or_a_name_alone(tmp_path):
    write_data(tmp_path / "data", 1, Amounts())
    texts = {
        text for path in (tmp_path / "data").iterdir() for own in captions_of(path).values() for text in own
    }
    asked = {prompt.text for length in LENGTHS for prompt in new_prompts(length, 72, 0)}
    asked |= {prompt.text for prompt in (*held_out_prompts(90, 0), *known_prompts(216, 0))}
    assert not texts & asked
    assert not texts & set(NEW_WORDS)
    new = {text for own in captions_of(tmp_path / "data" / "new").values() for text in own}
    for colour, shape in HELD_OUT:
        assert not any({colour, shape} <= set(text.replace(",", " ").split()) for text in new)
    rehearsal = {text for own in captions_of(tmp_path / "data" / "rehearsal").values() for text in own}
    assert not any(word in text.split() for text in rehearsal for word in NEW_WORDS)


def test_shuffled_captions_are_the_same_ones_beside_other_pictures(tmp_path):
    write_data(tmp_path / "data", 0, AMOUNTS)
    folders = {name: captions_of(tmp_path / "data" / name) for name in ("new", "rehearsal", "shuffled")}
    told = sorted([*folders["new"].values(), *folders["rehearsal"].values()])
    assert sorted(folders["shuffled"].values()) == told
    right = [
        shown(tmp_path / "data" / "shuffled" / name) == named(texts[0])
        for name, texts in folders["shuffled"].items()
    ]
    assert sum(right) < len(right) / 3


def test_a_seed_says_every_picture_and_other_seeds_have_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_data(tmp_path / name, seed, AMOUNTS)
    first, again, other = ((tmp_path / name / "new" / "000.png").read_bytes() for name in "abc")
    assert first == again != other


def test_data_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data", 0, AMOUNTS)
    assert not list((tmp_path / "data").iterdir())


def test_prompts_ask_for_each_word_in_each_template_as_often():
    for length in LENGTHS:
        prompts = new_prompts(length, 24, 0)
        assert all((prompt.colour, prompt.shape) == named(prompt.text) for prompt in prompts)
        for word in THINGS:
            assert sum(word in prompt.text.split() or f"{word}," in prompt.text for prompt in prompts) == 8
    held_out = held_out_prompts(3 * sum(map(len, EVALUATION.values())), 0)
    assert all((prompt.colour, prompt.shape) == named(prompt.text) for prompt in held_out)
    assert len({prompt.text for prompt in held_out}) == len(held_out)
    known = known_prompts(216, 5)
    assert {name: sum(prompt.template_set == name for prompt in known) for name in EVALUATION} == {
        "single": 0,
        "short": 72,
        "verbose": 72,
        "apart": 72,
    }


def test_neutral_prompts_name_nothing():
    assert neutral_prompts(len(NEUTRAL) + 1) == [*NEUTRAL, NEUTRAL[0]]
    words = {word for text in NEUTRAL for word in text.replace(",", " ").split()}
    assert not words & {*COLOURS, *SHAPES, *NEW_WORDS}
