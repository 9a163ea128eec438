"""Build the tiny world's Wan from nothing: train VAE, text encoder and DiT, measure what it draws, write the asset.

    python -m scripts.tiny_world.build --out tests/assets/tiny_wan

Everything follows from the seed, at a fixed number of steps on one thread, so that the number of cores changes nothing.
What is under way is kept in --work: the same command goes on from there after an interruption, with the same result.
"""

import argparse
import hashlib
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from scripts.make_tiny_wan import write_json
from scripts.tiny_world import dit_training, vae_training
from scripts.tiny_world.asset import (
    ASSET,
    CONFIG_FILE,
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
from scripts.tiny_world.readme import README_FILE, write_readme
from scripts.tiny_world.tokens import Tokens, write_tokenizer_files
from scripts.tiny_world.vae_quality import measure_vae
from utils.cli import run_command
from utils.errors import EXIT_OK, UserError
from utils.files import TEMPORARY_SUFFIX, atomic_directory, disk_errors_as_user_errors, fsync_directory
from utils.progress import announce

PROGRAM = "python -m scripts.tiny_world.build"
# What makes a directory such an asset, and everything that one holds.
MARKS = (QUALITY_FILE, DIT_FILE)
ASSET_FILES = (*MARKS, UMT5_FILE, VAE_FILE, CONFIG_FILE, README_FILE)


def build(out: Path, work: Path, seed: int, command: str) -> int:
    """Train, measure and write; an old asset is replaced only by a whole new one.

    Raises:
        UserError: `out` is something else than such an asset, or lies where `work` is; nothing was trained or removed.
    """
    torch.set_num_threads(1)
    out, states = out.resolve(), (work / f"seed{seed}").resolve()
    # In this order: beside what is no asset, nothing is cleared away either.
    check_replaceable(out, ASSET_FILES, MARKS)
    restore(out)
    if out in (states, *states.parents) or states in out.parents:
        raise UserError(f"--work {work}: lies in --out {out}, or the other way round; give two places")
    resumed = states.is_dir() and any(states.iterdir())
    states.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as place:
        fresh = Path(place) / "asset"
        fresh.mkdir()
        make_asset(fresh, states, seed, provenance(command, seed, resumed))
        check_replaceable(out, ASSET_FILES, MARKS)
        replace_directory(out, fresh)
    shutil.rmtree(states)
    announce(f"{out}: {sum(path.stat().st_size for path in out.iterdir()):,} B in all")
    return EXIT_OK


def provenance(command: str, seed: int, resumed: bool) -> dict[str, Any]:
    """Where an asset comes from: the command line, the seed, and whether an earlier run had begun it."""
    how = "going on from what an interrupted run had left" if resumed else "from nothing in one run"
    return {"command": command, "seed": seed, "provenance": f"made by `{command}` with seed {seed}, {how}"}


def make_asset(directory: Path, states: Path, seed: int, made_by: dict[str, Any]) -> None:
    """Fill an empty directory; `states` holds what is under way, `made_by` is of `provenance`."""
    vae_quality, loss = train(directory, states, seed)
    with tempfile.TemporaryDirectory() as place:
        write_official(directory, Path(place) / "official")
        model = load_official(Path(place) / "official")
    drawing, tried = sweep(model, announce)
    quality: dict[str, Any] = made_by | {
        "drawing": asdict(drawing),
        "results": measure_all(model, drawing, announce),
        "vae": vae_quality,
        "sweep": tried,
        "training": training_facts(loss),
        "sha256": {name: digest(directory / name) for name in (DIT_FILE, UMT5_FILE, VAE_FILE)},
    }
    write_json(directory / QUALITY_FILE, quality)
    write_readme(directory, quality)


def train(directory: Path, states: Path, seed: int) -> tuple[dict[str, Any], float]:
    """Train every part and write its weights; returns what the VAE keeps of the world, and the last loss of the DiT."""
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
    return vae_quality, loss


def check_replaceable(target: Path, known: Collection[str], marks: Collection[str]) -> None:
    """Whether `target` may be replaced: it is not there, is empty, or has all of `marks` and nothing but `known`.

    Raises:
        UserError: it is something else, which replacing would delete.
    """
    if not target.exists() and not target.is_symlink():
        return
    mend = "nothing was touched; give another --out, or move it away"
    if not target.is_dir() or target.is_symlink():
        raise UserError(f"--out {target}: exists and is no directory; {mend}")
    names = {path.name for path in target.iterdir()}
    missing, others = sorted(set(marks) - names), sorted(names - set(known))
    if names and missing:
        raise UserError(
            f"--out {target}: is not empty and no such asset, as it has no {', '.join(missing)}; {mend}"
        )
    if others:
        raise UserError(
            f"--out {target}: holds {', '.join(others)} beside the asset, which would be deleted; {mend}"
        )


def replace_directory(target: Path, fresh: Path) -> None:
    """Put a copy of `fresh` in the place of `target`, which may be missing.

    The copy is written beside `target` and made durable first. Then come two renames, since no call of the system that Python
    has exchanges two directories: `target` to its old name, the copy to `target`. Stopped before them, `target` is as it
    was; between them there is none, but both are whole beside it, and `restore`, with which the next run begins, puts the old
    one back; after them `target` is the new one, and `restore` removes the old one.

    Raises:
        UserError: the disk is full or the place is not writable; `target` is as it was.
    """
    restore(target)
    old, new = _old(target), _new(target)
    with atomic_directory(new) as directory:
        shutil.copytree(fresh, directory, dirs_exist_ok=True)
    with disk_errors_as_user_errors(target):
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            restore(target)
            raise
        fsync_directory(target.parent)
    restore(target)


def restore(target: Path) -> None:
    """Mend what a `replace_directory` that was stopped has left beside `target`; nothing where none was."""
    old, new = _old(target), _new(target)
    with disk_errors_as_user_errors(target):
        if old.exists() and not (target.is_dir() and any(target.iterdir())):
            if target.exists():
                target.rmdir()
            old.rename(target)
            fsync_directory(target.parent)
        for rest in (old, new):
            if rest.exists():
                shutil.rmtree(rest)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old{TEMPORARY_SUFFIX}")


def _new(target: Path) -> Path:
    return target.with_name(f".{target.name}.new{TEMPORARY_SUFFIX}")


def training_facts(loss: float) -> dict[str, Any]:
    """How the training was done."""
    return {
        "vae_picture_steps": vae_training.PICTURES.num_steps,
        "vae_decoder_steps": vae_training.DECODER.num_steps,
        "vae_clip_steps": vae_training.CLIPS.num_steps,
        "joint_steps": dit_training.JOINT.num_steps,
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
        "--out",
        type=Path,
        default=ASSET,
        help="directory of the asset; such an asset that is there is replaced, anything else is left alone and refused "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("output/tiny_world"),
        help="where an interrupted build goes on from; remove it to begin anew (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="everything follows from it (default: 0)")
    parser.add_argument("--debug", action="store_true", help="show stack traces")
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given)
    command = f"{PROGRAM} {shlex.join(given)}".strip()
    return run_command(
        lambda: build(arguments.out, arguments.work, arguments.seed, command), debug=arguments.debug
    )


if __name__ == "__main__":
    sys.exit(main())
