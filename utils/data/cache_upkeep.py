"""Looking after a cache: what is in it, which items are damaged, which nobody needs, what killed processes left.

Other processes may fill the cache meanwhile: items that come or go while it is looked at are no error.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from utils.data.cache import SHARDS_FOLDER, CacheStore
from utils.data.shards import INDEX_SUFFIX, SHARD_SUFFIX
from utils.errors import UserError
from utils.files import TEMPORARY_SUFFIX, disk_errors_as_user_errors

# A process that still writes has touched its file more recently than this.
LEFTOVER_AGE_SECONDS = 3600.0


@dataclass(frozen=True)
class KindStats:
    """All items of one kind.

    Attributes:
        kind: latents, text.
        num_items: how many there are.
        num_bytes: what they hold.
        oldest, newest: seconds since the epoch at which the first and last one was written.
        made_by: per name of the metadata how many items have each value.
        num_unreadable: items whose header cannot be read.
    """

    kind: str
    num_items: int
    num_bytes: int
    oldest: float
    newest: float
    made_by: dict[str, Counter[str]]
    num_unreadable: int


@dataclass(frozen=True)
class UnneededItems:
    """Items that may go, and their size."""

    keys: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True)
class Leftovers:
    """Files that may go, and their size."""

    paths: tuple[Path, ...]
    num_bytes: int


def open_existing(root: Path) -> CacheStore:
    """Open a cache that is there; unlike `CacheStore` it makes none.

    Raises:
        UserError: there is no cache, or a newer version made it.
    """
    if not (root / "FORMAT").is_file():
        inside = root / ".wan_cache"
        hint = f"; {inside} is one" if (inside / "FORMAT").is_file() else ""
        raise UserError(
            f"{root}: is no cache{hint}; give the dataset's cache_dir, by default .wan_cache in its first directory"
        )
    return CacheStore(root)


def measure(store: CacheStore) -> list[KindStats]:
    """Count the items of each kind, by the index and the items' headers."""
    return [_measure_kind(store, kind) for kind in store.kinds()]


def _measure_kind(store: CacheStore, kind: str) -> KindStats:
    items = list(store.items(kind))
    made_by: defaultdict[str, Counter[str]] = defaultdict(Counter)
    num_unreadable = 0
    for item in items:
        try:
            metadata = store.metadata(item.key)
        except KeyError:
            continue  # removed meanwhile
        except ValueError:
            num_unreadable += 1
            continue
        for name, value in metadata.items():
            made_by[name][value] += 1
    return KindStats(
        kind,
        len(items),
        sum(item.num_bytes for item in items),
        min(item.written for item in items),
        max(item.written for item in items),
        dict(made_by),
        num_unreadable,
    )


def all_keys(store: CacheStore) -> list[str]:
    """Keys of every item."""
    return [key for kind in store.kinds() for key in store.keys(kind)]


def find_damaged(
    store: CacheStore, keys: Iterable[str], on_item: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """What is wrong with each damaged item, by key; nothing is removed. `on_item` is called after each.

    Raises:
        UserError: an item cannot be read, which is not damage: its rights may be mended.
    """
    damaged = {}
    for key in keys:
        reason = store.damage(key)
        if reason is not None:
            damaged[key] = reason
        on_item()
    return damaged


def find_unneeded(store: CacheStore, keys: Iterable[str], needed: Set[str]) -> UnneededItems:
    """Those of `keys` that are there and not in `needed`."""
    places = {key: store.place(key) for key in keys if key not in needed}
    sizes = {key: place.entry.length for key, place in places.items() if place is not None}
    return UnneededItems(tuple(sizes), sum(sizes.values()))


def find_leftovers(root: Path, min_age_seconds: float = LEFTOVER_AGE_SECONDS) -> Leftovers:
    """What killed processes left in the cache, as far as it is old enough: temporary files, indices without shards."""
    newest = time.time() - min_age_seconds
    sizes: dict[Path, int] = {}
    for path in _left(root):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if path.is_file() and status.st_mtime <= newest:
            sizes[path] = status.st_size
    return Leftovers(tuple(sizes), sum(sizes.values()))


def delete(leftovers: Leftovers) -> None:
    """Delete the files; one that has gone already is no error.

    Raises:
        UserError: the cache is not writable.
    """
    for path in leftovers.paths:
        with disk_errors_as_user_errors(path):
            path.unlink(missing_ok=True)


def _left(root: Path) -> Iterator[Path]:
    # Not deeper: `cache_dir` may be a folder that holds other things too.
    for folder in (root, root / SHARDS_FOLDER):
        yield from folder.glob(f".*{TEMPORARY_SUFFIX}")
    for index in (root / SHARDS_FOLDER).glob(f"*{INDEX_SUFFIX}"):
        if not index.with_suffix(SHARD_SUFFIX).exists():
            yield index
