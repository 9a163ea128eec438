from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.data.clips import MAX_UNIFORM_CLIPS, clip_starts, is_clip_mode

MODES = st.sampled_from(["single_beginning", "single_middle", "multiple_overlapping"]) | st.integers(
    1, MAX_UNIFORM_CLIPS
).map("uniform:{}".format)
LENGTHS = st.tuples(st.integers(1, 60), st.integers(0, 400)).map(lambda pair: (pair[0], sum(pair)))


@given(mode=MODES, lengths=LENGTHS)
def test_clips_lie_in_the_video_and_none_is_taken_twice(mode, lengths):
    clip, video = lengths
    starts = clip_starts(mode, video, clip)
    assert starts
    assert list(starts) == sorted(set(starts))
    assert starts[0] >= 0
    assert starts[-1] + clip <= video


@given(lengths=LENGTHS)
def test_overlapping_clips_cover_the_video_and_are_as_few_as_can_be(lengths):
    clip, video = lengths
    starts = clip_starts("multiple_overlapping", video, clip)
    assert {frame for start in starts for frame in range(start, start + clip)} == set(range(video))
    assert (len(starts) - 1) * clip < video  # one fewer would not be enough
    steps = [after - before for before, after in pairwise(starts)]
    assert max(steps, default=0) - min(steps, default=0) <= 1


@given(count=st.integers(1, 300), lengths=LENGTHS)
def test_uniform_clips_are_evenly_spaced_from_end_to_end(count, lengths):
    clip, video = lengths
    starts = clip_starts(f"uniform:{count}", video, clip)
    assert len(starts) == min(count, video - clip + 1)
    assert starts[0] == 0
    if count > 1:
        assert starts[-1] == video - clip
    steps = [after - before for before, after in pairwise(starts)]
    assert max(steps, default=0) - min(steps, default=0) <= 1


def test_where_clips_begin():
    assert clip_starts("single_beginning", 32, 9) == (0,)
    assert clip_starts("single_middle", 32, 9) == (11,)
    assert clip_starts("multiple_overlapping", 32, 9) == (0, 7, 15, 23)
    assert clip_starts("multiple_overlapping", 18, 9) == (0, 9)
    assert clip_starts("uniform:1", 32, 9) == (0,)
    assert clip_starts("uniform:3", 32, 9) == (0, 11, 23)
    assert clip_starts("uniform:9", 10, 9) == (0, 1)


@pytest.mark.parametrize(
    "mode",
    [
        "uniform",
        "uniform:",
        "uniform:N",
        "uniform:0",
        "uniform:-1",
        "uniform:+3",
        "uniform:03",
        "uniform:10000",
        "uniform:3 ",
        "uniform:\u0663",
        "middle",
        "",
    ],
)
def test_what_is_no_clip_mode(mode):
    assert not is_clip_mode(mode)
    with pytest.raises(ValueError, match="is not one of"):
        clip_starts(mode, 32, 9)


@given(mode=MODES)
def test_what_is_a_clip_mode(mode):
    assert is_clip_mode(mode)


def test_a_video_shorter_than_a_clip_is_refused():
    with pytest.raises(ValueError, match="8 frames hold no clip of 9"):
        clip_starts("single_beginning", 8, 9)
