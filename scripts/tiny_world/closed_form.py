"""What the closed-form translator restores on the tiny world: known and new words drawn with a tuned encoder, without and with it.

    python -m scripts.tiny_world.closed_form --arm damaging --seed 0 -- --rank 16

Tunes the encoder as the proof's arm does (`proof_arms.py`), unless that is done already in --work; solves with
scripts/solve_translator.py, to which everything behind `--` goes; draws the same prompts from the same noise with the base, the
tuned encoder, and the tuned encoder with the adapter, and prints the share of pictures with the colour and the nearest shape
that were asked for. No prompt that is drawn is among those that the adapter is solved from.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts import solve_translator
from scripts.tiny_world.asset import ASSET, load_official
from scripts.tiny_world.captions import COLOUR_ONLY, GENERAL, SHAPE_ONLY, TRAINING, fill
from scripts.tiny_world.drawing import EXPERTS
from scripts.tiny_world.proof import prepare
from scripts.tiny_world.proof_arms import Arm, Plan, write_configs
from scripts.tiny_world.proof_data import SEEN, THINGS, Amounts, write_data
from scripts.tiny_world.proof_measure import Painter, Weights, measure
from scripts.tiny_world.proof_task import MEASURE_SEED, Place, saved_encoder, train_arm
from scripts.tiny_world.world import COLOURS, GROUNDS, SHAPES
from utils.cli import run_command
from utils.errors import EXIT_FAILED, EXIT_INCONCLUSIVE, EXIT_OK, UserError
from utils.files import atomic_write_text

# Without the bare name, which is drawn.
TEMPLATES = tuple(template for template in TRAINING if template != "{thing}{motion}")
AMOUNTS = Amounts(known_prompts=108, new_prompts=36, held_out_prompts=36, neutral_prompts=4)


def neutral_texts() -> tuple[str, ...]:
    """Known words in the templates of training, and captions that say less."""
    return tuple(
        dict.fromkeys(
            fill(template, colour, shape, ground, None)
            for template in (*TEMPLATES, *COLOUR_ONLY, *SHAPE_ONLY, *GENERAL)
            for colour in COLOURS
            for shape in SHAPES
            for ground in GROUNDS
        )
    )


def domain_texts() -> tuple[str, ...]:
    """New words in the templates of training: things as a whole, and combinations that the encoder was tuned on."""
    things = [
        fill(template.replace("{thing}", word), "", "", ground, None)
        for template in TEMPLATES
        if "{thing}" in template
        for word in THINGS
        for ground in GROUNDS
    ]
    pairs = [
        fill(template, *pair, ground, None) for template in TEMPLATES for pair in SEEN for ground in GROUNDS
    ]
    return tuple(dict.fromkeys(things + pairs))


def solve(place: Place, plan: Plan, arm: Arm, seed: int, encoder: Path, flags: Sequence[str]) -> Path:
    """The adapters of both experts, in a directory that is named by the flags.

    Raises:
        UserError: solving failed, of which it has said why.
    """
    name = "_".join([arm.name, f"s{seed}", *(flag.lstrip("-") for flag in flags)])
    out = place.work / "closed_form" / name
    if out.is_dir():
        return out
    texts = {"neutral": neutral_texts(), "domain": domain_texts()}
    files = {kind: place.work / f"closed_form_{kind}.txt" for kind in texts}
    for kind, lines in texts.items():
        atomic_write_text(files[kind], "\n".join(lines) + "\n")
    adapted = Arm(f"{arm.name}_closed", arm.what, "adapter", arm.name, ("new",), 1e-3, 1, ("rank = 4",))
    config = write_configs(adapted, seed, place.work, place.checkpoint, encoder, plan.recipe.batch)
    given = {
        "--config": config,
        "--out": out,
        "--prompts": files["neutral"],
        "--domain_prompts": files["domain"],
        "--reports_dir": place.work / "reports",
        "--run_tag": name,
    }
    words = [str(word) for pair in given.items() for word in pair]
    status = solve_translator.main([*words, *flags])
    if status not in (EXIT_OK, EXIT_FAILED, EXIT_INCONCLUSIVE):
        raise UserError(f"{' '.join(flags)}: scripts/solve_translator.py ended with {status}")
    return out


def shares(painter: Painter, place: Place, weights: Weights, seed: int) -> str:
    """Shares of pictures that are right by colour and nearest shape, by cell, as a line."""
    base = place.work / f"closed_form_base_s{seed}.safetensors"
    outcomes = measure(painter, weights, MEASURE_SEED + seed, AMOUNTS, base)
    found = {name: cell["nearest"] for name, cell in outcomes.items() if "nearest" in cell}
    return ", ".join(f"{name} {sum(hits) / len(hits):.1%} (n {len(hits)})" for name, hits in found.items())


def run(work: Path, asset: Path, arm_name: str, seed: int, flags: Sequence[str]) -> int:
    """Tune, solve, draw and print."""
    plan = Plan(seeds=(seed,))
    arm = next((arm for arm in plan.chosen() if arm.name == arm_name and arm.kind == "encoder"), None)
    if arm is None:
        raise UserError(f"--arm {arm_name}: is no arm of the proof that tunes an encoder")
    place = prepare(work, plan, asset)
    write_data(work / "data" / f"s{seed}", seed, plan.amounts)
    train_arm(place, plan, arm, seed)
    encoder = saved_encoder(place, arm.name, seed)
    out = solve(place, plan, arm, seed, encoder, flags)
    adapters = {expert: out / expert / "adapter_model.safetensors" for expert in EXPERTS}
    painter = Painter(load_official(place.checkpoint), place.checkpoint, place.drawing)
    for name, weights in (
        ("base", Weights()),
        (arm.name, Weights(encoder)),
        (f"{arm.name} + closed form {' '.join(flags)}", Weights(encoder, adapters)),
    ):
        print(f"{name}: {shares(painter, place, weights, seed)}", flush=True)
    return EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("output/tiny_world_closed_form"),
        help="where a tuned encoder is kept (default: %(default)s)",
    )
    parser.add_argument(
        "--asset", type=Path, default=ASSET, help="the trained miniature (default: %(default)s)"
    )
    parser.add_argument("--arm", default="gentle", help="how the encoder is tuned (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--debug", action="store_true", help="show stack traces")
    parser.add_argument("flags", nargs="*", help="for scripts/solve_translator.py, behind --")
    arguments = parser.parse_args(argv)
    return run_command(
        lambda: run(arguments.work, arguments.asset, arguments.arm, arguments.seed, arguments.flags),
        debug=arguments.debug,
    )


if __name__ == "__main__":
    sys.exit(main())
