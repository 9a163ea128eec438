"""Giving back the bytes of removed items: what is left of a shard goes into a new one, then the old one is deleted."""

from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from utils.data.cache import SHARDS_FOLDER, CacheStore
from utils.data.cache_keys import split_key
from utils.data.shards import Entry, Shard, ShardWriter, has_room, kind_of, shard_paths
from utils.files import disk_errors_as_user_errors

# Copying a shard costs its whole size; below this share of removed bytes it is left as it is.
MIN_DEAD_SHARE = 0.1


@dataclass(frozen=True)
class Freed:
    """What a compaction gave back, and what it left: in shards with little to gain, or in use by another process."""

    freed_bytes: int
    left_bytes: int


def compact(store: CacheStore, min_dead_share: float = MIN_DEAD_SHARE) -> Freed:
    """Rewrite every shard with enough removed items in it. Readers go on: they find their items in the new shard.

    Killed at any moment, it leaves at most some items in two shards, of which either is right.

    Raises:
        UserError: the disk is full or the store not writable; shards that were not yet deleted are whole.
    """
    store.flush()
    folder = store.root / SHARDS_FOLDER
    freed = left = 0
    with disk_errors_as_user_errors(folder):
        live = _live_entries(store)
        # Those with tombstones last: by then the items that they are for have gone.
        for path in sorted(shard_paths(folder), key=_has_tombstones):
            size = path.stat().st_size
            kept = _kept_entries(path, live.get(path, set()), folder)
            dead = size - sum(entry.end - entry.offset for entry in kept)
            if dead <= min_dead_share * size:
                left += max(dead, 0)
                continue
            if (gained := _rewrite(path, kept, folder)) is None:
                left += dead
            else:
                freed += gained
    store.refresh()
    return Freed(freed, left)


def _has_tombstones(path: Path) -> bool:
    return any(entry.is_tombstone for entry in Shard(path).refresh())


def _live_entries(store: CacheStore) -> dict[Path, set[bytes]]:
    """Per shard the checksums of the frames that count."""
    live: dict[Path, set[bytes]] = {}
    for kind in store.kinds():
        for key in store.keys(kind):
            place = store.place(key)
            if place is not None:
                live.setdefault(place.shard.path, set()).add(place.entry.checksum)
    return live


def _kept_entries(path: Path, live: set[bytes], folder: Path) -> list[Entry]:
    """Frames of a shard that must stay: items that count, and tombstones of items that still lie in another shard."""
    entries = Shard(path).refresh()
    tombstones = {entry.digest for entry in entries if entry.is_tombstone}
    elsewhere = (
        _digests_of_items(other for other in shard_paths(folder) if other != path) if tombstones else set()
    )
    kind = kind_of(path)
    return [
        entry
        for entry in entries
        if ((kind, entry.digest) in elsewhere if entry.is_tombstone else entry.checksum in live)
    ]


def _digests_of_items(paths: Iterable[Path]) -> set[tuple[str, bytes]]:
    return {
        (kind_of(path), entry.digest)
        for path in paths
        for entry in Shard(path).refresh()
        if not entry.is_tombstone
    }


def _rewrite(path: Path, kept: list[Entry], folder: Path) -> int | None:
    """Copy the frames that stay and delete the shard; the bytes gained, None where another process writes it."""
    lock = ShardWriter.adopt(path)
    if lock is None:
        return None
    with closing(lock), ExitStack() as stack:
        before, after = lock.num_bytes, 0
        source = Shard(path)
        current: ShardWriter | None = None
        for entry in kept:
            # A damaged item is not given a new and right checksum: it is left behind and made anew when needed.
            if not source.is_whole(entry):
                continue
            if current is None or not has_room(current.num_bytes, entry.length):
                current = stack.enter_context(closing(ShardWriter.create(folder, kind_of(path))))
            start = current.num_bytes
            with source.payload(entry) as payload:
                current.append(
                    entry.digest, payload, is_tombstone=entry.is_tombstone, written_ns=entry.written_ns
                )
            after += current.num_bytes - start
        if current is not None:
            current.sync()
        path.unlink()
        source.index_path.unlink(missing_ok=True)
        return before - after


def remove_items(store: CacheStore, keys: Iterable[str]) -> Freed:
    """Remove items and give their bytes back.

    Raises:
        UserError: as `compact`.
    """
    for key in keys:
        split_key(key)
        store.remove(key)
    return compact(store)
