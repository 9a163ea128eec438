import subprocess
import sys
import weakref
from fractions import Fraction
from itertools import count
from types import SimpleNamespace

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.workspace import environment
from utils.data import videos
from utils.data.videos import nearest_frames, pictures_at, probe_video, write_video
from utils.errors import UserError


@given(
    gaps=st.lists(st.integers(1, 20), min_size=1, max_size=30),
    start=st.integers(0, 100),
    step=st.integers(1, 15),
)
def test_nearest_frames_agrees_with_a_search_of_all(gaps, start, step):
    shown = np.cumsum([0, *gaps])
    times = list(range(start, int(shown[-1]) + gaps[-1], step))
    if not times:
        return
    frames = [(float(time), 1.0 if i < len(gaps) else float(gaps[-1]), i) for i, time in enumerate(shown)]
    chosen = [frame for frame, num in nearest_frames(frames, times, tie_seconds=0.0) for _ in range(num)]
    assert chosen == [int(np.argmin(np.abs(shown - time))) for time in times]


def test_nearest_frames_stops_at_the_last_one_needed():
    taken = []

    def endless():
        for index in count():
            taken.append(index)
            yield float(index), 1.0, index

    assert list(nearest_frames(endless(), [2.0, 3.2], 0.0)) == [(2, 1), (3, 1)]
    assert taken == [0, 1, 2, 3, 4]
    taken.clear()
    assert list(nearest_frames(endless(), [2.0, 3.0, 3.0], 0.0)) == [(2, 1), (3, 2)]
    assert taken == [0, 1, 2, 3]


def test_ties_go_to_the_earlier_frame_whatever_the_rounding():
    exact = [index / 60 for index in range(60)]
    rounded = [round(time, 3) for time in exact]
    times = [index / 24 for index in range(24)]

    def choose(shown, tie):
        pairs = nearest_frames([(time, 0.017, i) for i, time in enumerate(shown)], times, tie)
        return [frame for frame, num in pairs for _ in range(num)]

    assert choose(rounded, 1e-3) == choose(exact, 1e-9) == [index * 5 // 2 for index in range(24)]


def test_frames_that_end_early_or_go_back_are_errors():
    with pytest.raises(ValueError, match="end before"):
        list(nearest_frames([(0.0, 0.5, "a"), (0.5, 0.5, "b")], [0.0, 1.5], 0.0))
    with pytest.raises(ValueError, match="end before"):
        list(nearest_frames([], [0.0], 0.0))
    with pytest.raises(ValueError, match="go back"):
        list(nearest_frames([(0.0, 1.0, "a"), (1.0, 1.0, "b"), (0.5, 1.0, "c")], [5.0], 0.0))


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("coarse.mp4", "libx264"),  # its clock ticks once a frame
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx-vp9"),
        ("a.ts", "libx264"),  # its first frame is not at 0
        ("a.avi", "libx264"),  # no time stamps, and B-frames
        ("a.avi", "mpeg4"),
    ],
)
def test_every_container_gives_its_frames_in_order_and_its_length(tmp_path, write_video, name, codec):
    path = write_video(
        tmp_path / name,
        lambda time: np.full((48, 64, 3), round(time * 24) * 37 % 251, np.uint8),
        codec=codec,
        num_frames=48,
        container_options={"video_track_timescale": "24"} if name == "coarse.mp4" else None,
    )
    facts = probe_video(path)
    assert (facts.width, facts.height, facts.num_frames) == (64, 48, 48)
    assert facts.seconds == pytest.approx(2.0, abs=0.002)
    times = [index / 24 for index in range(48)]
    pictures = [(np.asarray(p.image).mean(), n) for p, n in pictures_at(path, times, facts.start_seconds)]
    assert [num for _, num in pictures] == [1] * 48
    assert [value for value, _ in pictures] == pytest.approx([index * 37 % 251 for index in range(48)], abs=6)


@pytest.mark.parametrize(
    ("rotation", "size", "red_at"),
    [(90, (48, 64), (5, 58)), (180, (64, 48), (58, 42)), (270, (48, 64), (42, 5))],
)
def test_rotation_is_applied(tmp_path, write_video, rotation, size, red_at):
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:24, :32] = (255, 0, 0)
    path = write_video(tmp_path / "a.mp4", lambda _: frame, rotation=rotation, num_frames=3)
    facts = probe_video(path)
    assert (facts.width, facts.height) == size
    image = next(pictures_at(path, [0.0], facts.start_seconds))[0].image
    assert image.size == size
    assert image.getpixel(red_at)[0] > 200
    assert image.getpixel((size[0] - 1 - red_at[0], size[1] - 1 - red_at[1]))[0] < 50


def test_mirrored_rotation_is_applied():
    """All eight matrices against what they say of the corners."""
    for a, b, c, d in [
        *((1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1)),
        *((0, 1, 1, 0), (0, -1, 1, 0), (0, 1, -1, 0), (0, -1, -1, 0)),
    ]:
        matrix = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 14], np.int32).tobytes()
        orientation = videos._orientation(SimpleNamespace(side_data={"DISPLAYMATRIX": matrix}))
        source = np.arange(6).reshape(2, 3)
        moved = source.T if orientation.transpose else source
        moved = moved[:, ::-1] if orientation.flip_x else moved
        moved = moved[::-1] if orientation.flip_y else moved
        placed = {(a * x + c * y, b * x + d * y): source[y, x] for y in range(2) for x in range(3)}
        left, top = min(x for x, _ in placed), min(y for _, y in placed)
        assert {(x - left, y - top): value for (x, y), value in placed.items()} == {
            (x, y): moved[y, x] for y in range(moved.shape[0]) for x in range(moved.shape[1])
        }


class WithUnknownSideData:
    """A frame of which PyAV cannot list the side data, because there is a kind among them that it does not know."""

    def __init__(self, frame) -> None:
        self.frame = frame

    @property
    def side_data(self):
        raise ValueError("31 is not a valid Type")

    @property
    def rotation(self):
        return self.frame.rotation


@pytest.mark.parametrize("rotation", [None, 90, 180, 270])
def test_rotation_is_known_beside_side_data_that_is_not(tmp_path, write_video, solid, rotation):
    path = write_video(tmp_path / "a.mp4", solid(), rotation=rotation, num_frames=3)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert videos._orientation(WithUnknownSideData(frame)) == videos._orientation(frame)


def test_unknown_side_data_is_no_reason_to_refuse_a_file(tmp_path):
    """A TIFF under a video's name has some; what is wrong with it is that it is one frame long, and that is said."""
    Image.fromarray(noise(0.0)).save(tmp_path / "a.tif")
    (tmp_path / "a.tif").rename(tmp_path / "a.mp4")
    assert probe_video(tmp_path / "a.mp4").num_frames == 1


def test_titles_that_are_no_utf8_are_no_reason_to_refuse_a_file(tmp_path, write_video, solid):
    path = write_video(tmp_path / "a.mkv", solid(), num_frames=3)
    whole = path.read_bytes()
    marked = whole.replace(b"Lavf", b"caf\xe9")
    assert marked != whole
    path.write_bytes(marked)
    with pytest.raises(UnicodeDecodeError):
        av.open(str(path))
    assert probe_video(path).num_frames == 3


def test_pixels_that_are_not_square_count(tmp_path, write_video, solid):
    for rotation, size, aspect in ((None, (128, 48), 2.0), (90, (24, 64), 0.5)):
        path = write_video(
            tmp_path / "a.mp4",
            solid(width=64, height=48),
            pixel_aspect=Fraction(2),
            rotation=rotation,
            num_frames=3,
        )
        facts = probe_video(path)
        assert (facts.width, facts.height) == size
        assert next(pictures_at(path, [0.0], facts.start_seconds))[0].pixel_aspect == aspect


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_a_late_clip_is_sought_and_equals_decoding_from_the_start(tmp_path, write_video, monkeypatch, name):
    path = write_video(
        tmp_path / name,
        lambda time: np.full((48, 64, 3), round(time * 24) * 37 % 251, np.uint8),
        num_frames=240,
        options={"g": "24"},
    )
    start_seconds = probe_video(path).start_seconds
    times = [7.0 + index / 16 for index in range(9)]
    decoded = []
    original = videos.nearest_frames

    def counting(frames, *args, **kwargs):
        def record():
            for item in frames:
                decoded.append(item[0])
                yield item

        return original(record(), *args, **kwargs)

    monkeypatch.setattr(videos, "nearest_frames", counting)
    sought = [(np.asarray(p.image), n) for p, n in pictures_at(path, times, start_seconds)]
    num_decoded_by_seeking = len(decoded)
    monkeypatch.setattr(videos, "_SEEK_MARGIN_SECONDS", 100.0)
    plain = [(np.asarray(p.image), n) for p, n in pictures_at(path, times, start_seconds)]
    assert num_decoded_by_seeking < 120 < len(decoded) - num_decoded_by_seeking < 190
    assert [n for _, n in sought] == [n for _, n in plain]
    assert all(np.array_equal(left, right) for (left, _), (right, _) in zip(sought, plain, strict=True))
    levels = [image.mean() for image, _ in sought]
    assert levels == pytest.approx([round(time * 24 - 1e-6) * 37 % 251 for time in times], abs=2)


@pytest.fixture
def count_decoded(monkeypatch):
    """How many frames ffmpeg has decoded, of whatever was opened since; key frames that only a seek finds included."""
    decoded = []
    original = videos._open

    class Counting:
        def __init__(self, container) -> None:
            self._container = container

        def __enter__(self):
            self._container.__enter__()
            return self

        def __exit__(self, *error):
            return self._container.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self._container, name)

        def decode(self, stream):
            for frame in self._container.decode(stream):
                decoded.append(frame.pts)
                yield frame

    monkeypatch.setattr(videos, "_open", lambda path: Counting(original(path)))
    return decoded


def test_what_is_decoded_does_not_depend_on_how_long_a_video_is(tmp_path, write_video, solid, count_decoded):
    """A clip of half a second costs as many frames in 10 s of video as in 40 s, at its beginning, middle and end."""

    def cost(path, start: float) -> int:
        facts = probe_video(path)
        count_decoded.clear()
        list(pictures_at(path, [start + index / 16 for index in range(9)], facts.start_seconds))
        return len(count_decoded)

    short, long = (
        write_video(
            tmp_path / f"{seconds}.mp4",
            solid(width=32, height=32),
            num_frames=24 * seconds,
            options={"g": "24"},
        )
        for seconds in (10, 40)
    )
    beginning, middle, end = (cost(short, start) for start in (0.0, 5.0, 9.4))
    assert [cost(long, start) for start in (0.0, 5.0, 39.4)] == [beginning, middle, end]
    # Half a second is 12 frames. Before it lie 2 s to be sure of the place, and up to a second to the next key frame.
    assert beginning <= 14 and middle <= 14 + 72 and end <= 14 + 72
    assert cost(long, 20.0) <= 14 + 72
    count_decoded.clear()
    assert probe_video(long).num_frames == 960
    assert len(count_decoded) == 1


def test_no_more_than_two_frames_are_held_beside_what_the_caller_has():
    class Frame:
        pass

    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    def stream():
        nonlocal most
        for index in range(200):
            frame = Frame()
            alive.add(frame)
            most = max(most, len(alive))
            yield index / 24, 1 / 24, frame
            del frame

    for _ in nearest_frames(stream(), [index / 16 for index in range(120)], 0.0):
        pass
    assert most <= 3


@pytest.mark.long
def test_memory_does_not_grow_with_the_length_of_a_video(tmp_path, write_video, solid):
    """Of 2000 frames that are all used, 460 MB as RGB, a few are held at a time."""
    path = write_video(
        tmp_path / "a.mp4", solid(width=320, height=240), num_frames=2000, options={"preset": "ultrafast"}
    )
    code = f"""
import resource
from pathlib import Path
from utils.data.videos import pictures_at, probe_video
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
facts = probe_video(Path({str(path)!r}))
before = peak()
assert sum(1 for _ in pictures_at(Path({str(path)!r}), [i / 24 for i in range(2000)], facts.start_seconds)) == 2000
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 60


@pytest.mark.parametrize("name", ["a.webm", "a.avi"])
def test_odd_sizes_are_kept(tmp_path, write_video, name):
    codec = "libvpx-vp9" if name == "a.webm" else "mpeg4"
    path = write_video(
        tmp_path / name, lambda _: np.full((47, 63, 3), 90, np.uint8), codec=codec, num_frames=6
    )
    facts = probe_video(path)
    assert (facts.width, facts.height) == (63, 47)
    image = next(pictures_at(path, [0.1], facts.start_seconds))[0].image
    assert image.size == (63, 47)
    assert np.abs(np.asarray(image).astype(int) - 90).max() < 6  # to the last row and column


def cut(source, target, share: float):
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def noise(time: float) -> np.ndarray:
    return np.random.default_rng(round(time * 24)).integers(0, 255, (48, 64, 3), dtype=np.uint8)


def test_cut_off_files_are_refused(tmp_path, write_video):
    index_last = write_video(tmp_path / "index_last.mp4", noise, num_frames=60)
    index_first = write_video(
        tmp_path / "index_first.mp4", noise, num_frames=60, container_options={"movflags": "faststart"}
    )
    matroska = write_video(tmp_path / "whole.mkv", noise, num_frames=60)
    for source in (index_last, index_first, matroska):
        probe_video(source)
        path = cut(source, tmp_path / f"cut_{source.name}", 0.6)
        with pytest.raises(UserError, match=r"cut off|Invalid data") as caught:
            probe_video(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "words.mp4").write_text("not a video\n" * 50)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for name, reason in {
        "empty.mp4": "is empty",
        "words.mp4": "Invalid data",
        "sound.mp4": "no video",
    }.items():
        with pytest.raises(UserError, match=reason) as caught:
            probe_video(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")


def test_huge_frames_are_refused(tmp_path, write_video, solid, monkeypatch):
    path = write_video(tmp_path / "a.mp4", solid(), num_frames=3)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 96 * 64 - 1)
    with pytest.raises(UserError, match="96x64 px are more than"):
        probe_video(path)


def test_damage_behind_the_first_frame_is_an_error_and_not_patched_over(tmp_path, write_video):
    path = write_video(tmp_path / "a.mp4", noise, num_frames=60)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = np.random.default_rng(1).bytes(3000)
    path.write_bytes(data)
    facts = probe_video(path)
    with pytest.raises(UserError, match="mend the file") as caught:
        list(pictures_at(path, [index / 24 for index in range(60)], facts.start_seconds))
    assert str(path) in str(caught.value)


def test_a_frame_that_the_decoder_patched_over_is_an_error(tmp_path, write_video):
    path = write_video(tmp_path / "a.mkv", noise, num_frames=60)
    whole = path.read_bytes()
    messages = []
    # A few wrong bytes are not always noticed by the codec; where they are, the frame must not be used.
    for percent in range(20, 80, 5):
        data = bytearray(whole)
        place = len(data) * percent // 100
        data[place : place + 8] = bytes(byte ^ 255 for byte in data[place : place + 8])
        path.write_bytes(data)
        try:
            list(pictures_at(path, [index / 24 for index in range(60)], probe_video(path).start_seconds))
        except UserError as error:
            messages.append(str(error))
    assert any(" s is damaged" in message for message in messages)


def test_a_file_cut_within_its_last_frames_is_refused(tmp_path, write_video):
    whole = write_video(tmp_path / "a.mp4", noise, num_frames=60, container_options={"movflags": "faststart"})
    # Less is missing than the slack on the length; it shows in the frame that is cut through.
    path = cut(whole, tmp_path / "cut.mp4", 0.95)
    with pytest.raises(UserError, match="damaged or cut off"):
        probe_video(path)


def test_a_video_that_is_written_reads_back(tmp_path):
    colours = [(200, 40, 40), (40, 200, 40), (40, 40, 200)]
    frames = np.stack([np.full((32, 48, 3), colour, np.uint8) for colour in colours])
    write_video(tmp_path / "v.mp4", frames, 16)
    facts = probe_video(tmp_path / "v.mp4")
    assert (facts.width, facts.height, facts.num_frames) == (48, 32, 3)
    assert facts.seconds == pytest.approx(3 / 16)
    pictures = pictures_at(tmp_path / "v.mp4", [0.0, 1 / 16, 2 / 16], facts.start_seconds)
    for colour, (picture, times) in zip(colours, pictures, strict=True):
        assert times == 1
        assert np.abs(np.asarray(picture.image, dtype=int) - colour).max() <= 6
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]
