"""Which parts of a video become samples: the clip modes and the frames at which their clips begin."""

import re

CLIP_MODES = ("single_beginning", "single_middle", "multiple_overlapping", "uniform:N")
MAX_UNIFORM_CLIPS = 9999

_UNIFORM = re.compile(r"uniform:([1-9][0-9]{0,3})")


def is_clip_mode(mode: str) -> bool:
    """Whether `mode` is one of CLIP_MODES, with a number from 1 to MAX_UNIFORM_CLIPS for N."""
    return mode in CLIP_MODES[:-1] or _UNIFORM.fullmatch(mode) is not None


def clip_starts(mode: str, num_available: int, clip_length: int) -> tuple[int, ...]:
    """First frames of the clips that are taken of a video, ascending and all different.

    - `single_beginning`, `single_middle`: one clip.
    - `multiple_overlapping`: as few clips as cover the whole video, from its first frame to its last, with overlaps
      that differ by one frame at most.
    - `uniform:N`: N clips, the first at the beginning, the last at the end, evenly spaced; N = 1 is the beginning.
      Fewer where the video does not have N places to begin: no clip is taken twice.

    Args:
        mode: see `is_clip_mode`.
        num_available: frames of the video at the model's frame rate.
        clip_length: frames of a clip; at most `num_available`.

    Raises:
        ValueError: not a clip mode, or the video is shorter than a clip.
    """
    if not 1 <= clip_length <= num_available:
        raise ValueError(f"{num_available} frames hold no clip of {clip_length}")
    span = num_available - clip_length
    if mode == "single_beginning":
        return (0,)
    if mode == "single_middle":
        return (span // 2,)
    if mode == "multiple_overlapping":
        return _spread(-(-num_available // clip_length), span)
    match = _UNIFORM.fullmatch(mode)
    if match is None:
        raise ValueError(f"{mode!r} is not one of {', '.join(CLIP_MODES)}")
    return _spread(int(match[1]), span)


def _spread(count: int, span: int) -> tuple[int, ...]:
    """`count` whole numbers from 0 to `span`, evenly spaced and rounded down, each once."""
    if count == 1:
        return (0,)
    return tuple(sorted({index * span // (count - 1) for index in range(count)}))
