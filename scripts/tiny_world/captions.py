"""What is said about a scene: a small grammar, with templates for training and others that training never sees.

`{thing}` is what a new word may name ("a red circle" as a whole), `{colour}` and `{shape}` are its attributes,
`{ground}` the ground, `{motion}` an optional clause about a clip (of a picture nobody can say how it moves). A template
either has `{thing}`, or both attributes apart. All words of the evaluation templates occur in training, in other places.
"""

import random
from dataclasses import dataclass

from scripts.tiny_world.world import COLOURS, GROUNDS, SHAPES, Scene

TRAINING = (
    "{thing}{motion}",
    "a {thing}{motion}",
    "the {thing}{motion}",
    "a {thing}{motion} on a {ground} background",
    "one {thing} on a {ground} background{motion}",
    "a picture of a {thing}{motion}",
    "there is a {thing} in the picture{motion}",
    "this is a simple picture with one {thing} and nothing else{motion}",
    "in the middle or near the side of a {ground} picture there is a {thing}{motion}",
    "on a {ground} background there is one {thing}, and it is all that can be seen{motion}",
    "a plain {ground} wall, and in front of it a {thing}{motion}",
    "the {shape} is {colour}{motion}",
    "one {shape}, and it is {colour}{motion}",
    "a {shape} in {colour}{motion}",
    "here the {shape} that can be seen is {colour}, and the background is {ground}{motion}",
    "{colour} is what this {shape} is{motion}",
)
# Never seen in training. Short ones name the thing and little else; verbose ones surround it with words.
EVALUATION: dict[str, tuple[str, ...]] = {
    "single": ("{thing}{motion}",),
    "short": (
        "one {thing}{motion}",
        "this {thing}{motion}",
        "here is a {thing}{motion}",
        "a plain {thing}{motion}",
    ),
    "verbose": (
        "here is a picture with a {thing} in front of a plain {ground} background, and nothing else{motion}",
        "this simple picture is of one {thing}, and the wall in the background is {ground}{motion}",
        "in front of a {ground} wall there is the {thing} that can be seen in this picture{motion}",
        "all that can be seen here, on a plain and {ground} background, is one {thing}{motion}",
    ),
    "apart": (
        "this {shape} is {colour}{motion}",
        "here is one {shape}, in {colour}{motion}",
        "a picture of a {shape} that is {colour}{motion}",
        "there is a {shape} on a {ground} background, and it is {colour}{motion}",
    ),
}
MOTION_CLAUSES: dict[str, tuple[str, ...]] = {
    "left": ("moves to the left", "moving left"),
    "right": ("moves to the right", "moving right"),
    "up": ("moves up", "moving up"),
    "down": ("moves down", "moving down"),
    "still": ("stands still", "standing still"),
}
COLOUR_ONLY = ("something {colour}", "a {colour} thing", "a picture of something {colour}", "{colour}")
SHAPE_ONLY = ("a {shape}", "one {shape} and nothing else", "a picture of a {shape}", "{shape}")
GENERAL = (
    "a picture",
    "something",
    "a simple picture of one thing",
    "a thing on a {ground} background",
    "a plain {ground} wall and something in front of it",
    "this is a picture of something on a {ground} background",
)
# Shares of training captions that say less than everything; the empty one is what guidance subtracts.
EMPTY_SHARE, COLOUR_SHARE, SHAPE_SHARE, GENERAL_SHARE = 0.10, 0.07, 0.07, 0.05


@dataclass(frozen=True)
class Prompt:
    """A caption for evaluation of pictures, and what should be seen."""

    text: str
    colour: str
    shape: str
    template_set: str


def training_caption(generator: random.Random, scene: Scene, is_clip: bool) -> str:
    """What training is told about a scene at one visit."""
    draw = generator.random()
    if draw < EMPTY_SHARE:
        return ""
    templates: tuple[str, ...] = TRAINING
    for share, fewer in ((COLOUR_SHARE, COLOUR_ONLY), (SHAPE_SHARE, SHAPE_ONLY), (GENERAL_SHARE, GENERAL)):
        draw -= share
        if draw < EMPTY_SHARE:
            templates = fewer
            break
    clause = generator.choice(MOTION_CLAUSES[scene.motion]) if is_clip else None
    return fill(generator.choice(templates), scene.colour, scene.shape, scene.ground, clause)


def fill(template: str, colour: str, shape: str, ground: str, clause: str | None) -> str:
    """A template with its words."""
    return template.format(
        thing=f"{colour} {shape}",
        colour=colour,
        shape=shape,
        ground=ground,
        motion="" if clause is None else f" {clause}",
    )


def evaluation_prompts(template_set: str, count: int, seed: int) -> list[Prompt]:
    """Prompts of one set of templates: every combination of colour and shape comes up before one is used again."""
    # The last word is part of what the asset's measured prompts follow from.
    generator = random.Random(f"{seed}/{template_set}/False")
    combinations = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    prompts = []
    for index in range(count):
        if index % len(combinations) == 0:
            generator.shuffle(combinations)
        colour, shape = combinations[index % len(combinations)]
        template = EVALUATION[template_set][index % len(EVALUATION[template_set])]
        text = fill(template, colour, shape, generator.choice(tuple(GROUNDS)), None)
        prompts.append(Prompt(text, colour, shape, template_set))
    return prompts


def words() -> list[str]:
    """Every word of the grammar, in order of the alphabet."""
    texts = [*TRAINING, *COLOUR_ONLY, *SHAPE_ONLY, *GENERAL]
    texts += [template for templates in EVALUATION.values() for template in templates]
    texts += [clause for clauses in MOTION_CLAUSES.values() for clause in clauses]
    bare = " ".join(texts).replace(",", " ").replace("{", " {").replace("}", "} ").split()
    fixed = {word for word in bare if not word.startswith("{")}
    return sorted(fixed | set(COLOURS) | set(SHAPES) | set(GROUNDS))
