import av
import numpy as np
import pytest
from PIL import Image


def frames_of(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)], float(
            stream.average_rate
        )


def shape_centre(frame):
    """Mean (x, y) of what differs from the background, as fractions of width and height."""
    difference = np.abs(frame.astype(int) - frame[0, 0].astype(int)).sum(axis=2) > 60
    rows, columns = np.nonzero(difference)
    return columns.mean() / frame.shape[1], rows.mean() / frame.shape[0]


def test_images_and_videos_are_real_and_differ_in_form(tiny_dataset):
    images = sorted(tiny_dataset.glob("*.png"))
    videos = sorted(tiny_dataset.glob("*.mp4"))
    assert (len(images), len(videos)) == (6, 6)
    image_sizes = {Image.open(path).size for path in images}
    clips = [frames_of(path) for path in videos]
    assert len(image_sizes) >= 4
    assert len({frames[0].shape for frames, _ in clips}) >= 4
    assert {rate for _, rate in clips} == {16.0, 24.0, 30.0}
    assert {len(frames) for frames, _ in clips} == {33, 25, 40, 17, 9, 21}
    assert max(max(frames[0].shape) for frames, _ in clips) <= 128


def test_exactly_one_file_has_no_caption(tiny_dataset):
    media = [path for path in tiny_dataset.iterdir() if path.suffix != ".txt"]
    without = [path.name for path in media if not path.with_suffix(".txt").exists()]
    assert without == ["image_05.png"]
    assert len(list(tiny_dataset.glob("*.txt"))) == len(media) - 1


@pytest.mark.parametrize(
    ("motion", "direction"),
    [
        ("moves to the right", (1, 0)),
        ("moves to the left", (-1, 0)),
        ("moves up", (0, -1)),
        ("moves down", (0, 1)),
        ("moves along a diagonal", (1, 1)),
        ("stands still", (0, 0)),
    ],
)
def test_videos_move_as_their_captions_say(tiny_dataset, motion, direction):
    (caption,) = [path for path in tiny_dataset.glob("video_*.txt") if motion in path.read_text()]
    frames, _ = frames_of(caption.with_suffix(".mp4"))
    (x0, y0), (x1, y1) = shape_centre(frames[0]), shape_centre(frames[-1])
    moved = tuple(round(float(step)) for step in ((x1 - x0) / 0.5, (y1 - y0) / 0.5))
    assert moved == direction


def test_captions_name_the_colour_that_is_seen(tiny_dataset):
    strongest = {"red": 0, "green": 1, "blue": 2}
    seen = set()
    for caption in tiny_dataset.glob("*.txt"):
        colour = caption.read_text().split()[1]
        media = next(path for path in tiny_dataset.glob(f"{caption.stem}.*") if path.suffix != ".txt")
        frame = frames_of(media)[0][0] if media.suffix == ".mp4" else np.asarray(Image.open(media))
        if colour in strongest:
            x, y = shape_centre(frame)
            pixel = frame[round(y * frame.shape[0]), round(x * frame.shape[1])]
            assert int(pixel.argmax()) == strongest[colour], caption
            seen.add(colour)
    assert seen == set(strongest)


def test_reruns_are_equal_byte_for_byte_and_seeds_are_not(tiny_dataset, run_script, tmp_path):
    for name, seed in (("again", 0), ("other", 1)):
        done = run_script("make_tiny_dataset.py", "--out", tmp_path / name, "--seed", seed)
        assert done.returncode == 0, done.stderr
    contents = {path.name: path.read_bytes() for path in tiny_dataset.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == contents
    assert {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()} != contents


def test_a_directory_with_something_in_it_is_left_alone(run_script, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    done = run_script("make_tiny_dataset.py", "--out", tmp_path)
    assert done.returncode == 2
    assert "never overwritten" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
