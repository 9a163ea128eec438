"""Real media and datasets, written on the spot."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.data.buckets import Bucket, MediaRules
from utils.data.manifest import SampleRecord
from utils.data.media import MediaInfo

FrameAt = Callable[[float], np.ndarray]


@pytest.fixture
def rules() -> MediaRules:
    return MediaRules(fps=16.0, pixel_multiple=16)


@pytest.fixture
def make_dataset():
    """A DatasetConfig of one directory with buckets small enough for tests."""

    def make(path: Path, *more: DirectoryConfig, num_repeats: float = 1.0, caption_prefix: str = "", **keys):
        first = DirectoryConfig(path=str(path), num_repeats=num_repeats, caption_prefix=caption_prefix)
        keys = {"resolutions": (64,), "num_ar_buckets": 3, "frame_buckets": (1, 5, 9)} | keys
        return DatasetConfig(directory=(first, *more), **keys)

    return make


@pytest.fixture
def make_record():
    """A SampleRecord whose fields can be set one by one."""

    def make(**fields) -> SampleRecord:
        defaults = {
            "sample_id": 1,
            "path": Path("a.mp4"),
            "kind": "video",
            "captions": ("a red square",),
            "bucket": Bucket(64, 64, 5),
            "num_repeats": 1.0,
            "content_hash": "0" * 32,
            "clip_start_seconds": 0.0,
            "info": MediaInfo("video", 64, 64, 48, 24.0, 2.0),
        }
        return SampleRecord(**(defaults | fields))

    return make


@pytest.fixture
def square():
    """`square(center_x)`: 96 x 64 px, white 16 px square on black at a place between pixels."""

    def draw(center_x: float, width: int = 96, height: int = 64) -> np.ndarray:
        columns = np.arange(width) + 0.5
        coverage = np.clip(columns - (center_x - 8) + 0.5, 0, 1) * np.clip(center_x + 8 - columns + 0.5, 0, 1)
        frame = np.zeros((height, width, 3), np.uint8)
        frame[24:40] = np.round(coverage * 255).astype(np.uint8)[None, :, None]
        return frame

    return draw


@pytest.fixture
def write_video():
    """Encode frames (given by a function of time in seconds) shown at `times` into `path`."""

    def write(
        path: Path,
        frame_at: FrameAt,
        times: Sequence[float] | None = None,
        *,
        fps: Fraction | int = 24,
        num_frames: int = 24,
        codec: str = "libx264",
        rotation: int | None = None,
        pixel_aspect: Fraction | None = None,
        container_options: dict[str, str] | None = None,
        options: dict[str, str] | None = None,
    ) -> Path:
        times = [float(index / Fraction(fps)) for index in range(num_frames)] if times is None else times
        is_variable = len(set(np.round(np.diff(times), 6))) > 1
        first = frame_at(times[0])
        with av.open(str(path), "w", options=container_options or {}) as container:
            stream = container.add_stream(
                codec, rate=Fraction(fps), options={"threads": "1"} | (options or {})
            )
            stream.height, stream.width = first.shape[:2]
            stream.pix_fmt = "yuv420p"
            if rotation is not None:
                stream.set_display_rotation(rotation)
            if pixel_aspect is not None:
                stream.codec_context.sample_aspect_ratio = pixel_aspect
            clock = Fraction(1, 12800) if is_variable else 1 / Fraction(fps)
            stream.codec_context.time_base = clock
            for index, time in enumerate(times):
                frame = av.VideoFrame.from_ndarray(frame_at(time), "rgb24")
                frame.pts = round(time / clock) if is_variable else index
                frame.time_base = clock
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write


@pytest.fixture
def solid():
    """A frame function: one colour, always."""

    def make(color: tuple[int, int, int] = (200, 30, 60), width: int = 96, height: int = 64) -> FrameAt:
        return lambda _time: np.full((height, width, 3), color, np.uint8)

    return make


@pytest.fixture
def write_sample(write_video, solid):
    """A small captioned image or video, by the ending of its name."""

    def write(
        path: Path, caption: str | None = "a shape", size: tuple[int, int] = (96, 64), num_frames: int = 24
    ) -> Path:
        if path.suffix == ".mp4":
            write_video(path, solid(width=size[0], height=size[1]), num_frames=num_frames)
        else:
            Image.new("RGB", size, "teal").save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    return write
