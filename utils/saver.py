"""Directories that all ranks write together and that become visible only when they are whole."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.distributed import on_every_rank, on_main
from utils.files import (
    TEMPORARY_SUFFIX,
    disk_errors_as_user_errors,
    fsync_directory,
    fsync_file,
    give_usual_mode,
)
from utils.pipeline import Pipeline


def write_together(target: Path, write_share: Callable[[Path], None], finish: Callable[[Path], None]) -> None:
    """Make `target` from every rank's share. Every rank must call it.

    Each rank runs `write_share(temporary)`; when all are done, rank 0 runs `finish(temporary)`, syncs everything to
    disk and renames the directory to `target`. If any rank fails, nothing of it remains.

    Raises:
        UserError: the disk is full or not writable, on every rank.
    """
    temporary = target.with_name(f".{target.name}{TEMPORARY_SUFFIX}")

    def begin() -> None:
        with disk_errors_as_user_errors(target):
            shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
            temporary.mkdir(parents=True)

    def share() -> None:
        with disk_errors_as_user_errors(target):
            write_share(temporary)

    def publish() -> None:
        with disk_errors_as_user_errors(target):
            finish(temporary)
            for path in temporary.iterdir():
                give_usual_mode(path)
                fsync_file(path)
            fsync_directory(temporary)
            rename_into_place(temporary, target)

    try:
        on_main(begin)
        on_every_rank(share)
        on_main(publish)
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def rename_into_place(temporary: Path, target: Path) -> None:
    """Give a directory that is whole and synced its name; what had that name before is removed."""
    replaced = target.with_name(f".{target.name}.old{TEMPORARY_SUFFIX}")
    if target.exists():  # the same step, saved by a run that was resumed from before it
        target.rename(replaced)
    temporary.rename(target)
    fsync_directory(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def export_trained(
    pipeline: Pipeline,
    target: Path,
    export: Callable[[Mapping[str, Tensor], Path, Mapping[str, str]], list[Path]],
    metadata: Mapping[str, str],
) -> None:
    """Gather every stage's trained parameters on disk and let rank 0 export them into `target`.

    Through files, not through messages, because a trained encoder is larger than one rank's memory should hold.
    """
    part = f"part-{pipeline.stage_id}.safetensors"

    def write_share(directory: Path) -> None:
        if pipeline.dp_rank == 0:
            tensors = {
                name: parameter.detach().cpu().contiguous() for name, parameter in pipeline.trainables.items()
            }
            save_file(tensors, directory / part)

    def finish(directory: Path) -> None:
        parts = sorted(directory.glob("part-*.safetensors"))
        trained: dict[str, Tensor] = {}
        for path in parts:
            with safe_open(path, framework="pt") as file:
                trained |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        export(trained, directory, metadata)
        trained.clear()
        for path in parts:
            path.unlink()

    write_together(target, write_share, finish)
