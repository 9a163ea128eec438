"""The global order of micro-batches: a pure function of the samples, the seed and the epoch.

Nothing here is remembered between calls but caches, so a run resumes at any step by asking for that step.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol, TypeVar

import numpy as np
import xxhash

from utils.data.buckets import Bucket
from utils.errors import UserError

# Fractional repeats are counted exactly, as fractions of at most this denominator, which keeps 64 bits enough.
_MAX_DENOMINATOR = 10_000
_PHASE_STEPS = 1 << 16
_MAX_REPEATS = 10_000
_EPOCHS_KEPT = 2

ItemT = TypeVar("ItemT")


class Schedulable(Protocol):
    """What the order depends on (`manifest.SampleRecord` has it)."""

    @property
    def sample_id(self) -> int: ...  # noqa: D102

    @property
    def bucket(self) -> Bucket: ...  # noqa: D102

    @property
    def num_repeats(self) -> float: ...  # noqa: D102


@dataclass(frozen=True)
class Visit:
    """One appearance of a sample: its index in the plan's `samples`, and how often it was seen before."""

    sample_index: int
    visit: int


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one bucket that go through the model together. The last one of a bucket and epoch may be short.

    `turn` is the optimizer step that it belongs to, counted from 0; only what takes turns by step reads it.
    """

    visits: tuple[Visit, ...]
    bucket: Bucket
    epoch: int
    turn: int = 0


class BatchPlan:
    """The endless stream of micro-batches: epoch 0, then epoch 1, and so on. Several threads may ask.

    Over the first E epochs a sample appears floor or ceil of E x `num_repeats` times; nothing is dropped to fill
    micro-batches. The order does not depend on the order of `samples`.
    """

    def __init__(self, samples: Sequence[Schedulable], micro_batch_size: int, seed: int) -> None:
        """Plan for these samples.

        Raises:
            UserError: a `num_repeats` is out of range.
            ValueError: no samples, two with one id, or a micro-batch size below 1.
        """
        if not samples or micro_batch_size < 1:
            raise ValueError(f"{len(samples)} samples in micro-batches of {micro_batch_size} make no plan")
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        # Everything below is in the order of sample ids.
        ids = [sample.sample_id for sample in samples]
        self._sample_indices = np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)
        ordered = [samples[index] for index in self._sample_indices]
        if len(set(ids)) != len(ids):
            raise ValueError("two samples have the same sample_id")
        repeats = [_as_fraction(sample.num_repeats) for sample in ordered]
        self._numerators = np.array([fraction.numerator for fraction in repeats], dtype=np.int64)
        self._denominators = np.array([fraction.denominator for fraction in repeats], dtype=np.int64)
        self._phases = np.array([_phase(seed, sample.sample_id) for sample in ordered], dtype=np.int64)
        self._buckets = sorted({sample.bucket for sample in ordered})
        rank_of_bucket = {bucket: rank for rank, bucket in enumerate(self._buckets)}
        self._bucket_ranks = np.array([rank_of_bucket[sample.bucket] for sample in ordered], dtype=np.int64)
        self._batches_before = [0]
        self._epochs: OrderedDict[int, tuple[MicroBatch, ...]] = OrderedDict()
        # The next step is read in another thread. Two locks: who counts does not wait for who makes an epoch.
        self._lock, self._count_lock = threading.Lock(), threading.Lock()

    def epoch_batches(self, epoch: int) -> tuple[MicroBatch, ...]:
        """All micro-batches of an epoch, in order."""
        with self._lock:
            if epoch not in self._epochs:
                self._epochs[epoch] = self._make_epoch(epoch)
                while len(self._epochs) > _EPOCHS_KEPT:
                    self._epochs.popitem(last=False)
            self._epochs.move_to_end(epoch)
            return self._epochs[epoch]

    def batches_before(self, epoch: int) -> int:
        """Number of micro-batches in epochs 0 .. epoch - 1."""
        with self._count_lock:
            while len(self._batches_before) <= epoch:
                counts = self._appearances(len(self._batches_before) - 1)
                per_bucket = np.bincount(
                    self._bucket_ranks, weights=counts, minlength=len(self._buckets)
                ).astype(np.int64)
                self._batches_before.append(
                    self._batches_before[-1] + int((-(-per_bucket // self.micro_batch_size)).sum())
                )
            return self._batches_before[epoch]

    def visits_before(self, epoch: int) -> tuple[int, ...]:
        """How often each of `samples`, in their order, appears in epochs 0 .. epoch - 1."""
        visits = np.empty(len(self._sample_indices), dtype=np.int64)
        visits[self._sample_indices] = self._appearances_before(epoch)
        return tuple(visits.tolist())

    def micro_batch(self, index: int) -> MicroBatch:
        """The micro-batch at a position in the endless stream."""
        epoch = self.epoch_of(index)
        return self.epoch_batches(epoch)[index - self.batches_before(epoch)]

    def epoch_of(self, index: int) -> int:
        """The epoch in which a position of the endless stream lies."""
        if index < 0:
            raise IndexError(f"position {index} of a stream that begins at 0")
        while self._batches_before[-1] <= index:
            self.batches_before(len(self._batches_before))
        # Another thread may have counted further meanwhile; what stands before that does not change.
        return bisect_right(self._batches_before, index) - 1

    def window(self, first: int, count: int, limit: int | None = None) -> tuple[MicroBatch, ...]:
        """`count` micro-batches of the stream from position `first` on; it may reach over the end of an epoch.

        Args:
            first: position of the first one.
            count: how many, over all data-parallel ranks.
            limit: positions from here on do not exist: the last step of a run is then short.
        """
        end = first + count if limit is None else min(first + count, limit)
        return tuple(self.micro_batch(index) for index in range(first, end))

    def _appearances_before(self, epoch: int) -> np.ndarray:
        """How often each sample appears in epochs 0 .. epoch - 1: floor(epoch x repeats + phase), exactly."""
        exact = epoch * self._numerators * _PHASE_STEPS + self._phases * self._denominators
        return exact // (self._denominators * _PHASE_STEPS)

    def _appearances(self, epoch: int) -> np.ndarray:
        return self._appearances_before(epoch + 1) - self._appearances_before(epoch)

    def _make_epoch(self, epoch: int) -> tuple[MicroBatch, ...]:
        generator = np.random.Generator(np.random.PCG64(_hash(f"{self.seed}|{epoch}")))
        seen = self._appearances_before(epoch)
        counts = self._appearances(epoch)
        batches: list[MicroBatch] = []
        for rank, bucket in enumerate(self._buckets):
            members = np.flatnonzero(self._bucket_ranks == rank)
            positions = np.repeat(members, counts[members])
            nth = np.arange(len(positions)) - np.repeat(
                np.cumsum(counts[members]) - counts[members], counts[members]
            )
            order = generator.permutation(len(positions))
            visits = [
                Visit(index, visit)
                for index, visit in zip(
                    self._sample_indices[positions][order].tolist(),
                    (seen[positions] + nth)[order].tolist(),
                    strict=True,
                )
            ]
            batches.extend(
                MicroBatch(tuple(visits[start : start + self.micro_batch_size]), bucket, epoch)
                for start in range(0, len(visits), self.micro_batch_size)
            )
        return tuple(batches[index] for index in generator.permutation(len(batches)))


def rank_slice(micro_batches: Sequence[ItemT], dp_rank: int, dp_size: int) -> Sequence[ItemT]:
    """The share of one data-parallel rank in a step: every `dp_size`-th micro-batch.

    So two ranks that accumulate once see, together, what one rank that accumulates twice sees.
    """
    return micro_batches[dp_rank::dp_size]


def _as_fraction(num_repeats: float) -> Fraction:
    if not 1 / _MAX_DENOMINATOR <= num_repeats <= _MAX_REPEATS:
        raise UserError(
            f"dataset: num_repeats = {num_repeats:g} is not between {1 / _MAX_DENOMINATOR:g} and {_MAX_REPEATS}"
        )
    return Fraction(num_repeats).limit_denominator(_MAX_DENOMINATOR)


def _phase(seed: int, sample_id: int) -> int:
    """Where in its cycle a sample's fractional repeats begin, in units of 1 / _PHASE_STEPS."""
    return _hash(f"{seed}|phase|{sample_id}") % _PHASE_STEPS


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())
