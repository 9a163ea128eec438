import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.buckets import Bucket
from utils.data.sampler import BatchPlan, rank_slice
from utils.errors import UserError


@dataclass(frozen=True)
class Sample:
    sample_id: int
    bucket: Bucket
    num_repeats: float = 1.0


BUCKETS = [Bucket(64, 64, 1), Bucket(64, 64, 5), Bucket(96, 48, 5)]
REPEATS = st.one_of(st.integers(1, 4).map(float), st.integers(1, 40_000).map(lambda n: n / 10_000))


@st.composite
def plans(draw) -> tuple[list[Sample], BatchPlan]:
    ids = draw(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=30, unique=True))
    samples = [Sample(i, draw(st.sampled_from(BUCKETS)), draw(REPEATS)) for i in ids]
    return samples, BatchPlan(samples, draw(st.integers(1, 5)), draw(st.integers(0, 3)))


@settings(deadline=None, max_examples=60)
@given(drawn=plans(), epochs=st.integers(1, 6))
def test_each_sample_appears_as_often_as_promised(drawn, epochs):
    samples, plan = drawn
    seen = defaultdict(list)
    for epoch in range(epochs):
        in_epoch = defaultdict(list)
        for batch in plan.epoch_batches(epoch):
            for visit in batch.visits:
                in_epoch[visit.sample_index].append(visit.visit)
        for index, visits in in_epoch.items():
            seen[index] += sorted(visits)
    for index, sample in enumerate(samples):
        exact = epochs * Fraction(str(sample.num_repeats))
        assert len(seen[index]) in (math.floor(exact), math.ceil(exact))
        # `visit` counts on over the epochs, without a gap.
        assert seen[index] == list(range(len(seen[index])))


@settings(deadline=None, max_examples=60)
@given(drawn=plans(), epochs=st.integers(1, 4))
def test_micro_batches_are_homogeneous_and_only_the_last_of_a_bucket_is_short(drawn, epochs):
    samples, plan = drawn
    for epoch in range(epochs):
        sizes = defaultdict(list)
        for batch in plan.epoch_batches(epoch):
            assert batch.epoch == epoch
            assert {samples[visit.sample_index].bucket for visit in batch.visits} == {batch.bucket}
            sizes[batch.bucket].append(len(batch.visits))
        for lengths in sizes.values():
            short = [length for length in lengths if length != plan.micro_batch_size]
            assert len(short) <= 1
            assert all(0 < length < plan.micro_batch_size for length in short)


@settings(deadline=None, max_examples=60)
@given(drawn=plans(), per_step=st.integers(1, 5), epochs=st.integers(1, 4))
def test_the_stream_is_the_epochs_one_after_another(drawn, per_step, epochs):
    _, plan = drawn
    total = plan.batches_before(epochs)
    expected = [batch for epoch in range(epochs) for batch in plan.epoch_batches(epoch)]
    assert total == len(expected)
    assert [plan.micro_batch(index) for index in range(total)] == expected
    steps = [plan.window(first, per_step, limit=total) for first in range(0, total, per_step)]
    assert [batch for step in steps for batch in step] == expected
    assert all(len(step) == per_step for step in steps[:-1])
    assert plan.window(total, per_step, limit=total) == ()
    assert len(plan.window(total, per_step)) == per_step
    assert all(plan.epoch_of(index) == plan.micro_batch(index).epoch for index in range(total))


@settings(deadline=None, max_examples=60)
@given(
    drawn=plans(),
    epochs=st.integers(1, 4),
    ranks=st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=2, max_size=2),
    stopped_at=st.floats(0, 1),
)
def test_over_all_ranks_and_a_resume_each_sample_appears_as_often_as_promised(
    drawn, epochs, ranks, stopped_at
):
    """Steps of twelve micro-batches; the run stops somewhere and goes on with another number of copies."""
    samples, plan = drawn
    total, per_step = plan.batches_before(epochs), 12
    starts = range(0, total, per_step)
    resumed_from = round(stopped_at * len(starts))
    seen: Counter[tuple[int, int]] = Counter()
    for number, first in enumerate(starts):
        is_resumed = number >= resumed_from
        source = BatchPlan(samples, plan.micro_batch_size, plan.seed) if is_resumed else plan
        copies = ranks[is_resumed]
        step = source.window(first, per_step, limit=total)
        shares = [rank_slice(step, rank, copies) for rank in range(copies)]
        assert sum(map(len, shares)) == len(step)
        for batch in (batch for share in shares for batch in share):
            seen.update((visit.sample_index, visit.visit) for visit in batch.visits)
    assert set(seen.values()) <= {1}, "a visit was made twice"
    for index, sample in enumerate(samples):
        exact = epochs * Fraction(str(sample.num_repeats))
        count = sum(sample_index == index for sample_index, _ in seen)
        assert count in (math.floor(exact), math.ceil(exact))


@settings(deadline=None, max_examples=40)
@given(drawn=plans(), order=st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(drawn, order):
    samples, plan = drawn
    shuffled = list(samples)
    order.shuffle(shuffled)
    other = BatchPlan(shuffled, plan.micro_batch_size, plan.seed)

    def by_id(source, batches):
        return [[(source[v.sample_index].sample_id, v.visit) for v in batch.visits] for batch in batches]

    for epoch in (0, 3):
        assert by_id(samples, plan.epoch_batches(epoch)) == by_id(shuffled, other.epoch_batches(epoch))


def make_plan(seed: int = 0, micro_batch_size: int = 2) -> BatchPlan:
    return BatchPlan([Sample(i * 7919, BUCKETS[i % 3]) for i in range(40)], micro_batch_size, seed)


def test_a_fresh_plan_continues_where_another_stopped():
    first = make_plan()
    whole = [first.window(position, 3) for position in range(20)]
    resumed = make_plan()
    assert [resumed.window(position, 3) for position in range(11, 20)] == whole[11:]


def test_epochs_and_seeds_differ_and_batches_are_shuffled_over_buckets():
    plan = make_plan()
    assert plan.epoch_batches(0) != plan.epoch_batches(1)
    assert [b.visits for b in plan.epoch_batches(0)] != [b.visits for b in make_plan(seed=1).epoch_batches(0)]
    buckets = [batch.bucket for batch in plan.epoch_batches(0)]
    assert buckets != sorted(buckets)


def test_the_order_is_the_one_that_runs_in_progress_were_started_with():
    # A change here breaks the resume of every unfinished run: make it knowingly.
    visits = [
        [(v.sample_index, v.visit) for v in batch.visits]
        for batch in make_plan(micro_batch_size=4).epoch_batches(1)[:3]
    ]
    assert visits == [[(1, 1), (22, 1), (37, 1), (4, 1)], [(17, 1)], [(32, 1), (23, 1), (8, 1), (11, 1)]]


def test_data_parallel_ranks_share_a_step_as_accumulation_does():
    plan = make_plan()
    step = plan.window(12, 6)
    shares = [rank_slice(step, rank, 3) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert [share[turn] for turn in range(2) for share in shares] == list(step)


def test_half_repeats_are_spread_over_the_epochs():
    samples = [Sample(i * 104729, BUCKETS[0], 0.5) for i in range(400)]
    plan = BatchPlan(samples, 1, seed=0)
    sizes = [len(plan.epoch_batches(epoch)) for epoch in range(2)]
    assert sum(sizes) == 400
    assert min(sizes) > 120  # a phase of its own per sample: not all in one epoch


def test_rare_samples_leave_epochs_empty_and_the_stream_goes_on():
    plan = BatchPlan([Sample(5, BUCKETS[0], 0.01)], 2, seed=0)
    counts = Counter(len(plan.epoch_batches(epoch)) for epoch in range(100))
    assert counts == {0: 99, 1: 1}
    assert plan.micro_batch(3).visits[0].visit == 3
    assert 300 <= plan.epoch_of(3) < 400


def test_what_makes_no_plan_is_refused():
    sample = Sample(1, BUCKETS[0])
    with pytest.raises(ValueError, match="0 samples"):
        BatchPlan([], 1, 0)
    with pytest.raises(ValueError, match="micro-batches of 0"):
        BatchPlan([sample], 0, 0)
    with pytest.raises(ValueError, match="same sample_id"):
        BatchPlan([sample, sample], 1, 0)
    with pytest.raises(IndexError):
        BatchPlan([sample], 1, 0).micro_batch(-1)
    with pytest.raises(UserError, match="num_repeats = 1e-06"):
        BatchPlan([Sample(1, BUCKETS[0], 1e-6)], 1, 0)


@settings(deadline=None, max_examples=30)
@given(drawn=plans(), epochs=st.integers(0, 5))
def test_visits_before_an_epoch_are_those_of_its_batches(drawn, epochs):
    samples, plan = drawn
    seen = Counter(
        visit.sample_index
        for epoch in range(epochs)
        for batch in plan.epoch_batches(epoch)
        for visit in batch.visits
    )
    assert plan.visits_before(epochs) == tuple(seen[index] for index in range(len(samples)))
