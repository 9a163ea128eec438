"""A procedural world: one coloured shape on a grey ground, which may move. Images and clips, drawn with exact edges.

Everything is a function of a `Scene`, and a scene of a random generator, so that a seed says every pixel. Lengths are
fractions of the picture's side; x goes right, y goes down. numpy only.
"""

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE = 48
NUM_FRAMES = 5
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 44, 40),
    "green": (44, 168, 66),
    "blue": (42, 84, 224),
    "yellow": (242, 212, 44),
    "cyan": (52, 202, 218),
    "purple": (168, 56, 196),
}
SHAPES = ("circle", "square", "triangle")
# Direction of one step; "still" stays where it is.
MOTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "still": (0, 0),
}
# Grey levels of the ground.
GROUNDS: dict[str, tuple[int, int]] = {"dark": (20, 70), "light": (180, 230)}
# Half of the height and width of a shape.
RADIUS = (0.17, 0.27)
# How far it goes between two frames.
STEP = (0.045, 0.065)
MARGIN = 0.02
# What the miniature's DiT learns to draw is near the middle and of middling size: outlines are the last thing that is learned,
# and with the whole of `RADIUS` and twice the spread the same training gave a hundredth of them instead of a third.
CENTRED_SPREAD = 0.05
CENTRED_RADIUS = (0.19, 0.25)
COLOUR_JITTER = 6

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Scene:
    """One shape. `x`, `y` is the centre of its box in the middle of the clip, `rgb` its exact colour, `grey` the ground's."""

    colour: str
    shape: str
    motion: str
    ground: str
    rgb: tuple[int, int, int]
    grey: int
    radius: float
    x: float
    y: float
    step: float

    def centre(self, frame: int, num_frames: int) -> tuple[float, float]:
        """Centre of the shape's box in one frame of a clip."""
        dx, dy = MOTIONS[self.motion]
        way = self.step * (frame - (num_frames - 1) / 2)
        return self.x + dx * way, self.y + dy * way


def draw_scene(
    generator: random.Random,
    colour: str | None = None,
    shape: str | None = None,
    motion: str | None = None,
    num_frames: int = NUM_FRAMES,
    spread: float = 0.5,
    radii: tuple[float, float] = RADIUS,
) -> Scene:
    """A random scene; what is given is kept. The shape stays inside the picture in all `num_frames` frames.

    In the middle of a clip its centre is at most `spread` from the picture's, along each axis.
    """
    colour = colour or generator.choice(tuple(COLOURS))
    shape = shape or generator.choice(SHAPES)
    motion = motion or generator.choice(tuple(MOTIONS))
    ground = generator.choice(tuple(GROUNDS))
    radius, step = generator.uniform(*radii), generator.uniform(*STEP)
    reach = step * (num_frames - 1) / 2
    dx, dy = MOTIONS[motion]
    x, y = (
        generator.uniform(max(lowest, 0.5 - spread), min(1 - lowest, 0.5 + spread))
        for lowest in (radius + MARGIN + abs(d) * reach for d in (dx, dy))
    )
    red, green, blue = (value + generator.randint(-COLOUR_JITTER, COLOUR_JITTER) for value in COLOURS[colour])
    grey = generator.randint(*GROUNDS[ground])
    return Scene(colour, shape, motion, ground, (red, green, blue), grey, radius, x, y, step)


def draw_centred(generator: random.Random, colour: str | None = None, shape: str | None = None) -> Scene:
    """A random scene that stands still, as the DiT learns to draw them; what is given is kept."""
    return draw_scene(generator, colour, shape, "still", spread=CENTRED_SPREAD, radii=CENTRED_RADIUS)


def coverage(shape: str, x: float, y: float, radius: float, size: int) -> NDArray[np.float32]:
    """How much of each pixel a shape covers, [size, size] in [0, 1]. `x`, `y`, `radius` in px.

    A circle of this radius; a square with these half sides; an upright triangle in the same box.
    """
    places = np.arange(size, dtype=np.float32) + 0.5
    right, down = places[None, :] - np.float32(x), places[:, None] - np.float32(y)
    if shape == "circle":
        return np.clip(radius - np.hypot(right, down) + 0.5, 0, 1)
    if shape == "square":
        return np.clip(radius - abs(right) + 0.5, 0, 1) * np.clip(radius - abs(down) + 0.5, 0, 1)
    if shape == "triangle":
        # Distances to the base and to the two sides, which fall by 2 for each 1 outward.
        side = (down + radius - 2 * abs(right)) / np.float32(5**0.5)
        return np.clip(side + 0.5, 0, 1) * np.clip(radius - down + 0.5, 0, 1)
    raise ValueError(f"{shape!r} is none of the shapes {SHAPES}")


def render(scene: Scene, frame: int = 0, num_frames: int = 1, size: int = SIZE) -> Pixels:
    """One frame, uint8 [size, size, 3]."""
    x, y = scene.centre(frame, num_frames)
    alpha = coverage(scene.shape, x * size, y * size, scene.radius * size, size)[:, :, None]
    colour = np.array(scene.rgb, dtype=np.float32)
    return np.rint(alpha * colour + (1 - alpha) * np.float32(scene.grey)).astype(np.uint8)


def render_clip(scene: Scene, num_frames: int = NUM_FRAMES, size: int = SIZE) -> Pixels:
    """All frames of a clip, uint8 [num_frames, size, size, 3]."""
    return np.stack([render(scene, frame, num_frames, size) for frame in range(num_frames)])
