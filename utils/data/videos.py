"""Videos: what is in a file, the frames of it that are shown at given times, and writing one. The only module with PyAV.

Everything streams: at no time are more than two decoded frames held, however long the video.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import av
import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.files import atomic_path

VIDEO_SUFFIXES = frozenset(
    {".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf"}
    | {".ogv", ".ts", ".vob", ".webm", ".wmv"}
)

# What PyAV and ffmpeg's readers raise on damaged bytes.
_DECODE_ERRORS = (av.error.FFmpegError, OSError, ValueError, EOFError, ArithmeticError)
# Where ffmpeg's own words lead astray: they are those of the operating system, and mean the content of the file.
_PLAIN_WORDS = (
    (av.error.EOFError, "it ends where more should come"),
    (av.error.BlockingIOError, "its packets give no whole frame"),
)
# A file whose header promises this much more than the frames that are there was cut off.
_TRUNCATION_SLACK_SECONDS = 0.5
_TRUNCATION_SLACK_RATIO = 0.05
# Containers round times to their clock's tick; where a tick is a whole frame (24 ticks a second), nothing is rounded.
_LARGEST_TIE_RATIO = 0.1
# How far before the first wanted frame decoding starts; nearer beginnings are decoded without a seek.
_SEEK_MARGIN_SECONDS = 2.0

FrameT = TypeVar("FrameT")


class VideoFacts(NamedTuple):
    """What `probe_video` finds: display size in px, frames in the file, length, and the file's time of the first frame."""

    width: int
    height: int
    num_frames: int
    seconds: float
    start_seconds: float


class Picture(NamedTuple):
    """One upright RGB frame and the width / height of its pixels."""

    image: Image.Image
    pixel_aspect: float


class _Orientation(NamedTuple):
    """How stored pixels become upright ones: swap the axes, then mirror."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False


_TURNED = {
    90: _Orientation(transpose=True, flip_y=True),
    180: _Orientation(flip_x=True, flip_y=True),
    270: _Orientation(transpose=True, flip_x=True),
}


def probe_video(path: Path) -> VideoFacts:
    """What is in a video. The first frame is decoded; of the others only packet headers are read.

    Raises:
        UserError: no video in it, damaged, cut off, or more pixels than Pillow's `MAX_IMAGE_PIXELS`.
    """
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        with _open(path) as container:
            stream = _video_stream(container)
            frame = next(container.decode(stream), None)
            if frame is None or frame.is_corrupt:
                raise ValueError("its first frame cannot be decoded")
            width, height = _display_size(frame, stream)
        # A fresh container: decoding has consumed packets of this one.
        with _open(path) as container:
            num_frames, start_seconds, seconds = _read_timeline(container, _video_stream(container))
    except _DECODE_ERRORS as error:
        raise UserError(f"{path}: not readable as a video ({_reason(error)})") from error
    return VideoFacts(width, height, num_frames, seconds, start_seconds)


def pictures_at(path: Path, times: Sequence[float], start_seconds: float) -> Iterator[tuple[Picture, int]]:
    """The source frames nearest to `times`, in order, decoding no further than the last that is needed.

    Args:
        path: the video.
        times: ascending, in seconds from the first frame.
        start_seconds: what `probe_video` says of the file.

    Yields:
        Each frame that is needed, once, with the number of consecutive `times` it stands for.

    Raises:
        UserError: a frame that is needed cannot be decoded.
    """
    try:
        with _open(path) as container:
            stream = _video_stream(container)
            frames = _timed_frames(container, stream, start_seconds, first_wanted=times[0])
            tie_seconds = min(float(stream.time_base), _LARGEST_TIE_RATIO * _frame_seconds(stream))
            for frame, count in nearest_frames(frames, times, tie_seconds):
                yield _to_picture(frame, stream), count
    except _DECODE_ERRORS as error:
        raise UserError(
            f"{path}: cannot be decoded as far as the clip reaches ({_reason(error)}), though its beginning "
            "is whole; mend the file or take it out of the dataset"
        ) from error


def nearest_frames(
    frames: Iterable[tuple[float, float, FrameT]], times: Sequence[float], tie_seconds: float
) -> Iterator[tuple[FrameT, int]]:
    """Match ascending `times` to the nearest of a stream of (time, duration, frame), holding two frames at most.

    Args:
        frames: with strictly ascending times.
        times: ascending.
        tie_seconds: the earlier frame is taken unless the later one is nearer by more than this: containers round
            their times, and a tie must not be decided by rounding, now this way and now that.

    Yields:
        Each frame that is nearest to at least one of `times`, with the number of them.

    Raises:
        ValueError: the last frame's end comes before the last of `times`, or frame times do not ascend.
    """
    index = 0
    held: tuple[float, float, FrameT] | None = None
    for time, duration, frame in frames:
        if held is not None:
            held_time = held[0]  # the frame itself is not named, or it would be held through the next turn
            if time <= held_time:
                raise ValueError(f"time stamps go back from {held_time:.3f} s to {time:.3f} s")
            count = 0
            while index + count < len(times) and (
                abs(times[index + count] - held_time) <= abs(time - times[index + count]) + tie_seconds
            ):
                count += 1
            if count:
                yield held[2], count
                index += count
            if index == len(times):
                return
        if time >= times[-1]:
            # No later frame can be nearer: stop here instead of decoding one more to see.
            yield frame, len(times) - index
            return
        held = time, duration, frame
    if held is None or held[0] + held[1] < times[-1]:
        raise ValueError(f"its frames end before {times[-1]:.3f} s")
    yield held[2], len(times) - index


def write_video(path: Path, frames_FHWC: np.ndarray, fps: int) -> None:
    """Write uint8 RGB frames as an .mp4 (H.264, or MPEG-4 part 2 where ffmpeg has no encoder for it), whole or not at all.

    Args:
        path: the file.
        frames_FHWC: height and width are even.
        fps: frames a second.
    """
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    _, height, width, _ = frames_FHWC.shape
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "14"} if codec == "libx264" else {"qscale": "2"}
        for frame_HWC in frames_FHWC:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _open(path: Path) -> Any:
    # Only local files, whatever a playlist in disguise may ask for. Titles and the like may be in any encoding.
    return av.open(str(path), options={"protocol_whitelist": "file"}, metadata_errors="replace")


def _video_stream(container: Any) -> Any:
    """The file's main video stream; cover art is not one."""
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise ValueError("there is no video in it, or its index is cut off")
    stream = container.streams.best("video")
    stream = stream if stream in streams else streams[0]
    if stream.codec_context is None:
        raise ValueError("its codec is not known")
    width, height = stream.codec_context.width, stream.codec_context.height
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"frames of {width}x{height} px are more than {Image.MAX_IMAGE_PIXELS} pixels")
    stream.thread_type = "AUTO"
    return stream


def _has_timestamps(container: Any) -> bool:
    """AVI stores no presentation times, and what ffmpeg makes up for B-frames is out of order; its rate is constant."""
    return "avi" not in container.format.name.split(",")


def _frame_seconds(stream: Any) -> float:
    """Average time from one frame to the next."""
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise ValueError("its frame rate is not known")
    return float(1 / rate)


def _read_timeline(container: Any, stream: Any) -> tuple[int, float, float]:
    """Number of frames, the file's time of the first one, and seconds from there to the end of the last one."""
    count, first, last, last_duration, is_damaged = 0, None, None, 0, False
    for packet in container.demux(stream):
        if packet.size == 0 or packet.is_discard:
            continue  # the flush at the end; frames outside the edit list, which decoding drops too
        count += 1
        is_damaged = is_damaged or packet.is_corrupt
        if packet.pts is not None:
            first = packet.pts if first is None else min(first, packet.pts)
            if last is None or packet.pts > last:
                last, last_duration = packet.pts, packet.duration or 0
    if count == 0:
        raise ValueError("it holds no frames")
    frame_seconds = _frame_seconds(stream)
    start, seconds = 0.0, count * frame_seconds
    if _has_timestamps(container):
        if first is None or last is None:
            raise ValueError("it holds no time stamps; remux it into .mp4 or .mkv")
        tick = float(stream.time_base)
        start = first * tick
        seconds = (last - first) * tick + (last_duration * tick or frame_seconds)
    promised = _promised_seconds(container, stream)
    slack = max(_TRUNCATION_SLACK_SECONDS, _TRUNCATION_SLACK_RATIO * promised)
    if is_damaged or start + seconds + slack < promised:
        raise ValueError(f"it is damaged or cut off: {seconds:.2f} s of {promised:.2f} s are there")
    return count, start, seconds


def _promised_seconds(container: Any, stream: Any) -> float:
    """The length that the header states for the video, 0 if it states none."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None and len(container.streams) == 1:
        return float(container.duration / av.time_base)
    return 0.0


def _timed_frames(
    container: Any, stream: Any, start_seconds: float, first_wanted: float
) -> Iterator[tuple[float, float, Any]]:
    """Decoded frames as (seconds from the video's first frame, duration in seconds, frame)."""
    frame_seconds = _frame_seconds(stream)
    if not _has_timestamps(container):
        for index, frame in enumerate(container.decode(stream)):
            yield index * frame_seconds, frame_seconds, frame
        return
    for frame in _frames_from(
        container, stream, start_seconds + first_wanted, margin=_SEEK_MARGIN_SECONDS + frame_seconds
    ):
        if frame.pts is None:
            raise ValueError("a frame has no time stamp")
        tick = float(stream.time_base)
        yield frame.pts * tick - start_seconds, (frame.duration or 0) * tick or frame_seconds, frame


def _frames_from(container: Any, stream: Any, file_seconds: float, margin: float) -> Iterator[Any]:
    """Decoded frames from a key frame at least `margin` before `file_seconds`, or from the beginning.

    Some containers seek past the place they are asked for; then decoding starts over from the beginning.
    """
    tick = float(stream.time_base)
    target = file_seconds - margin
    first_pts = stream.start_time
    if first_pts is not None and target > first_pts * tick + margin:
        container.seek(int(target / tick), stream=stream, backward=True)
        frames = container.decode(stream)
        frame = next(frames, None)
        if frame is not None and frame.pts is not None and frame.pts * tick <= target + margin / 2:
            yield frame
            yield from frames
            return
        container.seek(first_pts, stream=stream, backward=True)
    yield from container.decode(stream)


def _orientation(frame: Any) -> _Orientation:
    """Read the display matrix: x' = a x + c y, y' = b x + d y in 16.16 fixed point (ISO/IEC 14496-12, 6.2.2)."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV cannot list side data of kinds that it does not know yet (stereo video has some); it still knows the
        # angle, counterclockwise, only not whether the picture is mirrored.
        return _TURNED.get(round(frame.rotation) % 360, _Orientation())
    if matrix is None:
        return _Orientation()
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    if abs(b) > abs(a):
        return _Orientation(transpose=True, flip_x=c < 0, flip_y=b < 0)
    return _Orientation(flip_x=a < 0, flip_y=d < 0)


def _pixel_aspect(frame: Any, stream: Any) -> float:
    """Width / height of an upright pixel."""
    aspect = float(stream.sample_aspect_ratio or 1) or 1.0
    return 1 / aspect if _orientation(frame).transpose else aspect


def _display_size(frame: Any, stream: Any) -> tuple[int, int]:
    width, height = frame.width, frame.height
    if _orientation(frame).transpose:
        width, height = height, width
    return max(1, round(width * _pixel_aspect(frame, stream))), height


def _to_picture(frame: Any, stream: Any) -> Picture:
    if frame.is_corrupt:
        # The decoder has patched over damaged data; what it shows is not what was filmed.
        raise ValueError(f"the frame at {frame.time:.2f} s is damaged")
    orientation = _orientation(frame)
    rgb_HWC = frame.to_ndarray(format="rgb24")
    rgb_HWC = rgb_HWC.swapaxes(0, 1) if orientation.transpose else rgb_HWC
    rgb_HWC = rgb_HWC[:, ::-1] if orientation.flip_x else rgb_HWC
    rgb_HWC = rgb_HWC[::-1] if orientation.flip_y else rgb_HWC
    return Picture(Image.fromarray(np.ascontiguousarray(rgb_HWC)), _pixel_aspect(frame, stream))


def _reason(error: Exception) -> str:
    """ffmpeg's words without the number and the path it adds, which the message has already."""
    for kind, plain in _PLAIN_WORDS:
        if isinstance(error, kind):
            return plain
    words = error.strerror if isinstance(error, av.error.FFmpegError) else str(error)
    return words or type(error).__name__
