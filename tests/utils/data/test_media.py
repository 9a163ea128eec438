from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from utils.data.buckets import Bucket, MediaRules
from utils.data.media import MediaInfo, frames_available, load_clip, media_kind, probe_media
from utils.errors import UserError

SPEED = 30.0  # px per second


def load(make_record, path, bucket: Bucket, fps: float = 16.0, start: float = 0.0) -> torch.Tensor:
    info = probe_media(path)
    record = make_record(path=path, kind=info.kind, bucket=bucket, clip_start_seconds=start, info=info)
    return load_clip(record, MediaRules(fps=fps, pixel_multiple=16))


def center_x(video_CFHW: torch.Tensor) -> np.ndarray:
    """Centre of mass of the bright square in each frame, px."""
    light_FW = (video_CFHW.mean(dim=(0, 2)).double() + 1).clamp(min=0.02) - 0.02
    places_W = torch.arange(light_FW.shape[1]) + 0.5
    return ((light_FW * places_W).sum(1) / light_FW.sum(1)).numpy()


VARIABLE = [0.0, 0.03, 0.1, 0.11, 0.16, 0.2, 0.27, 0.29, 0.35]


@pytest.mark.parametrize("fps", [12, 16, 24, Fraction(30000, 1001), 60, "variable.mp4", "variable.mkv"])
@pytest.mark.parametrize("model_fps", [16.0, 24.0])
def test_motion_keeps_its_speed(tmp_path, write_video, square, make_record, fps, model_fps):
    if isinstance(fps, str):  # Matroska keeps times to the millisecond
        times = [0.36 * turn + offset for turn in range(4) for offset in VARIABLE]
        path = write_video(tmp_path / fps, lambda time: square(20 + SPEED * time), times)
    else:
        frames = int(Fraction(3, 2) * fps)
        path = write_video(
            tmp_path / "a.mp4", lambda time: square(20 + SPEED * time), fps=fps, num_frames=frames
        )
    num_frames = 21
    # A bucket twice the size: the square moves twice as many pixels.
    video_CFHW = load(make_record, path, Bucket(192, 128, num_frames), fps=model_fps)
    assert video_CFHW.shape == (3, num_frames, 128, 192)
    seconds = np.arange(num_frames) / model_fps
    places = center_x(video_CFHW) / 2
    assert np.polyfit(seconds, places, 1)[0] == pytest.approx(SPEED, rel=0.02)
    # At no moment is the shape further off than half of the longest pause between two source frames.
    pause = 0.07 if isinstance(fps, str) else 1 / float(fps)
    assert np.abs(places - (20 + SPEED * seconds)).max() < SPEED * pause / 2 + 0.3


def test_clip_start_counts_from_the_first_frame(tmp_path, write_video, square, make_record):
    for name in ("a.mp4", "a.ts"):
        path = write_video(tmp_path / name, lambda time: square(20 + SPEED * time), num_frames=48)
        video_CFHW = load(make_record, path, Bucket(96, 64, 5), fps=24.0, start=0.5)
        assert center_x(video_CFHW) == pytest.approx(20 + SPEED * (0.5 + np.arange(5) / 24), abs=0.3)


@pytest.mark.parametrize(
    ("seconds", "fps", "expected"),
    [
        (2.0, 16.0, 32),
        (2.0, 24.0, 48),
        (1.999, 24.0, 48),
        (2.001, 24.0, 48),
        (33 / 16, 16.0, 33),
        (31 / 30, 16.0, 17),
        (0.01, 16.0, 1),
    ],
)
def test_frames_available(seconds, fps, expected):
    assert frames_available(MediaInfo("video", 64, 64, 10, 10.0, seconds), fps) == expected
    assert frames_available(MediaInfo("image", 64, 64), fps) == 1


@pytest.mark.parametrize("fps", [12, 16, 24, Fraction(30000, 1001), 60])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_all_available_frames_can_be_loaded(tmp_path, write_video, solid, make_record, fps, name):
    path = write_video(tmp_path / name, solid(), fps=fps, num_frames=round(fps))
    for model_fps in (16.0, 24.0):
        available = frames_available(probe_media(path), model_fps)
        assert available == model_fps  # each is a second long, give or take a millisecond
        assert load(make_record, path, Bucket(16, 16, available), fps=model_fps).shape[1] == available


def test_an_image_is_scaled_to_cover_and_cropped_at_the_centre(tmp_path, make_record):
    # Columns of five colours; the bucket's shape keeps the middle three fifths of the width.
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255]], np.uint8)
    Image.fromarray(np.repeat(np.repeat(colors[None], 100, 0), 60, 1)).save(tmp_path / "a.png")  # 300 x 100
    video_CFHW = load(make_record, tmp_path / "a.png", Bucket(144, 80, 1))
    assert video_CFHW.shape == (3, 1, 80, 144)
    assert video_CFHW.dtype == torch.float32
    assert video_CFHW.is_contiguous()
    middle = video_CFHW[:, 0, 40, [24, 72, 120]].T
    assert torch.equal(middle, torch.from_numpy(colors[1:4]).float() / 127.5 - 1)
    assert video_CFHW.min() == -1.0
    assert video_CFHW.max() == 1.0


def test_an_image_of_the_buckets_size_is_untouched(tmp_path, make_record):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    video_CFHW = load(make_record, tmp_path / "a.png", Bucket(64, 48, 1))
    assert torch.equal(
        ((video_CFHW[:, 0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(pixels)
    )


def test_pixels_that_are_not_square_are_stretched_before_the_crop(tmp_path, write_video, make_record):
    # 64 x 48 stored, 128 x 48 shown: left half red, right half blue, cut to the middle 48 x 48.
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:, :32, 0] = frame[:, 32:, 2] = 255
    path = write_video(tmp_path / "a.mp4", lambda _: frame, pixel_aspect=Fraction(2), num_frames=8)
    red_W = load(make_record, path, Bucket(48, 48, 5))[0, 0, 24]
    assert red_W[:20].min() > 0.8
    assert red_W[28:].max() < -0.8


def test_probe_says_what_is_in_the_file(tmp_path, write_video, solid):
    path = write_video(tmp_path / "a.mp4", solid(), num_frames=36)
    info = probe_media(path)
    assert (info.kind, info.width, info.height, info.num_frames) == ("video", 96, 64, 36)
    assert (info.fps, info.seconds) == pytest.approx((24.0, 1.5))
    Image.new("L", (30, 20)).save(tmp_path / "a.PNG")
    assert probe_media(tmp_path / "a.PNG") == MediaInfo("image", 30, 20)


def test_kinds_go_by_the_ending(tmp_path):
    names = {
        "a.MP4": "video",
        "b.webm": "video",
        "c.JPG": "image",
        "d.mpg": "video",
        "e.csv": None,
        "f": None,
    }
    assert {name: media_kind(tmp_path / name) for name in names} == names


def test_a_file_that_is_gone_or_too_short_is_named(tmp_path, write_video, solid, make_record):
    for name in ("gone.png", "gone.mp4"):
        with pytest.raises(UserError, match=f"{name}: not readable any more"):
            load_clip(make_record(path=tmp_path / name), MediaRules(16.0, 16))
    path = write_video(tmp_path / "short.mp4", solid(), num_frames=12)
    with pytest.raises(UserError, match=r"short\.mp4: cannot be decoded as far as the clip reaches"):
        load(make_record, path, Bucket(64, 64, 13))
