"""Buckets: the few sizes and lengths that clips are brought to, so that micro-batches are homogeneous."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.errors import UserError

# A rounded size is a little off its nominal aspect ratio. Shapes whose distance (in log) differs by less than this
# are taken as equally near, so that the area decides between resolutions and not the rounding.
_ASPECT_TOLERANCE = 0.1
# Buckets of one resolution differ in area only by rounding; the next resolution starts after a gap of this size (in log).
_AREA_GAP = 0.2
_RANGE_KEYS = ("min_ar", "max_ar", "num_ar_buckets")


@dataclass(frozen=True)
class MediaRules:
    """What a model variant asks of its media.

    Attributes:
        fps: frames per second the model was made for.
        pixel_multiple: width and height are multiples of this many pixels.
        frame_quantum: clips have `frame_quantum * n + 1` frames.
        latent_stride: a latent position stands for this many pixels in each direction.
    """

    fps: float
    pixel_multiple: int
    frame_quantum: int = 4
    latent_stride: int = 8


@dataclass(frozen=True, order=True)
class Bucket:
    """Size in pixels and length in frames of every clip in a micro-batch. One frame is an image."""

    width: int
    height: int
    num_frames: int

    @property
    def aspect_ratio(self) -> float:
        """Width / height."""
        return self.width / self.height

    @property
    def area(self) -> int:
        """Pixels of one frame."""
        return self.width * self.height

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.num_frames}"


def build_buckets(
    dataset: DatasetConfig, directory: DirectoryConfig, rules: MediaRules
) -> tuple[Bucket, ...]:
    """All buckets of one directory, sorted: resolutions x aspect ratios x frame counts, or the explicit `size_buckets`.

    Sides are rounded to `rules.pixel_multiple`; areas stay near `resolution ** 2`.

    Raises:
        UserError: one or more keys are illegal; the message lists all of them.
    """
    problems: list[str] = []
    size_buckets = _effective_size_buckets(dataset, directory, problems)
    if size_buckets is not None:
        buckets = {_explicit_bucket(triple, rules, problems) for triple in size_buckets}
    else:
        buckets = _regular_buckets(dataset, directory, rules, problems)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(
            f"dataset, [[directory]] {directory.path}: no buckets can be made of these keys:\n{lines}"
        )
    return tuple(sorted(buckets))


@lru_cache(maxsize=4096)  # a folder of many files has few sizes
def assign_bucket(
    width: int, height: int, num_frames_available: int, buckets: tuple[Bucket, ...]
) -> Bucket | None:
    """The bucket for a medium of `width` x `height` px, or None if there is none.

    One available frame is an image and goes to one-frame buckets only; more is a video and goes to longer ones only,
    never to one that is longer than the video. Among those: the nearest aspect ratio (in log; equal within what
    rounding makes of it), then the longest, then the area nearest the medium's.

    Args:
        width: of the medium as displayed, px.
        height: of the medium as displayed, px.
        num_frames_available: frames at the model's frame rate (see `media.frames_available`); 1 for an image.
        buckets: what `build_buckets` gave.
    """
    if num_frames_available == 1:
        fitting = [bucket for bucket in buckets if bucket.num_frames == 1]
    else:
        fitting = [bucket for bucket in buckets if 1 < bucket.num_frames <= num_frames_available]
    if not fitting:
        return None

    def aspect_distance(bucket: Bucket) -> float:
        return abs(math.log(bucket.aspect_ratio * height / width))

    def area_distance(bucket: Bucket) -> float:
        return abs(math.log(bucket.area / (width * height)))

    nearest = [min(group, key=lambda b: (aspect_distance(b), b)) for group in _resolution_groups(fitting)]
    limit = min(map(aspect_distance, nearest)) + _ASPECT_TOLERANCE
    candidates = [bucket for bucket in nearest if aspect_distance(bucket) <= limit]
    return min(candidates, key=lambda b: (-b.num_frames, area_distance(b), aspect_distance(b), b))


def _resolution_groups(buckets: Iterable[Bucket]) -> list[list[Bucket]]:
    """Buckets of equal length and about equal area."""
    groups: list[list[Bucket]] = []
    for bucket in sorted(buckets, key=lambda b: (b.num_frames, b.area, b)):
        previous = groups[-1][-1] if groups else None
        if (
            previous is not None
            and previous.num_frames == bucket.num_frames
            and math.log(bucket.area / previous.area) <= _AREA_GAP
        ):
            groups[-1].append(bucket)
        else:
            groups.append([bucket])
    return groups


def _effective_size_buckets(
    dataset: DatasetConfig, directory: DirectoryConfig, problems: list[str]
) -> tuple[tuple[int, ...], ...] | None:
    """The directory's own `size_buckets`, else the top level's; a directory key they would silence is a problem."""
    size_buckets = directory.size_buckets if directory.size_buckets is not None else dataset.size_buckets
    if size_buckets is None:
        return None
    owner = "its own" if directory.size_buckets is not None else "the top level's"
    for key in ("resolutions", "frame_buckets", "enable_ar_bucket", *_RANGE_KEYS, "ar_buckets"):
        if getattr(directory, key) is not None:
            problems.append(
                f"{key}: {owner} size_buckets decide instead, so it would do nothing -> remove one of them"
            )
    if not size_buckets:
        problems.append("size_buckets: is empty -> give [width, height, frames] triples, or remove it")
    return size_buckets


def _explicit_bucket(triple: Sequence[int], rules: MediaRules, problems: list[str]) -> Bucket:
    if len(triple) != 3:
        problems.append(f"size_buckets: {list(triple)} is not [width, height, frames]")
        return Bucket(0, 0, 0)
    for name, side in zip(("width", "height"), triple[:2], strict=True):
        legal = _round_to_multiple(side, rules.pixel_multiple)
        if side != legal:
            problems.append(
                f"size_buckets: {name} {side} of {list(triple)} is not a positive multiple of "
                f"{rules.pixel_multiple} -> {legal}"
            )
    _check_num_frames("size_buckets", triple[2], rules, problems)
    return Bucket(*triple)


def _regular_buckets(
    dataset: DatasetConfig, directory: DirectoryConfig, rules: MediaRules, problems: list[str]
) -> set[Bucket]:
    resolutions = dataset.resolutions if directory.resolutions is None else directory.resolutions
    frame_buckets = dataset.frame_buckets if directory.frame_buckets is None else directory.frame_buckets
    for key, values in (("resolutions", resolutions), ("frame_buckets", frame_buckets)):
        if not values:
            problems.append(f"{key}: is empty -> give at least one")
    for resolution in resolutions:
        if resolution < rules.pixel_multiple:
            problems.append(
                f"resolutions: {resolution} is below {rules.pixel_multiple} px, the unit of a side for this model"
            )
    for num_frames in frame_buckets:
        _check_num_frames("frame_buckets", num_frames, rules, problems)
    aspect_ratios = _aspect_ratios(dataset, directory, problems)
    if problems:
        return set()
    return {
        Bucket(*_rounded_size(resolution, aspect_ratio, rules.pixel_multiple), num_frames)
        for resolution, aspect_ratio, num_frames in product(resolutions, aspect_ratios, frame_buckets)
    }


def _aspect_ratios(
    dataset: DatasetConfig, directory: DirectoryConfig, problems: list[str]
) -> tuple[float, ...]:
    """Width / height of each bucket shape: evenly spaced in log, so that 1:2 is as far from square as 2:1."""
    own = [key for key in (*_RANGE_KEYS, "ar_buckets") if getattr(directory, key) is not None]

    def effective(key: str) -> Any:
        value = getattr(directory, key)
        return getattr(dataset, key) if value is None else value

    if not effective("enable_ar_bucket"):
        problems.extend(
            f"{key}: enable_ar_bucket is false, so it would do nothing -> remove it" for key in own
        )
        return (1.0,)
    ratios = effective("ar_buckets") if directory.ar_buckets is not None or not own else None
    if ratios is not None:
        ignored = [key for key in own if key != "ar_buckets"]
        problems.extend(f"{key}: its own ar_buckets decide instead -> remove one of them" for key in ignored)
        if not ratios or min(ratios) <= 0:
            problems.append(f"ar_buckets: {list(ratios)} -> give positive width / height ratios")
        return tuple(ratios)
    min_ar, max_ar, count = (effective(key) for key in _RANGE_KEYS)
    if not 0 < min_ar <= max_ar:
        problems.append(f"min_ar: {min_ar} is not between 0 and max_ar = {max_ar}")
        return ()
    low, high = math.log(min_ar), math.log(max_ar)
    if count == 1:
        return (math.exp((low + high) / 2),)
    step = (high - low) / (count - 1)
    return tuple(math.exp(low + index * step) for index in range(count))


def _check_num_frames(key: str, num_frames: int, rules: MediaRules, problems: list[str]) -> None:
    quantum = rules.frame_quantum
    if num_frames >= 1 and (num_frames - 1) % quantum == 0:
        return
    lower = max(0, (num_frames - 1) // quantum) * quantum + 1
    problems.append(f"{key}: {num_frames} frames is not {quantum}n+1 -> {lower} or {lower + quantum}")


def _rounded_size(resolution: int, aspect_ratio: float, multiple: int) -> tuple[int, int]:
    root = math.sqrt(aspect_ratio)
    return _round_to_multiple(resolution * root, multiple), _round_to_multiple(resolution / root, multiple)


def _round_to_multiple(side: float, multiple: int) -> int:
    return max(1, math.floor(side / multiple + 0.5)) * multiple
