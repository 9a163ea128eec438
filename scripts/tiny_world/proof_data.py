"""What the proof trains on and asks for: new words for things that the DiT draws already, pictures, captions, prompts.

Three words name a combination of colour and shape, two an attribute. Training sees the attributes in some combinations only,
and never two new words together. No caption of training has a template of the evaluation, nor the bare name.
"""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

from scripts.tiny_world.captions import (
    COLOUR_ONLY,
    EVALUATION,
    GENERAL,
    SHAPE_ONLY,
    TRAINING,
    Prompt,
    evaluation_prompts,
    fill,
)
from scripts.tiny_world.world import COLOURS, GROUNDS, SHAPES, Pixels, draw_centred, render
from utils.files import atomic_directory

# A name for a thing as a whole: stands where "red triangle" would.
THINGS: dict[str, tuple[str, str]] = {
    "zorp": ("red", "triangle"),
    "blicket": ("green", "circle"),
    "daxen": ("purple", "square"),
}
# A name for a colour, a name for a shape.
COLOUR_WORDS = {"vume": "cyan"}
SHAPE_WORDS = {"korb": "square"}
# (word for the colour, word for the shape): seen in training, and kept out of it.
SEEN = (
    ("vume", "circle"),
    ("vume", "triangle"),
    ("red", "korb"),
    ("green", "korb"),
    ("yellow", "korb"),
    ("purple", "korb"),
)
HELD_OUT = (("vume", "square"), ("blue", "korb"), ("vume", "korb"))
NEW_WORDS = (*THINGS, *COLOUR_WORDS, *SHAPE_WORDS)
LENGTHS = ("single", "short", "verbose")
# The evaluation's and more, so that there are enough texts for an interval. No training of the proof saw any.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "single": EVALUATION["single"],
    "short": (
        *EVALUATION["short"],
        "this is one {thing}",
        "it is a {thing}",
        "here a {thing} is seen",
        "a simple {thing}",
        "there is one {thing}",
        "this picture is of a {thing}",
        "a {thing} and nothing else",
        "one plain {thing} in a picture",
    ),
    "verbose": (
        *EVALUATION["verbose"],
        "on a {ground} wall, near the middle, there is one {thing}, and nothing else can be seen",
        "this is a {ground} picture, and what can be seen in the middle of it is a {thing}",
        "the background here is {ground} and plain, and in front of it is the {thing}",
        "in this simple picture with a {ground} background there is nothing else, it is one {thing}",
        "near the side or in the middle of a plain {ground} wall a {thing} can be seen here",
        "a {thing} is what can be seen in front of the {ground} wall in this simple picture",
        "one picture with a plain {ground} background, and all that is seen in it is a {thing}",
        "here, in the middle of the picture, a {thing} is in front of a {ground} background",
    ),
    "apart": EVALUATION["apart"],
}
# None of them is one of GENERAL, which training may say.
_NEUTRAL_TEMPLATES = (
    "one thing and nothing else",
    "something in the middle of a picture",
    "here is something",
    "all that can be seen is one thing",
    "a simple {ground} background",
    "this plain wall is {ground}",
    "there is something near the side of a {ground} picture",
    "the thing in the picture",
    "here is a {ground} picture",
    "this is one plain thing",
    "there is one thing on a {ground} wall, and it is all that can be seen",
    "in front of a {ground} background there is one thing",
)
NEUTRAL = tuple(
    dict.fromkeys(fill(one, "", "", ground, None) for one in _NEUTRAL_TEMPLATES for ground in GROUNDS)
)
_WITHOUT_NAME_ALONE = tuple(one for one in TRAINING if one != "{thing}{motion}")
_OF_THINGS = tuple(one for one in _WITHOUT_NAME_ALONE if "{thing}" in one)
# One attribute in a sentence, without the bare word.
_ALONE = {
    "colour": tuple(one for one in COLOUR_ONLY if one != "{colour}"),
    "shape": tuple(one for one in SHAPE_ONLY if one != "{shape}"),
}
_CAPTIONS_OF_A_PICTURE = 4


@dataclass(frozen=True)
class Amounts:
    """How many pictures there are to train on, and how many prompts to measure with, for one seed of training.

    Attributes:
        thing, combination, known: pictures of each new thing, each seen combination, each known combination.
        neutral: pictures of new things and seen combinations whose captions name neither.
        known_prompts: of known words, a third for each of the short, verbose and apart templates.
        new_prompts: of new words, for each length.
        held_out_prompts: of combinations kept out of training.
        neutral_prompts: prompts that name neither colour nor shape.
    """

    thing: int = 16
    combination: int = 8
    known: int = 6
    neutral: int = 24
    known_prompts: int = 216
    new_prompts: int = 72
    held_out_prompts: int = 72
    neutral_prompts: int = 72


def meaning(colour_word: str, shape_word: str) -> tuple[str, str]:
    """The colour and shape that two words, new or known, name."""
    return COLOUR_WORDS.get(colour_word, colour_word), SHAPE_WORDS.get(shape_word, shape_word)


def write_data(directory: Path, seed: int, amounts: Amounts) -> None:
    """Write `new/`, `rehearsal/`, `neutral/` and `shuffled/`: pictures with captions. Nothing where it is there already.

    `shuffled/` has the pictures of the first two with their captions dealt out at random.
    """
    if directory.is_dir():
        return
    draws = random.Random(f"{seed}/proof")
    new = [_thing(draws, word) for word in THINGS for _ in range(amounts.thing)]
    new += [_combination(draws, *pair) for pair in SEEN for _ in range(amounts.combination)]
    known = [
        _combination(draws, colour, shape)
        for colour in COLOURS
        for shape in SHAPES
        for _ in range(amounts.known)
    ]
    neutral = [_neutral(draws, index) for index in range(amounts.neutral)]
    captions = [one[1] for one in (*new, *known)]
    draws.shuffle(captions)
    mixed = [(pixels, other) for (pixels, _), other in zip((*new, *known), captions, strict=True)]
    with atomic_directory(directory) as place:
        for name, samples in (("new", new), ("rehearsal", known), ("neutral", neutral), ("shuffled", mixed)):
            _write(place / name, samples)


def known_prompts(count: int, seed: int) -> list[Prompt]:
    """Prompts of known words: as many of the short as of the verbose and the apart templates."""
    return [
        prompt
        for name in ("short", "verbose", "apart")
        for prompt in evaluation_prompts(name, count // 3, seed)
    ]


def new_prompts(length: str, count: int, seed: int) -> list[Prompt]:
    """Prompts of one length in which a new word names the thing as a whole, each word as often."""
    draws = random.Random(f"{seed}/new/{length}")
    words = tuple(THINGS)
    prompts = []
    for index in range(count):
        word = words[index % len(words)]
        template = TEMPLATES[length][(index // len(words)) % len(TEMPLATES[length])]
        text = _named(template, word, draws.choice(tuple(GROUNDS)))
        prompts.append(Prompt(text, *THINGS[word], length))
    return prompts


def held_out_prompts(count: int, seed: int) -> list[Prompt]:
    """Prompts of combinations of a new attribute word that training never saw, in turn through all templates.

    The order of the templates follows from the seed, so that few prompts of several seeds reach all of them.
    """
    draws = random.Random(f"{seed}/held_out")
    templates = [(name, one) for name in TEMPLATES for one in TEMPLATES[name]]
    draws.shuffle(templates)
    prompts = []
    for index in range(count):
        pair = HELD_OUT[index % len(HELD_OUT)]
        name, template = templates[(index // len(HELD_OUT)) % len(templates)]
        text = fill(template, *pair, draws.choice(tuple(GROUNDS)), None)
        prompts.append(Prompt(text, *meaning(*pair), name))
    return prompts


def texts_digest() -> str:
    """SHA-256 of what prompts are made of: results of other templates or words are not to be mixed with these."""
    made_of = (TEMPLATES, NEUTRAL, THINGS, COLOUR_WORDS, SHAPE_WORDS, HELD_OUT)
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def neutral_prompts(count: int) -> list[str]:
    """Prompts that name neither a colour nor a shape, in turn."""
    return [NEUTRAL[index % len(NEUTRAL)] for index in range(count)]


def _named(template: str, word: str, ground: str) -> str:
    """A template whose thing is one word."""
    return template.format(thing=word, ground=ground, motion="")


def _thing(draws: random.Random, word: str) -> tuple[Pixels, list[str]]:
    scene = draw_centred(draws, *THINGS[word])
    templates = draws.sample(_OF_THINGS, _CAPTIONS_OF_A_PICTURE)
    return render(scene), [_named(one, word, scene.ground) for one in templates]


def _combination(draws: random.Random, colour_word: str, shape_word: str) -> tuple[Pixels, list[str]]:
    scene = draw_centred(draws, *meaning(colour_word, shape_word))
    templates = draws.sample(_WITHOUT_NAME_ALONE, _CAPTIONS_OF_A_PICTURE)
    # A new attribute is named alone too: a word that only ever comes with others is learned as a part of them.
    if colour_word in COLOUR_WORDS:
        templates[0] = draws.choice(_ALONE["colour"])
    if shape_word in SHAPE_WORDS:
        templates[0] = draws.choice(_ALONE["shape"])
    return render(scene), [fill(one, colour_word, shape_word, scene.ground, None) for one in templates]


def _neutral(draws: random.Random, index: int) -> tuple[Pixels, list[str]]:
    meanings = (*THINGS.values(), *(meaning(*pair) for pair in SEEN))
    scene = draw_centred(draws, *meanings[index % len(meanings)])
    templates = draws.sample(GENERAL, _CAPTIONS_OF_A_PICTURE)
    return render(scene), [fill(one, "", "", scene.ground, None) for one in templates]


def _write(directory: Path, samples: list[tuple[Pixels, list[str]]]) -> None:
    from PIL import Image

    directory.mkdir()
    captions = {}
    for index, (pixels, texts) in enumerate(samples):
        name = f"{index:03}.png"
        Image.fromarray(pixels).save(directory / name)
        captions[name] = texts
    (directory / "captions.json").write_text(json.dumps(captions, indent=1), encoding="utf-8")
