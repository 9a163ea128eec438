"""Filling the cache: each rank encodes its share of what is missing, in homogeneous batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch

from utils.data.cache import CacheStore
from utils.data.prefetch import ReadAhead
from utils.errors import UserError


@dataclass(frozen=True)
class FillItem:
    """One item to have in the cache.

    Attributes:
        key: of the cache.
        group: items of equal group may be encoded in one batch (a bucket's sides and length; a token count).
        payload: what `encode` needs, or what `load` makes that of; nothing here looks into it.
        metadata: text to keep with the item.
    """

    key: str
    group: tuple[int, ...]
    payload: Any
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FillStats:
    """What a rank found and did: its share in items, those that were there, those it encoded, and what could not be.

    `failures` holds key and reason of each item that `load` gave an error for.
    """

    num_items: int
    num_present: int
    num_encoded: int
    failures: tuple[tuple[str, str], ...] = ()


Encode = Callable[[Sequence[FillItem]], Iterable[Mapping[str, torch.Tensor]]]
# Gets all payloads in the order in which they will be encoded; gives, while its body runs, what `encode` wants instead.
Load = Callable[[Sequence[Any]], AbstractContextManager[Iterator[Any]]]


def fill_cache(
    store: CacheStore,
    work: Sequence[FillItem],
    encode: Encode,
    *,
    load: Load | None = None,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 1,
    regenerate: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> FillStats:
    """Encode this rank's share of `work` that is not in the store, putting each batch there at once.

    A rank's share depends on `work` alone, not on what is missing, so that ranks which start at different moments
    and see different parts of the cache filled still cover everything between them. It is whole batches: a matrix
    product's last bits can depend on how many rows it has, and an empty cache is to be filled alike by any number of
    processes. Killed and started again, it goes on where it was.

    Args:
        store: the cache.
        work: all items of all ranks; the same on each, in any order. Equal keys count once.
        encode: gives the tensors of each item of a batch, in order; they are put as they come.
        load: turns each payload into the one that `encode` gets, or into a UserError: that item is left out. It runs
            in another thread, one batch ahead.
        rank: this process.
        world_size: number of processes that fill.
        batch_size: items in a batch, at most.
        regenerate: encode also what is there.
        on_progress: called with (done, total) before the first batch and after each item.

    Raises:
        UserError: from `load` (a file that cannot be decoded) or `encode`, or the disk is full.
    """
    share = rank_share(work, rank, world_size, batch_size)
    missing = set(store.missing(item.key for item in share))
    to_do = [item for item in share if regenerate or item.key in missing]
    num_encoded = 0
    failures: list[tuple[str, str]] = []
    if on_progress is not None:
        on_progress(0, len(to_do))
    batches = list(make_batches(to_do, batch_size))
    payloads = [item.payload for batch in batches for item in batch]
    with ExitStack() as stack:
        stack.callback(store.flush)
        loaded = iter(payloads) if load is None else stack.enter_context(load(payloads))
        ahead = stack.enter_context(ReadAhead(partial(_load_batch, batches, loaded)))
        for index in range(len(batches)):
            batch = ahead.take(index)
            if index + 1 < len(batches):
                ahead.begin(index + 1)
            failed = [item for item in batch if isinstance(item.payload, UserError)]
            failures += [(item.key, str(item.payload)) for item in failed]
            usable = [item for item in batch if not isinstance(item.payload, UserError)]
            for item, tensors in zip(usable, encode(usable) if usable else (), strict=True):
                store.put(item.key, tensors, item.metadata)
                num_encoded += 1
                if on_progress is not None:
                    on_progress(num_encoded + len(failures), len(to_do))
            if failed and on_progress is not None:
                on_progress(num_encoded + len(failures), len(to_do))
    return FillStats(len(share), len(share) - len(to_do), num_encoded, tuple(failures))


def _load_batch(batches: Sequence[Sequence[FillItem]], loaded: Iterator[Any], index: int) -> list[FillItem]:
    """A batch with what was loaded in place of its payloads; batches are asked for one after the other."""
    return [replace(item, payload=next(loaded)) for item in batches[index]]


def rank_share(work: Iterable[FillItem], rank: int, world_size: int, batch_size: int) -> list[FillItem]:
    """Every `world_size`-th batch of the distinct items, so that each rank gets all groups alike."""
    distinct = {item.key: item for item in work}
    batches = list(make_batches(distinct.values(), batch_size))
    return [item for batch in batches[rank::world_size] for item in batch]


def make_batches(items: Iterable[FillItem], batch_size: int) -> Iterator[list[FillItem]]:
    """Batches of at most `batch_size` items of one group."""
    for _, members in groupby(sorted(items, key=_group_and_key), key=lambda item: item.group):
        group = list(members)
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _group_and_key(item: FillItem) -> tuple[tuple[int, ...], str]:
    return item.group, item.key
