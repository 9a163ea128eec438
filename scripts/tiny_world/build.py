"""Build the tiny world's Wan from nothing: train VAE, text encoder and DiT, measure what it draws, write the asset.

    python -m scripts.tiny_world.build --out tests/assets/tiny_wan

Everything follows from the seed, at a fixed number of steps on one thread, so that the number of cores changes nothing.
What is under way is kept in --work: the same command goes on from there after an interruption, with the same result.
"""

import argparse
import hashlib
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from scripts.make_tiny_wan import write_json
from scripts.tiny_world import dit_training, vae_training
from scripts.tiny_world.asset import (
    ASSET,
    DIT_FILE,
    QUALITY_FILE,
    UMT5_FILE,
    VAE_FILE,
    load_official,
    write_official,
    write_text_and_dit,
    write_vae,
)
from scripts.tiny_world.quality import measure_all, sweep
from scripts.tiny_world.readme import write_readme
from scripts.tiny_world.tokens import Tokens, write_tokenizer_files
from scripts.tiny_world.vae_quality import measure_vae
from utils.cli import run_command
from utils.errors import EXIT_OK
from utils.files import TEMPORARY_SUFFIX, atomic_directory
from utils.progress import announce

COMMAND = "make tiny-world"


def build(out: Path, work: Path, seed: int) -> int:
    """Train, measure and write; an old asset is replaced only by a whole new one."""
    torch.set_num_threads(1)
    states = work / f"seed{seed}"
    states.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as place:
        fresh = Path(place) / "asset"
        fresh.mkdir()
        make_asset(fresh, states, seed)
        replace_directory(out, fresh)
    shutil.rmtree(states)
    announce(f"{out}: {sum(path.stat().st_size for path in out.iterdir()):,} B in all")
    return EXIT_OK


def make_asset(directory: Path, states: Path, seed: int) -> None:
    """Fill an empty directory; `states` holds what is under way."""
    trained = vae_training.train_coder(seed, states, announce)
    vae_training.train_decoder(trained, seed, states, announce)
    vae_training.train_clips(trained, seed, states, announce)
    vae = write_vae(vae_training.finished(trained, seed), directory)
    vae_quality = measure_vae(vae)
    announce(f"VAE: {vae_quality}")
    with tempfile.TemporaryDirectory() as place:
        tokenizer = Path(place) / "tokenizer"
        write_tokenizer_files(tokenizer)
        umt5, dit, loss = dit_training.train_joint(vae, Tokens(tokenizer), seed, states, announce)
        write_text_and_dit(umt5, dit, directory)
        write_official(directory, Path(place) / "official")
        model = load_official(Path(place) / "official")
    drawing, tried = sweep(model, announce)
    quality: dict[str, Any] = {
        "command": COMMAND,
        "seed": seed,
        "drawing": asdict(drawing),
        "results": measure_all(model, drawing, announce),
        "vae": vae_quality,
        "sweep": tried,
        "training": training_facts(loss),
        "sha256": {name: digest(directory / name) for name in (DIT_FILE, UMT5_FILE, VAE_FILE)},
    }
    write_json(directory / QUALITY_FILE, quality)
    write_readme(directory, quality)


def replace_directory(target: Path, fresh: Path) -> None:
    """Put a copy of `fresh` in the place of `target`."""
    old = target.with_name(f".{target.name}.old{TEMPORARY_SUFFIX}")
    if target.exists():
        target.rename(old)
    with atomic_directory(target) as directory:
        for path in fresh.iterdir():
            shutil.copyfile(path, directory / path.name)
    shutil.rmtree(old, ignore_errors=True)


def training_facts(loss: float) -> dict[str, Any]:
    """How the training was done."""
    return {
        "vae_picture_steps": vae_training.PICTURES.num_steps,
        "vae_decoder_steps": vae_training.DECODER.num_steps,
        "vae_clip_steps": vae_training.CLIPS.num_steps,
        "joint_steps": dit_training.JOINT.num_steps,
        "joint_fine_steps": dit_training.FINE.num_steps,
        "pictures": dit_training.NUM_PICTURES,
        "last_joint_loss": round(loss, 4),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ASSET, help="directory of the asset; replaced (default: %(default)s)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("output/tiny_world"),
        help="where an interrupted build goes on from; remove it to begin anew (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="everything follows from it (default: 0)")
    parser.add_argument("--debug", action="store_true", help="show stack traces")
    arguments = parser.parse_args(argv)
    return run_command(lambda: build(arguments.out, arguments.work, arguments.seed), debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
