import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.data.buckets import Bucket, MediaRules, assign_bucket, build_buckets
from utils.errors import UserError

DIRECTORY = DirectoryConfig(path="shapes")
RULES_5B = MediaRules(fps=24.0, pixel_multiple=32)


def dataset(**keys) -> DatasetConfig:
    return DatasetConfig(directory=(DIRECTORY,), **keys)


@given(
    resolutions=st.lists(st.integers(64, 2048), min_size=1, max_size=3),
    frames=st.lists(st.integers(0, 40).map(lambda n: 4 * n + 1), min_size=1, max_size=3),
    low=st.floats(0.2, 1.0),
    high=st.floats(1.0, 5.0),
    count=st.integers(1, 9),
    multiple=st.sampled_from([16, 32]),
)
def test_regular_buckets_are_legal_and_near_their_nominal_size(
    resolutions, frames, low, high, count, multiple
):
    config = dataset(
        resolutions=tuple(resolutions),
        frame_buckets=tuple(frames),
        min_ar=low,
        max_ar=high,
        num_ar_buckets=count,
    )
    buckets = build_buckets(config, DIRECTORY, MediaRules(16.0, multiple))
    assert buckets == tuple(sorted(set(buckets)))
    assert {bucket.num_frames for bucket in buckets} == set(frames)
    for bucket in buckets:
        assert bucket.width % multiple == bucket.height % multiple == 0
        assert min(bucket.width, bucket.height) >= multiple

        # Each side is within half a step of a shape of exactly resolution ** 2 px.
        slack = multiple / 2 + 1e-6
        smallest = (bucket.width - slack) * (bucket.height - slack)
        largest = (bucket.width + slack) * (bucket.height + slack)
        assert any(smallest <= resolution**2 <= largest for resolution in resolutions)


def test_aspect_ratios_are_evenly_spaced_in_log():
    config = dataset(resolutions=(1024,), min_ar=0.5, max_ar=2.0, num_ar_buckets=3, frame_buckets=(1,))
    assert build_buckets(config, DIRECTORY, MediaRules(16.0, 16)) == (
        Bucket(720, 1456, 1),
        Bucket(1024, 1024, 1),
        Bucket(1456, 720, 1),
    )


def test_square_only_without_ar_buckets_and_explicit_ratios_win():
    assert build_buckets(dataset(enable_ar_bucket=False, frame_buckets=(1,)), DIRECTORY, RULES_5B) == (
        Bucket(512, 512, 1),
    )
    explicit = build_buckets(dataset(ar_buckets=(1.0, 1.75), frame_buckets=(1,)), DIRECTORY, RULES_5B)
    assert explicit == (Bucket(512, 512, 1), Bucket(672, 384, 1))


@pytest.mark.parametrize(
    ("top", "own", "shapes"),
    [
        ({"num_ar_buckets": 1, "min_ar": 1.0, "max_ar": 1.0}, {}, {1}),
        ({"num_ar_buckets": 3}, {"num_ar_buckets": 1}, {1}),
        ({"num_ar_buckets": 2}, {"min_ar": 1.0}, {1, 2}),
        ({"num_ar_buckets": 2}, {"max_ar": 1.0}, {0.5, 1}),
        ({"ar_buckets": (1.0,)}, {}, {1}),
        ({"ar_buckets": (1.0,), "num_ar_buckets": 2}, {"min_ar": 0.5}, {0.5, 2}),
        ({"num_ar_buckets": 3}, {"ar_buckets": (2.0,)}, {2}),
        ({"enable_ar_bucket": False, "num_ar_buckets": 3}, {"enable_ar_bucket": True}, {0.5, 1, 2}),
        ({"num_ar_buckets": 3}, {"enable_ar_bucket": False}, {1}),
    ],
)
def test_a_directory_has_its_own_shapes(top, own, shapes):
    config = dataset(resolutions=(1024,), frame_buckets=(1,), **top)
    buckets = build_buckets(config, DirectoryConfig(path="shapes", **own), MediaRules(16.0, 16))
    assert sorted(bucket.aspect_ratio for bucket in buckets) == pytest.approx(sorted(shapes), rel=0.02)


@pytest.mark.parametrize(
    ("top", "own", "key"),
    [
        ({"enable_ar_bucket": False}, {"max_ar": 1.5}, "max_ar"),
        ({}, {"ar_buckets": (1.0,), "num_ar_buckets": 3}, "num_ar_buckets"),
        ({"size_buckets": ((64, 64, 1),)}, {"ar_buckets": (1.0,)}, "ar_buckets"),
        ({"size_buckets": ((64, 64, 1),)}, {"enable_ar_bucket": True}, "enable_ar_bucket"),
        ({"max_ar": 1.5}, {"min_ar": 1.6}, "min_ar"),
    ],
)
def test_keys_of_a_directory_that_would_do_nothing_are_refused(top, own, key):
    with pytest.raises(UserError, match=rf"  {key}: "):
        build_buckets(dataset(**top), DirectoryConfig(path="shapes", **own), MediaRules(16.0, 16))


def test_directory_overrides_top_level():
    directory = DirectoryConfig(path="clips", resolutions=(256,), frame_buckets=(9,))
    buckets = build_buckets(dataset(enable_ar_bucket=False), directory, RULES_5B)
    assert buckets == (Bucket(256, 256, 9),)


def test_size_buckets_are_taken_as_they_are():
    triples = ((832, 480, 49), (480, 832, 1))
    assert build_buckets(dataset(size_buckets=triples), DIRECTORY, RULES_5B) == (
        Bucket(480, 832, 1),
        Bucket(832, 480, 49),
    )
    own = DirectoryConfig(path="clips", size_buckets=((64, 64, 5),))
    assert build_buckets(dataset(size_buckets=triples), own, RULES_5B) == (Bucket(64, 64, 5),)


@pytest.mark.parametrize(
    ("keys", "directory_keys", "expected"),
    [
        ({"frame_buckets": (1, 32)}, {}, ["frame_buckets: 32 frames is not 4n+1", "29 or 33"]),
        ({"frame_buckets": (0,)}, {}, ["frame_buckets: 0 frames"]),
        ({"frame_buckets": ()}, {}, ["frame_buckets: is empty"]),
        ({"resolutions": (16,)}, {}, ["resolutions: 16 is below 32"]),
        ({"min_ar": 3.0}, {}, ["min_ar: 3.0"]),
        ({"ar_buckets": (1.0, -2.0)}, {}, ["ar_buckets"]),
        ({"size_buckets": ((840, 480, 49),)}, {}, ["width 840 of [840, 480, 49]", "multiple of 32 -> 832"]),
        ({"size_buckets": ((832, 480),)}, {}, ["[832, 480] is not [width, height, frames]"]),
        ({"size_buckets": ((832, 480, 48),)}, {}, ["48 frames is not 4n+1", "45 or 49"]),
        ({"size_buckets": ()}, {}, ["size_buckets: is empty"]),
        (
            {"size_buckets": ((64, 64, 1),)},
            {"resolutions": (512,)},
            ["resolutions: the top level's size_buckets"],
        ),
        (
            {},
            {"frame_buckets": (1,), "size_buckets": ((64, 64, 1),)},
            ["frame_buckets: its own size_buckets"],
        ),
        (
            {"frame_buckets": (2,), "resolutions": (8,), "min_ar": 9.0},
            {},
            ["2 frames", "8 is below", "min_ar"],
        ),
    ],
)
def test_illegal_keys_are_all_reported_with_their_directory(keys, directory_keys, expected):
    directory = DirectoryConfig(path="clips", **directory_keys)
    with pytest.raises(UserError) as caught:
        build_buckets(dataset(**keys), directory, RULES_5B)
    for text in ["[[directory]] clips", *expected]:
        assert text in str(caught.value)


BUCKETS = build_buckets(
    dataset(resolutions=(512, 1024), frame_buckets=(1, 17, 49), num_ar_buckets=7), DIRECTORY, RULES_5B
)


@given(width=st.integers(32, 5000), height=st.integers(32, 5000), available=st.integers(1, 200))
def test_assignment_never_stretches_time_and_keeps_kinds_apart(width, height, available):
    bucket = assign_bucket(width, height, available, BUCKETS)
    lengths = [1] if available == 1 else [n for n in (17, 49) if n <= available]
    if not lengths:
        assert bucket is None
    else:
        assert bucket in BUCKETS
        assert bucket.num_frames == lengths[-1]


@given(width=st.integers(32, 5000), height=st.integers(32, 5000))
def test_one_resolution_gives_the_nearest_aspect_ratio(width, height):
    buckets = [bucket for bucket in BUCKETS if bucket.num_frames == 1 and bucket.area < 600_000]
    assert len(buckets) == 7
    bucket = assign_bucket(width, height, 1, tuple(buckets))
    distances = [abs(math.log(b.width * height / (b.height * width))) for b in buckets]
    assert abs(math.log(bucket.width * height / (bucket.height * width))) == pytest.approx(min(distances))


@given(ratio=st.floats(0.5, 2.0))
def test_area_and_not_rounding_decides_between_resolutions(ratio):
    small = assign_bucket(round(500 * ratio**0.5), round(500 / ratio**0.5), 1, BUCKETS)
    large = assign_bucket(round(1100 * ratio**0.5), round(1100 / ratio**0.5), 1, BUCKETS)
    assert small.area == pytest.approx(512**2, rel=0.1)
    assert large.area == pytest.approx(1024**2, rel=0.1)


def test_shape_comes_before_length_in_explicit_sizes():
    buckets = (Bucket(480, 832, 81), Bucket(832, 480, 49))
    assert assign_bucket(1920, 1080, 100, buckets) == Bucket(832, 480, 49)
    assert assign_bucket(1080, 1920, 100, buckets) == Bucket(480, 832, 81)


def test_a_video_never_becomes_an_image():
    assert assign_bucket(64, 64, 4, (Bucket(64, 64, 1), Bucket(64, 64, 5))) is None
    assert assign_bucket(64, 64, 1, (Bucket(64, 64, 5),)) is None
