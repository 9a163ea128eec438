from collections import Counter
from types import SimpleNamespace

import pytest

from utils.data.buckets import Bucket
from utils.data.contact_sheet import shown_frames
from utils.data.inspect import (
    caption_histogram,
    choose_samples,
    file_rows,
    printable,
    run_length,
    skip_rows,
    skipped_share,
)
from utils.data.manifest import Manifest, SkippedFile
from utils.data.sampler import BatchPlan


def test_few_samples_are_all_shown_and_many_evenly(make_record):
    large, small = Bucket(64, 64, 5), Bucket(96, 48, 5)
    samples = [make_record(sample_id=index, bucket=large) for index in range(100)]
    samples += [make_record(sample_id=index, bucket=small) for index in range(100, 103)]
    assert Counter(sample.bucket for sample in choose_samples(samples, 10)) == {large: 7, small: 3}
    assert [sample.sample_id for sample in choose_samples(samples[:100], 4)] == [0, 25, 50, 75]
    assert len(choose_samples(samples[:3], 10)) == 3
    assert choose_samples([], 10) == []


def test_more_buckets_than_places(make_record):
    samples = [make_record(sample_id=index, bucket=Bucket(32 * index, 64, 1)) for index in range(1, 9)]
    assert [sample.sample_id for sample in choose_samples(samples, 3)] == [1, 2, 3]


def test_every_caption_is_in_one_bin():
    bins = caption_histogram([1, 32, 33, 512, 513, 9000], 512)
    assert [(row.low, row.high) for row in bins[:2]] == [(1, 32), (33, 64)]
    assert [row.count for row in bins] == [2, 1, *[0] * 13, 1, 2]


def test_a_limit_that_is_no_multiple_of_a_bin():
    assert [(row.low, row.high) for row in caption_histogram([], 40)] == [(1, 32), (33, 40), (41, None)]


@pytest.mark.parametrize(("num_frames", "shown"), [(1, (0,)), (5, (0, 2, 4)), (81, (0, 40, 80))])
def test_first_middle_and_last_frame(num_frames, shown):
    assert shown_frames(num_frames) == shown


def test_the_length_of_a_run(make_record):
    plan = BatchPlan([make_record(sample_id=index, num_repeats=1.5) for index in range(10)], 2, 0)
    by_epochs = run_length(SimpleNamespace(gradient_accumulation_steps=2, epochs=4, max_steps=None), plan)
    total = plan.batches_before(4)
    assert (by_epochs.epochs, by_epochs.steps) == (4, -(-total // 2))
    assert by_epochs.micro_batches_per_epoch == total / 4 == 2 * by_epochs.steps_per_epoch
    by_steps = run_length(SimpleNamespace(gradient_accumulation_steps=2, epochs=4, max_steps=9), plan)
    assert by_steps.steps == 9
    assert plan.batches_before(by_steps.epochs - 1) < 18 <= plan.batches_before(by_steps.epochs)


def test_several_samples_of_one_file_count_as_one_file(make_record):
    clips = tuple(make_record(sample_id=index) for index in range(3))
    skipped = (SkippedFile(clips[0].path.with_name("b.mp4"), "why", "too_short"),)
    assert skipped_share(Manifest(clips, skipped)) == 0.5
    assert skipped_share(Manifest((), ())) == 0


def test_rows_of_skipped_files_begin_with_damaged_ones(make_record, tmp_path):
    skipped = (
        SkippedFile(tmp_path / "a", "first", "too_short"),
        SkippedFile(tmp_path / "b", "second", "unreadable"),
        SkippedFile(tmp_path / "c", "third", "too_short"),
    )
    rows = file_rows(Manifest((make_record(),), skipped), 16.0, {"a red square": 513}, 512)
    assert [row.detail for row in rows] == ["second", "first", "third", None]
    assert rows[-1].is_truncated is True
    assert [(row.reason, row.count, row.detail) for row in skip_rows(skipped)] == [
        ("too_short", 2, "first"),
        ("unreadable", 1, "second"),
    ]


def test_what_is_no_utf8_is_escaped():
    assert printable("gr\u00fcn\udce8") == "gr\u00fcn\\udce8"
