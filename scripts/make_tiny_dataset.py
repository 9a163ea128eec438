"""Write a small dataset of real media: moving coloured shapes as PNG images and MP4 videos, with captions.

Several aspect ratios, lengths and frame rates, small enough for training on a laptop's CPU. Beside each file lies a
`.txt` with a caption that describes it, except beside one image. The result is the same for the same seed.

    python scripts/make_tiny_dataset.py --out data/shapes
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import av
from av.video.stream import VideoStream
from PIL import Image, ImageDraw

from utils.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from utils.files import atomic_directory

# Drawn larger and reduced, which smooths the edges.
OVERSAMPLING = 4
COLOURS = {
    "red": (215, 45, 40),
    "green": (50, 165, 70),
    "blue": (45, 90, 215),
    "yellow": (235, 205, 50),
    "orange": (240, 140, 40),
    "purple": (140, 65, 170),
    "cyan": (60, 190, 205),
    "pink": (240, 130, 170),
}
FORMS = ("circle", "square", "triangle")
GROUNDS = {"dark": (28, 30, 36), "light": (226, 224, 216)}
# Where the centre starts and ends, as fractions of width and height.
MOTIONS = {
    "moves to the right": ((0.2, 0.5), (0.8, 0.5)),
    "moves to the left": ((0.8, 0.5), (0.2, 0.5)),
    "moves up": ((0.5, 0.75), (0.5, 0.25)),
    "moves down": ((0.5, 0.25), (0.5, 0.75)),
    "moves along a diagonal": ((0.25, 0.25), (0.75, 0.75)),
    "stands still": ((0.5, 0.5), (0.5, 0.5)),
}
IMAGE_SIZES = ((128, 128), (128, 96), (96, 128), (128, 72), (64, 112), (96, 96))


@dataclass(frozen=True)
class Clip:
    """Size in px, frames per second and length in frames of one video."""

    width: int
    height: int
    fps: int
    num_frames: int


CLIPS = (
    Clip(128, 96, 24, 33),
    Clip(96, 128, 16, 25),
    Clip(128, 128, 30, 40),
    Clip(128, 72, 24, 17),
    Clip(96, 96, 16, 9),
    Clip(64, 112, 30, 21),
)


@dataclass(frozen=True)
class Scene:
    """One shape, and how it moves."""

    colour: str
    form: str
    ground: str
    motion: str

    def caption(self, is_video: bool) -> str:
        """The caption; of a picture nobody can say how it moves."""
        article = "an" if self.colour[0] in "aeiou" else "a"
        motion = f" {self.motion}" if is_video else ""
        return f"{article} {self.colour} {self.form}{motion} on a {self.ground} background"


def draw(scene: Scene, width: int, height: int, progress: float) -> Image.Image:
    """One frame, RGB, at `progress` in [0, 1] of the motion."""
    picture = Image.new("RGB", (width * OVERSAMPLING, height * OVERSAMPLING), GROUNDS[scene.ground])
    start, end = MOTIONS[scene.motion]
    x, y = (
        (a + (b - a) * progress) * size
        for a, b, size in zip(start, end, (picture.width, picture.height), strict=True)
    )
    radius = 0.18 * min(picture.size)
    canvas, fill = ImageDraw.Draw(picture), COLOURS[scene.colour]
    if scene.form == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif scene.form == "square":
        canvas.rectangle((x - radius, y - radius, x + radius, y + radius), fill=fill)
    else:
        canvas.polygon(((x, y - radius), (x - radius, y + radius), (x + radius, y + radius)), fill=fill)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def scenes(seed: int, count: int) -> Iterator[Scene]:
    """Different scenes: every colour, form and motion comes up before one is used again."""
    generator = random.Random(seed)
    colours, forms, motions = (
        generator.sample(list(values), len(values)) for values in (COLOURS, FORMS, MOTIONS)
    )
    for index in range(count):
        yield Scene(
            colour=colours[index % len(colours)],
            form=forms[index % len(forms)],
            ground=list(GROUNDS)[(index // 2) % len(GROUNDS)],
            motion=motions[index % len(motions)],
        )


def write_video(path: Path, scene: Scene, clip: Clip) -> None:
    """Encode one clip as MP4: H.264 where PyAV has it, else MPEG-4; one thread, so that reruns give the same bytes."""
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = cast(VideoStream, container.add_stream(codec, rate=clip.fps))
        stream.width, stream.height, stream.pix_fmt = clip.width, clip.height, "yuv420p"
        stream.options = {"crf": "14"} if codec == "libx264" else {"qscale": "2"}
        stream.codec_context.thread_count = 1
        for index in range(clip.num_frames):
            picture = draw(scene, clip.width, clip.height, index / (clip.num_frames - 1))
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def make_dataset(out: Path, seed: int) -> None:
    """Write the whole dataset, or nothing.

    Raises:
        UserError: `out` exists and is not an empty directory, or cannot be written.
    """
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    everything = list(scenes(seed, len(IMAGE_SIZES) + len(CLIPS)))
    pictures, films = everything[: len(IMAGE_SIZES)], everything[len(IMAGE_SIZES) :]
    with atomic_directory(out) as directory:
        for index, (scene, (width, height)) in enumerate(zip(pictures, IMAGE_SIZES, strict=True)):
            draw(scene, width, height, progress=0.5).save(directory / f"image_{index:02d}.png")
            if index < len(IMAGE_SIZES) - 1:  # the last one shows what becomes of a file without a caption
                write_caption(directory / f"image_{index:02d}.txt", scene.caption(is_video=False))
        for index, (scene, clip) in enumerate(zip(films, CLIPS, strict=True)):
            write_video(directory / f"video_{index:02d}.mp4", scene, clip)
            write_caption(directory / f"video_{index:02d}.txt", scene.caption(is_video=True))


def write_caption(path: Path, caption: str) -> None:
    """Write one caption, UTF-8, ended by a newline."""
    path.write_text(caption + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the dataset and say what was written."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n    ")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="directory to make; must not exist, or be empty"
    )
    parser.add_argument("--seed", type=int, default=0, help="which shapes, colours and motions (default: 0)")
    arguments = parser.parse_args(argv)
    try:
        make_dataset(arguments.out, arguments.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    captions = sorted(arguments.out.glob("*.txt"))
    print(
        f"{arguments.out}: {len(IMAGE_SIZES)} images, {len(CLIPS)} videos, {len(captions)} captions, seed {arguments.seed}"
    )
    for path in captions:
        print(f"  {path.stem}: {path.read_text(encoding='utf-8').strip()}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
