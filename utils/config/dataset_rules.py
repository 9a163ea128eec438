"""Rules over a dataset TOML that need neither its files nor the model."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from utils.config.rules import Rule
from utils.config.schema import DatasetConfig, DirectoryConfig, Problem
from utils.data.clips import CLIP_MODES, MAX_UNIFORM_CLIPS, is_clip_mode

FRAME_QUANTUM = 4  # Every Wan VAE packs frame 1 alone and then four at a time.

_OVERRIDABLE_LISTS = ("ar_buckets", "resolutions", "frame_buckets", "size_buckets")


def check_directories(dataset: DatasetConfig) -> list[Problem]:
    """There is at least one [[directory]]."""
    if dataset.directory:
        return []
    return [Problem("directory", "is empty", "add a [[directory]] section with path")]


def check_aspect_ratios(dataset: DatasetConfig) -> list[Problem]:
    """min_ar is at most max_ar."""
    problems = []
    for where, table in _tables(dataset):
        low, high = (_effective(table, dataset, name) for name in ("min_ar", "max_ar"))
        # A directory that says nothing of it is not told again what is wrong at the top level.
        if low > high and (table is dataset or (table.min_ar, table.max_ar) != (None, None)):
            is_max = table.min_ar is None
            key = where("max_ar" if is_max else "min_ar")
            reason = (
                f"is {high:g}, below min_ar = {low:g}" if is_max else f"is {low:g}, above max_ar = {high:g}"
            )
            problems.append(Problem(key, reason, "lower min_ar or raise max_ar; both are width / height"))
    return problems


def check_lists(dataset: DatasetConfig) -> list[Problem]:
    """Lists of sizes, lengths and ratios are not empty."""
    return [
        _empty(where(name))
        for where, table in _tables(dataset)
        for name in _OVERRIDABLE_LISTS
        if getattr(table, name) == ()
    ]


def check_size_buckets(dataset: DatasetConfig) -> list[Problem]:
    """Every entry of size_buckets is [width, height, frames]."""
    problems = []
    for where, table in _tables(dataset):
        for size in table.size_buckets or ():
            if len(size) != 3:
                reason = f"holds {list(size)}; each entry is [width, height, frames]"
                problems.append(Problem(where("size_buckets"), reason, "e.g. [832, 480, 49]"))
    return problems


def check_frame_counts(dataset: DatasetConfig) -> list[Problem]:
    """Clip lengths are 4n+1 frames: 1, 5, 9, ..."""
    problems = []
    for where, table in _tables(dataset):
        lengths = [("frame_buckets", length) for length in table.frame_buckets or ()]
        lengths += [("size_buckets", size[2]) for size in table.size_buckets or () if len(size) == 3]
        for name, length in lengths:
            if (length - 1) % FRAME_QUANTUM:
                lower = (length - 1) // FRAME_QUANTUM * FRAME_QUANTUM + 1
                fix = f"use {lower} or {lower + FRAME_QUANTUM}"
                problems.append(Problem(where(name), f"holds {length} frames; a clip has 4n+1 frames", fix))
    return problems


def check_clip_modes(dataset: DatasetConfig) -> list[Problem]:
    """video_clip_mode is single_beginning, single_middle, multiple_overlapping or uniform:N."""
    problems = []
    for where, table in _tables(dataset):
        mode = table.video_clip_mode
        if mode is not None and not is_clip_mode(mode):
            fix = f"use {', '.join(CLIP_MODES[:-1])} or {CLIP_MODES[-1]} with N from 1 to {MAX_UNIFORM_CLIPS}"
            problems.append(Problem(where("video_clip_mode"), f"is {mode!r}, which is no clip mode", fix))
    return problems


def check_mask_paths(dataset: DatasetConfig) -> list[Problem]:
    """Masks do not lie among the files that they are for: there each would be a sample too."""
    media = {_absolute(directory.path) for directory in dataset.directory}
    return [
        Problem(
            f"directory[{index}].mask_path",
            f'"{directory.mask_path}" is the path of a [[directory]], so its masks would be samples',
            "put the masks into a folder of their own, under the names of the files that they are for",
        )
        for index, directory in enumerate(dataset.directory)
        if directory.mask_path is not None and _absolute(directory.mask_path) in media
    ]


def _absolute(path: str) -> str:
    """Absolute and without `..`; nothing is looked up."""
    return os.path.normpath(Path(path).absolute())


def _tables(dataset: DatasetConfig) -> Iterator[tuple[Callable[[str], str], DatasetConfig | DirectoryConfig]]:
    """The top level and each directory, with what turns a key's name into its dotted key."""
    yield str, dataset
    for index, directory in enumerate(dataset.directory):
        yield f"directory[{index}].{{}}".format, directory


def _effective(table: DatasetConfig | DirectoryConfig, dataset: DatasetConfig, name: str) -> Any:
    """A key of a directory, or the top level's where the directory leaves it out."""
    own = getattr(table, name)
    return getattr(dataset, name) if own is None else own


def _everywhere(*names: str) -> tuple[str, ...]:
    """Keys that stand at the top level and in each directory."""
    return names + tuple(f"directory[].{name}" for name in names)


def _empty(key: str) -> Problem:
    return Problem(key, "is empty", "give at least one value, or take the key out")


DATASET_RULES = (
    Rule(check_directories, ("directory",)),
    Rule(check_aspect_ratios, _everywhere("min_ar", "max_ar")),
    Rule(check_lists, _everywhere(*_OVERRIDABLE_LISTS)),
    Rule(check_size_buckets, _everywhere("size_buckets")),
    Rule(check_frame_counts, _everywhere("frame_buckets", "size_buckets")),
    Rule(check_clip_modes, _everywhere("video_clip_mode")),
    Rule(check_mask_paths, ("directory[].mask_path", "directory[].path")),
)
