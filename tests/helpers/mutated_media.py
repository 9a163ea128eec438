"""Small media files, and the same damaged in many ways: cut off, bits turned, zeroed, spliced, under a wrong ending."""

import random
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image

WIDTH, HEIGHT, NUM_FRAMES = 48, 32, 18
IMAGES = (
    "a.png",
    "deep.png",
    "palette.png",
    "b.jpg",
    "c.webp",
    "d.gif",
    "e.bmp",
    "f.tif",
    "g.avif",
    "h.tga",
    "i.ppm",
)
VIDEOS = {
    "a.mp4": "libx264",
    "b.mkv": "libx264",
    "c.webm": "libvpx-vp9",
    "d.avi": "mpeg4",
    "e.ts": "libx264",
    "f.mov": "mpeg4",
    "g.mpg": "mpeg2video",
}
MUTATIONS = ("cut", "bits", "zeros", "noise", "splice", "ending")


def write_whole(folder: Path) -> list[Path]:
    """One good file of each kind, a moving square in each."""
    paths = []
    for name in IMAGES:
        image = Image.fromarray(_frame(0.5))
        if name == "deep.png":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        elif name == "palette.png":
            image = image.quantize(8)
        image.save(folder / name)
        paths.append(folder / name)
    for name, codec in VIDEOS.items():
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=24, options={"threads": "1", "g": "6"})
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for index in range(NUM_FRAMES):
                frame = av.VideoFrame.from_ndarray(_frame(index / NUM_FRAMES), "rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        paths.append(folder / name)
    return paths


def mutate(whole: list[Path], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` damaged files as (name, content): every kind of file and every kind of damage in turn."""
    draws = random.Random(seed)
    contents = [path.read_bytes() for path in whole]
    for number in range(count):
        index = number % len(whole)
        kind = MUTATIONS[(number // len(whole)) % len(MUTATIONS)]
        data = bytearray(contents[index])
        suffix = whole[index].suffix
        start = draws.randrange(len(data))
        length = draws.choice((1, 4, 64, 1024))
        if kind == "cut":
            del data[start:]
        elif kind == "bits":
            # Half of them in the header, where they do the most.
            reach = draws.choice((64, len(data)))
            for _ in range(draws.choice((1, 3, 30))):
                data[draws.randrange(min(reach, len(data)))] ^= 1 << draws.randrange(8)
        elif kind == "zeros":
            data[start : start + length] = bytes(len(data[start : start + length]))
        elif kind == "noise":
            data[start : start + length] = draws.randbytes(len(data[start : start + length]))
        elif kind == "splice":
            other = draws.choice(contents)
            data[start:] = other[draws.randrange(len(other)) :]
        else:
            suffix = draws.choice([path.suffix for path in whole if path.suffix != suffix])
        yield f"{number:05d}_{kind}_{whole[index].stem}{suffix}", bytes(data)


def _frame(progress: float) -> np.ndarray:
    """A bright square on a ground with some texture, so that no file is so small that damage must hit its header."""
    frame = np.random.default_rng(0).integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    left = round(progress * (WIDTH - 12))
    frame[10:22, left : left + 12] = (230, 60, 40)
    return frame
