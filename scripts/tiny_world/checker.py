"""Reads colour, shape and motion off pixels, by measuring; no model is learned.

The shape is what stands out from a grey ground by its saturation. How much of each pixel it covers is estimated from
the mix of the two colours; it is where more than half is covered, on a finer grid, so that a blurred edge counts as the
edge in its middle. The shape is then that one of the world's shapes which, drawn with the same area round the same
centre, covers the same. Something between two shapes fits none of them well enough and is called nothing:
a checker that let squarish circles pass would praise a painter that cannot tell circles from squares.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from scripts.tiny_world.world import COLOURS, SHAPES, Pixels, coverage

# max(RGB) - min(RGB) of a pixel: the world's colours have at least 120, its grounds 0.
_SATURATED = 48
# Of the picture: the smallest thing that is a shape, and the largest. The world's have 0.05 to 0.3.
_AREA = (0.02, 0.6)
# Of the pixels that stand out, so many belong to one piece.
_IN_ONE_PIECE = 0.9
# Mean colour to the nearest of the palette, Euclidean in RGB. The nearest two of the palette are 130 apart.
_COLOUR_DISTANCE = 55.0
# The grid on which edges are found, to a pixel.
_FINER = 4
# Overlap (intersection over union of coverages) with the shape that it is called, and how much more than with the next.
_OVERLAP = 0.915
_OVERLAP_AHEAD = 0.06
# Of the side, between the first and the last frame: more is motion, less is rest. The world's clips move 0.18 to 0.26.
_MOVED = 0.08
# How much further along one axis than along the other.
_STRAIGHT = 2.0


@dataclass(frozen=True)
class Reading:
    """What one picture shows; None where nothing can be said. `x`, `y`: centre of mass, fractions of the side.

    `nearest` is the shape that fits best, however badly; `overlap` says how well.
    """

    colour: str | None
    shape: str | None
    nearest: str | None = None
    x: float | None = None
    y: float | None = None
    overlap: float = 0.0


@dataclass(frozen=True)
class ClipReading:
    """What a clip shows: what most frames agree on, and where it goes."""

    colour: str | None
    shape: str | None
    motion: str | None


NOTHING = Reading(None, None)


def read_picture(pixels_HWC: Pixels) -> Reading:
    """Colour and shape of the one thing in a square picture, uint8 [size, size, 3]."""
    image = pixels_HWC.astype(np.float32)
    size = image.shape[0]
    stands_out = image.max(axis=2) - image.min(axis=2) > _SATURATED
    pieces, count = ndimage.label(stands_out)
    if not count:
        return NOTHING
    areas = np.bincount(pieces.ravel())[1:]
    piece = pieces == 1 + int(areas.argmax())
    share = areas.max() / size**2
    if not _AREA[0] < share < _AREA[1] or areas.max() < _IN_ONE_PIECE * areas.sum():
        return NOTHING
    inside = ndimage.binary_erosion(piece)
    colour_C = np.median(image[inside if inside.sum() >= 4 else piece], axis=0)
    alpha_HW = _coverage_of(image, piece, colour_C)
    fine_HW = (ndimage.zoom(alpha_HW, _FINER, order=1, mode="nearest", grid_mode=True) > 0.5).astype(
        np.float32
    )
    area = float(fine_HW.sum())
    if not area:
        return NOTHING
    fine = size * _FINER
    places = np.arange(fine, dtype=np.float32) + 0.5
    x, y = (float((fine_HW.sum(axis=axis) * places).sum() / area) for axis in (0, 1))
    shape, nearest, overlap = _nearest_shape(fine_HW, area, x, y)
    return Reading(nearest_colour(colour_C), shape, nearest, x / fine, y / fine, overlap)


def read_clip(pixels_FHWC: Pixels) -> ClipReading:
    """Colour, shape and motion of a clip, uint8 [frames, size, size, 3].

    Colour and shape are those of more than half of the frames; the motion needs something to follow in every frame.
    """
    frames = [read_picture(pixels_HWC) for pixels_HWC in pixels_FHWC]
    colour = _most([frame.colour for frame in frames])
    return ClipReading(colour, _most([frame.shape for frame in frames]), _motion(frames))


def nearest_colour(rgb: Sequence[float] | NDArray[np.float32]) -> str | None:
    """The name of the palette's nearest colour, or None where none is near."""
    distances = {name: float(np.linalg.norm(np.subtract(rgb, known))) for name, known in COLOURS.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= _COLOUR_DISTANCE else None


def overlaps(alpha_HW: NDArray[np.float32], area: float, x: float, y: float) -> dict[str, float]:
    """Intersection over union of a coverage with each shape of the same area (px) round the same centre of mass (px)."""
    size = alpha_HW.shape[0]
    # Areas in radii squared; the centre of mass of a triangle lies a third of its height above the base.
    drawn = {
        "circle": coverage("circle", x, y, (area / np.pi) ** 0.5, size),
        "square": coverage("square", x, y, area**0.5 / 2, size),
        "triangle": coverage("triangle", x, y - (area / 2) ** 0.5 / 3, (area / 2) ** 0.5, size),
    }
    return {
        shape: float(np.minimum(alpha_HW, ideal).sum() / np.maximum(alpha_HW, ideal).sum())
        for shape, ideal in drawn.items()
    }


def _coverage_of(
    image: NDArray[np.float32], piece: NDArray[np.bool_], colour_C: NDArray[np.float32]
) -> NDArray[np.float32]:
    """How much of each pixel is of the piece's colour rather than of the ground's, near the piece."""
    near = ndimage.binary_dilation(piece, iterations=2)
    ground_C = np.median(image[~near], axis=0) if (~near).any() else np.zeros(3, np.float32)
    way_C = colour_C - ground_C
    alpha = ((image - ground_C) @ way_C) / max(float(way_C @ way_C), 1.0)
    return np.where(near, np.clip(alpha, 0, 1), 0).astype(np.float32)


def _nearest_shape(
    alpha_HW: NDArray[np.float32], area: float, x: float, y: float
) -> tuple[str | None, str, float]:
    found = overlaps(alpha_HW, area, x, y)
    first, second = sorted(SHAPES, key=found.__getitem__, reverse=True)[:2]
    sure = found[first] >= _OVERLAP and found[first] - found[second] >= _OVERLAP_AHEAD
    return (first if sure else None), first, found[first]


def _most(values: Sequence[str | None]) -> str | None:
    value, count = Counter(values).most_common(1)[0]
    return value if count > len(values) / 2 else None


def _motion(frames: Sequence[Reading]) -> str | None:
    places = [(frame.x, frame.y) for frame in frames if frame.x is not None and frame.y is not None]
    if len(places) < len(frames):
        return None
    (x0, y0), (x1, y1) = places[0], places[-1]
    right, down = x1 - x0, y1 - y0
    if max(abs(right), abs(down)) < _MOVED:
        return "still"
    if abs(right) >= _STRAIGHT * abs(down):
        return "right" if right > 0 else "left"
    if abs(down) >= _STRAIGHT * abs(right):
        return "down" if down > 0 else "up"
    return None
