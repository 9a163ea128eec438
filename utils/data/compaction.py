"""Giving back the bytes of removed items: what is left of a shard goes into a new one, then the old one is deleted."""

from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from utils.data.cache import SHARDS_FOLDER, CacheStore
from utils.data.cache_keys import split_key
from utils.data.frames import Entry
from utils.data.shards import Shard, ShardWriter, has_room, kind_of, shard_paths
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
    store.refresh()
    folder = store.root / SHARDS_FOLDER
    freed = left = 0
    with disk_errors_as_user_errors(folder):
        # Those with tombstones last: by then the items that they are for have gone.
        for path in sorted(shard_paths(folder), key=_has_tombstones):
            freed_here, left_here = _compact_shard(store, path, min_dead_share)
            freed, left = freed + freed_here, left + left_here
    store.refresh()
    return Freed(freed, left)


def _compact_shard(store: CacheStore, path: Path, min_dead_share: float) -> tuple[int, int]:
    """Bytes that came back and bytes that were left, of one shard."""
    # Judged twice: without the lock, to leave alone what is not worth it; and with it, for another process may have
    # written into the shard, or into others, in between.
    dead = _dead_bytes(store, path)
    if dead <= min_dead_share * path.stat().st_size:
        return 0, dead
    lock = ShardWriter.adopt(path)
    if lock is None:
        return 0, dead
    with closing(lock):
        store.refresh()
        return _rewrite(path, _kept_entries(store, path), lock.num_bytes), 0


def _dead_bytes(store: CacheStore, path: Path) -> int:
    return max(0, path.stat().st_size - sum(entry.end - entry.offset for entry in _kept_entries(store, path)))


def _has_tombstones(path: Path) -> bool:
    return any(entry.is_tombstone for entry in Shard(path).refresh())


def _kept_entries(store: CacheStore, path: Path) -> list[Entry]:
    """Frames of a shard that must stay: items that count, and tombstones of items that still lie in another shard."""
    entries = Shard(path).refresh()
    kind = kind_of(path)
    has_tombstones = any(entry.is_tombstone for entry in entries)
    others = (other for other in shard_paths(path.parent) if other != path)
    elsewhere = _digests_of_items(others) if has_tombstones else set()

    def must_stay(entry: Entry) -> bool:
        if entry.is_tombstone:
            return (kind, entry.digest) in elsewhere
        return store.counts(f"{kind}/{entry.digest.hex()}", path, entry)

    return [entry for entry in entries if must_stay(entry)]


def _digests_of_items(paths: Iterable[Path]) -> set[tuple[str, bytes]]:
    return {
        (kind_of(path), entry.digest)
        for path in paths
        for entry in Shard(path).refresh()
        if not entry.is_tombstone
    }


def _rewrite(path: Path, kept: list[Entry], num_bytes: int) -> int:
    """Copy the frames that stay and delete the shard, which this process has locked; the bytes gained."""
    after = 0
    source = Shard(path)
    with ExitStack() as stack:
        current: ShardWriter | None = None
        for entry in kept:
            # A damaged item is not given a new and right checksum: it is left behind and made anew when needed.
            if not source.is_whole(entry):
                continue
            if current is None or not has_room(current.num_bytes, entry.length):
                current = stack.enter_context(closing(ShardWriter.create(path.parent, kind_of(path))))
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
    return num_bytes - after


def remove_items(store: CacheStore, keys: Iterable[str]) -> Freed:
    """Remove items and give their bytes back.

    Raises:
        UserError: as `compact`.
    """
    for key in keys:
        split_key(key)
        store.remove(key)
    return compact(store)
