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

from scripts.tiny_world.asset import ASSET, load_official
from scripts.tiny_world.drawing import EXPERTS
from scripts.tiny_world.proof import prepare
from scripts.tiny_world.proof_arms import Arm, Plan, write_configs
from scripts.tiny_world.proof_closed import solve
from scripts.tiny_world.proof_data import Amounts, write_data
from scripts.tiny_world.proof_measure import Painter, Weights, measure
from scripts.tiny_world.proof_task import MEASURE_SEED, Place, saved_encoder, train_arm
from utils.cli import run_command
from utils.config.schema import Expert
from utils.errors import EXIT_OK, UserError

AMOUNTS = Amounts(known_prompts=108, new_prompts=36, held_out_prompts=36, neutral_prompts=4)


def adapters_of(
    place: Place, plan: Plan, arm: Arm, seed: int, encoder: Path, flags: Sequence[str]
) -> dict[Expert, Path]:
    """The adapters of both experts, in a directory that is named by the flags; solved for where they are not there."""
    name = "_".join([arm.name, f"s{seed}", *(flag.lstrip("-") for flag in flags)])
    out = place.work / "closed_form" / name
    if not out.is_dir():
        adapted = Arm(f"{arm.name}_closed", arm.what, "adapter", arm.name, ("new",), 1e-3, 1, ("rank = 4",))
        config = write_configs(adapted, seed, place.work, place.checkpoint, encoder, plan.recipe.batch)
        solve(place.work, config, name, out, flags)
    return {expert: out / expert / "adapter_model.safetensors" for expert in EXPERTS}


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
    adapters = adapters_of(place, plan, arm, seed, encoder, flags)
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
