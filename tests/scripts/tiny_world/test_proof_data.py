import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.tiny_world.captions import EVALUATION, training_caption, words
from scripts.tiny_world.checker import read_picture
from scripts.tiny_world.proof_data import (
    COLOUR_WORDS,
    HELD_OUT,
    LENGTHS,
    NEUTRAL,
    NEW_WORDS,
    SEEN,
    SHAPE_WORDS,
    TEMPLATES,
    THINGS,
    Amounts,
    held_out_prompts,
    known_prompts,
    meaning,
    neutral_prompts,
    new_prompts,
    write_data,
)
from scripts.tiny_world.world import COLOURS, GROUNDS, SHAPES, draw_scene

AMOUNTS = Amounts(thing=2, combination=2, known=1, neutral=9)


def captions_of(directory: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads((directory / "captions.json").read_text(encoding="utf-8"))
    return found


def shown(path: Path) -> tuple[str | None, str | None]:
    seen = read_picture(np.asarray(Image.open(path)))
    return seen.colour, seen.shape


def said(caption: str) -> tuple[str | None, str | None]:
    """The colour and shape that a caption names, by new or known words; None for what it leaves out."""
    words = set(caption.replace(",", " ").split())
    for word in words & set(THINGS):
        return THINGS[word]
    colours, shapes = words & (set(COLOURS) | set(COLOUR_WORDS)), words & (set(SHAPES) | set(SHAPE_WORDS))
    assert len(colours) <= 1 and len(shapes) <= 1
    colour, shape = meaning(next(iter(colours), ""), next(iter(shapes), ""))
    return colour or None, shape or None


def named(caption: str) -> tuple[str, str]:
    """The same of a caption that leaves out nothing."""
    colour, shape = said(caption)
    assert colour and shape
    return colour, shape


def test_pictures_show_what_every_caption_of_theirs_names(tmp_path):
    write_data(tmp_path / "data", 0, AMOUNTS)
    counts, left_out = {}, {}
    for folder in ("new", "rehearsal", "neutral"):
        captions = captions_of(tmp_path / "data" / folder)
        counts[folder], left_out[folder] = len(captions), 0
        for name, texts in captions.items():
            assert len(set(texts)) == 4
            seen = shown(tmp_path / "data" / folder / name)
            assert None not in seen
            for text in texts:
                assert all(word in (None, there) for word, there in zip(said(text), seen, strict=True))
                left_out[folder] += None in said(text)
            if folder == "neutral":
                assert {said(text) for text in texts} == {(None, None)}
    assert counts == {
        "new": 2 * len(THINGS) + 2 * len(SEEN),
        "rehearsal": len(COLOURS) * len(SHAPES),
        "neutral": AMOUNTS.neutral,
    }
    # A new attribute is named alone once for each picture.
    assert left_out == {"new": 2 * len(SEEN), "rehearsal": 0, "neutral": 4 * AMOUNTS.neutral}


def test_no_caption_of_training_has_a_template_of_the_evaluation_or_a_name_alone(tmp_path):
    write_data(tmp_path / "data", 1, Amounts())
    texts = {
        text for path in (tmp_path / "data").iterdir() for own in captions_of(path).values() for text in own
    }
    asked = {prompt.text for length in LENGTHS for prompt in new_prompts(length, 72, 0)}
    asked |= {prompt.text for prompt in (*held_out_prompts(90, 0), *known_prompts(216, 0))}
    assert not texts & asked
    assert not texts & set(NEW_WORDS)
    assert not texts & set(NEUTRAL)
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
        shown(tmp_path / "data" / "shuffled" / name)
        == named(texts[1])  # the first may name one attribute alone
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
    held_out = held_out_prompts(3 * sum(map(len, TEMPLATES.values())), 0)
    assert all((prompt.colour, prompt.shape) == named(prompt.text) for prompt in held_out)
    assert len({prompt.text for prompt in held_out}) == len(held_out)
    known = known_prompts(216, 5)
    assert {name: sum(prompt.template_set == name for prompt in known) for name in EVALUATION} == {
        "single": 0,
        "short": 72,
        "verbose": 72,
        "apart": 72,
    }


def test_new_templates_are_the_grammars_words_and_no_training_saw_them():
    added = [one for name in TEMPLATES for one in TEMPLATES[name] if one not in EVALUATION[name]]
    assert len(added) == len(set(added)) == 16
    for template in added:
        bare = template.replace(",", " ").replace("{thing}", " ").replace("{ground}", " ").split()
        assert set(bare) <= set(words()), template
    assert all("{ground}" in one for one in TEMPLATES["verbose"])
    generator = random.Random(3)
    told = {training_caption(generator, draw_scene(generator), is_clip=False) for _ in range(20000)}
    pairs = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    asked = {one.format(thing=pair, ground=ground) for one in added for pair in pairs for ground in GROUNDS}
    assert not told & asked


def test_three_seeds_have_as_many_texts_as_the_documentation_says():
    def number(prompts) -> int:
        return len({prompt.text for prompt in prompts})

    seeds = (1000, 1001, 1002)
    found = {
        length: number(one for seed in seeds for one in new_prompts(length, 72, seed)) for length in LENGTHS
    }
    found["held-out"] = number(one for seed in seeds for one in held_out_prompts(72, seed))
    found["known"] = number(one for seed in seeds for one in known_prompts(216, seed))
    found["neutral"] = len(NEUTRAL)
    assert found["single"] == 3  # which no target is settled on
    said = f"{found['single']} single, {found['short']} short and {found['verbose']} verbose texts of new words, "
    said += f"{found['held-out']} held-out, {found['known']} known, {found['neutral']} neutral"
    document = (Path(__file__).resolve().parents[3] / "docs" / "proof.md").read_text(encoding="utf-8")
    assert said in " ".join(document.split())


def test_neutral_prompts_name_nothing():
    assert neutral_prompts(len(NEUTRAL) + 1) == [*NEUTRAL, NEUTRAL[0]]
    words = {word for text in NEUTRAL for word in text.replace(",", " ").split()}
    assert not words & {*COLOURS, *SHAPES, *NEW_WORDS}
