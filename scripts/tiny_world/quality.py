"""How well the tiny Wan draws what it is told: prompts of templates that training never saw, read by the checker."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from scripts.tiny_world.asset import TinyWan
from scripts.tiny_world.captions import EVALUATION, Prompt, evaluation_prompts
from scripts.tiny_world.checker import read_picture
from scripts.tiny_world.drawing import Drawing, draw
from scripts.tiny_world.world import Pixels
from utils.rng import derive_seed

GUIDANCE, SHIFTS, STEPS = (2.0, 3.0, 4.0), (2.0, 3.0), (16,)
SWEEP_COUNT, COUNT = 72, 216
# The sweep draws with other noise than what is reported, so that choosing does not flatter the choice.
SWEEP_SEED, SEED = 1, 2


def sweep(model: TinyWan, say: Callable[[str], None]) -> tuple[Drawing, list[dict[str, Any]]]:
    """Try guidance and shift; returns the best by pictures that are right, and what each reached.

    Of equals the first counts: less guidance changes less.
    """
    prompts = evaluation_prompts("short", SWEEP_COUNT, SWEEP_SEED)
    tried = [Drawing(steps, guidance, shift) for steps in STEPS for guidance in GUIDANCE for shift in SHIFTS]
    rows = []
    for drawing in tried:
        rows.append(asdict(drawing) | measure(model, prompts, drawing, SWEEP_SEED))
        say(f"sweep: {rows[-1]}")
    best = max(range(len(tried)), key=lambda index: (rows[index]["both_right"], -index))
    return tried[best], rows


def measure_all(model: TinyWan, drawing: Drawing, say: Callable[[str], None]) -> dict[str, Any]:
    """Shares of pictures that are right, by set of templates."""
    results: dict[str, Any] = {}
    for name in EVALUATION:
        results[name] = measure(model, evaluation_prompts(name, COUNT, SEED), drawing, SEED)
        say(f"{name}: {results[name]}")
    return results


def measure(model: TinyWan, prompts: Sequence[Prompt], drawing: Drawing, seed: int) -> dict[str, float]:
    """Draw prompts as pictures and read them; shares in [0, 1] and the number of prompts."""
    seeds = [derive_seed(seed, "draw", place) for place in range(len(prompts))]
    _, pictures = draw(model, [prompt.text for prompt in prompts], drawing, seeds)
    return judge(prompts, pictures)


def outcomes_of(prompts: Sequence[Prompt], pictures: Iterable[Pixels]) -> dict[str, list[int]]:
    """0 or 1 for each prompt, by what has to be as asked for.

    `colour`; `shape`, read strictly; `both`; `nearest`, which asks less: the colour, and the shape that fits best however
    badly it is drawn.
    """
    rows: dict[str, list[int]] = {name: [] for name in ("colour", "shape", "both", "nearest")}
    for prompt, picture in zip(prompts, pictures, strict=True):
        seen = read_picture(picture)
        colour, shape = seen.colour == prompt.colour, seen.shape == prompt.shape
        rows["colour"].append(int(colour))
        rows["shape"].append(int(shape))
        rows["both"].append(int(colour and shape))
        rows["nearest"].append(int(colour and seen.nearest == prompt.shape))
    return rows


def judge(prompts: Sequence[Prompt], drawn_NHWC: Pixels) -> dict[str, float]:
    """Shares right of what was drawn, uint8 [N, size, size, 3], as of `outcomes_of`, and the number of prompts."""
    found = outcomes_of(prompts, drawn_NHWC)
    shares = {f"{name}_right": round(fmean(rows), 4) for name, rows in found.items()}
    return {"n": len(prompts)} | shares
