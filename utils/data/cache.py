"""The cache of encoded items: one store of shards, filled and read by several processes, addressed by content."""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from utils.data.cache_keys import split_key
from utils.data.frames import Entry
from utils.data.items import decode_metadata, decode_tensors, encode_item
from utils.data.shards import Shard, ShardWriter, has_room, kind_of, shard_paths
from utils.errors import UserError
from utils.files import atomic_write_text, disk_errors_as_user_errors

STORE_FORMAT = 2
FORMAT_FILE = "FORMAT"
SHARDS_FOLDER = "shards"


class Place(NamedTuple):
    """Where an item is."""

    shard: Shard
    entry: Entry

    def __str__(self) -> str:
        return f"{self.shard.path} at byte {self.entry.offset}"


@dataclass(frozen=True)
class ItemFacts:
    """An item without its tensors: key, bytes, when it was written (seconds since the epoch)."""

    key: str
    num_bytes: int
    written: float


class CacheStore:
    """Items of named tensors in append-only shards (see `utils.data.shards`), found by key.

    An item is there whole or not at all, and several processes may fill one store, each in shards of its own. A
    checksum is compared when a process first reads an item. What other processes add is seen as soon as something
    is asked for that this process does not know.
    """

    def __init__(self, root: Path) -> None:
        """Open the store at `root`, making it if it is not there.

        With the default place, inside a directory of the dataset, build the manifest first: it says so if the
        directory is missing, where this would make it.

        Raises:
            UserError: another version made it, or it cannot be written.
        """
        self.root = root
        self._folder = root / SHARDS_FOLDER
        self._lock = threading.RLock()
        self._shards: dict[Path, Shard] = {}
        self._items: dict[str, Place] = {}
        self._removed_ns: dict[str, int] = {}
        self._verified: set[str] = set()
        self._writers: dict[str, ShardWriter] = {}
        self._open_format()
        self.refresh()

    def __len__(self) -> int:
        return len(self._items)

    def refresh(self) -> None:
        """See what other processes have written, removed or compacted since the store was opened."""
        with self._lock:
            while not self._read_shards():
                # One is gone: its items are in another one now, or an older frame of theirs counts again.
                self._shards, self._items, self._removed_ns = {}, {}, {}

    def has(self, key: str) -> bool:
        """Whether the item is there (see `verify` for whether it is whole)."""
        return self._find(key) is not None

    def place(self, key: str) -> Place | None:
        """Where the item is; None where it is not there."""
        return self._find(key)

    def counts(self, key: str, path: Path, entry: Entry) -> bool:
        """Whether this frame of a shard is the one that `key` is read from, as of the last `refresh`."""
        place = self._items.get(key)
        return place is not None and place.shard.path == path and place.entry.checksum == entry.checksum

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are not there, in order, each once."""
        self.refresh()
        return [key for key in dict.fromkeys(keys) if key not in self._items]

    def put(
        self, key: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write an item; an earlier one of the same key is not found any more.

        Args:
            key: from `cache_keys`.
            tensors: on any device, of any strides.
            metadata: text kept with the item for people and tools.

        Raises:
            UserError: the disk is full or the store cannot be written.
        """
        self._append(key, encode_item(tensors, metadata or {}), is_tombstone=False)

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """The item's tensors, mapped from the shard. Do not write to them.

        Raises:
            UserError: it is not there, or is damaged (then it is removed).
        """
        found = self._read(key)
        if found is None:
            raise UserError(
                f"{self.root}: the item {key} of this cache is missing or was damaged and has been removed; "
                "run with --cache_only to make it anew"
            )
        return found

    def metadata(self, key: str) -> dict[str, str]:
        """The text that `put` was given with an item that is there.

        Raises:
            KeyError: it is not there.
            ValueError: it is damaged.
        """
        place = self._find(key)
        if place is None:
            raise KeyError(key)
        return decode_metadata(self._payload(key, place))

    def verify(self, key: str) -> bool:
        """Read the item and compare its checksum. False: it is not there, or was damaged and has been removed."""
        self._verified.discard(key)
        return self._read(key) is not None

    def damage(self, key: str) -> str | None:
        """Read the item, compare its checksum and say what is wrong with it; None where it is whole or not there.

        Unlike `verify` it leaves a damaged item where it is.
        """
        place = self._find(key)
        if place is None:
            return None
        try:
            if not place.shard.is_whole(place.entry):
                return "does not match its checksum"
            decode_tensors(place.shard.payload(place.entry))
        except FileNotFoundError:
            return None  # compacted meanwhile by another process
        except ValueError as error:
            return str(error)
        return None

    def peek(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of an item that is there, as `get` has them; unlike it this leaves a damaged one where it is.

        Raises:
            KeyError: it is not there.
            ValueError: it is damaged.
        """
        place = self._find(key)
        if place is None:
            raise KeyError(key)
        if not self._is_whole(key, place):
            raise ValueError("does not match its checksum")
        return decode_tensors(self._payload(key, place))

    def remove(self, key: str) -> None:
        """Mark the item as removed, if it is there. `utils.data.compaction` gives its bytes back."""
        if self._find(key) is not None:
            self._append(key, b"", is_tombstone=True)

    def kinds(self) -> list[str]:
        """The kinds of items that are there."""
        self.refresh()
        return sorted({split_key(key)[0] for key in self._items})

    def items(self, kind: str) -> Iterator[ItemFacts]:
        """All items of a kind, in the order of their digests, by the index alone."""
        self.refresh()
        for key in sorted(key for key in self._items if key.startswith(f"{kind}/")):
            entry = self._items[key].entry
            yield ItemFacts(key, entry.length, entry.written_ns / 1e9)

    def keys(self, kind: str) -> Iterator[str]:
        """Keys of all items of a kind, in the order of their digests."""
        return (item.key for item in self.items(kind))

    def flush(self) -> None:
        """Make all that this process has written durable, and let other processes append to its shards."""
        with self._lock, disk_errors_as_user_errors(self.root):
            while self._writers:
                self._writers.popitem()[1].close()

    # ------------------------------------------------------------------ finding

    def _find(self, key: str) -> Place | None:
        place = self._items.get(key)
        if place is None:
            split_key(key)
            self.refresh()
            place = self._items.get(key)
        return place

    def _read_shards(self) -> bool:
        """Learn what is new in every shard; False where one that was known, or has just been listed, is gone."""
        present = list(shard_paths(self._folder))
        if not self._shards.keys() <= set(present):
            return False
        for path in present:
            try:
                self._read_new(self._shards.setdefault(path, Shard(path)))
            except FileNotFoundError:
                return False
        return True

    def _read_new(self, shard: Shard) -> None:
        kind = kind_of(shard.path)
        try:
            entries = shard.refresh()
        except PermissionError as error:
            raise UserError(f"{shard.path}: not readable ({error.strerror}); mend its rights") from error
        for entry in entries:
            self._learn(f"{kind}/{entry.digest.hex()}", Place(shard, entry))

    def _learn(self, key: str, place: Place) -> None:
        """Of several frames with one key the newest counts, in whatever order they are met."""
        written = place.entry.written_ns
        known = self._items.get(key)
        newest = max(self._removed_ns.get(key, -1), -1 if known is None else known.entry.written_ns)
        if written <= newest:
            return
        self._verified.discard(key)
        if place.entry.is_tombstone:
            self._removed_ns[key] = written
            self._items.pop(key, None)
        else:
            self._items[key] = place

    # ------------------------------------------------------------------ reading and writing

    def _read(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors; None where the item is not there, or was damaged and has been removed."""
        place = self._find(key)
        if place is None:
            return None
        try:
            if key not in self._verified and not self._is_whole(key, place):
                raise ValueError("does not match its checksum")
            tensors = decode_tensors(self._payload(key, place))
        except ValueError:
            self.remove(key)
            return None
        self._verified.add(key)
        return tensors

    def _is_whole(self, key: str, place: Place) -> bool:
        try:
            return place.shard.is_whole(place.entry)
        except FileNotFoundError:
            moved = self._moved(key)
            return moved is not None and moved.shard.is_whole(moved.entry)

    def _payload(self, key: str, place: Place) -> memoryview:
        try:
            return place.shard.payload(place.entry)
        except FileNotFoundError:
            moved = self._moved(key)
            if moved is None:
                raise ValueError("was removed by another process") from None
            return moved.shard.payload(moved.entry)

    def _moved(self, key: str) -> Place | None:
        """Where the item is after another process has compacted the shard that it was in."""
        self.refresh()
        return self._items.get(key)

    def _append(self, key: str, payload: bytes, *, is_tombstone: bool) -> None:
        kind, digest = split_key(key)
        with self._lock, disk_errors_as_user_errors(self._folder):
            known = self._items.get(key)
            # Later than what it replaces, also where that was written by a machine whose clock is ahead.
            after = 0 if known is None else known.entry.written_ns + 1
            writer = self._writer(kind, len(payload))
            written_ns = max(time.time_ns(), after, self._removed_ns.get(key, -1) + 1)
            entry = writer.append(digest, payload, is_tombstone=is_tombstone, written_ns=written_ns)
            shard = self._shards.setdefault(writer.path, Shard(writer.path))
            self._read_new(shard)
            assert is_tombstone or self._items[key].entry == entry, "just written"
            if not is_tombstone:
                self._verified.add(key)

    def _writer(self, kind: str, length: int) -> ShardWriter:
        """This process's open shard of a kind, with room for an item of this length."""
        writer = self._writers.get(kind)
        if writer is not None and has_room(writer.num_bytes, length):
            return writer
        if writer is not None:
            writer.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._writers[kind] = self._adopt(kind, length) or ShardWriter.create(self._folder, kind)
        return self._writers[kind]

    def _adopt(self, kind: str, length: int) -> ShardWriter | None:
        """A shard with room that a process has left, so that many small fills do not make many small shards."""
        for path in shard_paths(self._folder):
            if kind_of(path) == kind and path.exists() and has_room(path.stat().st_size, length):
                writer = ShardWriter.adopt(path)
                if writer is not None:
                    return writer
        return None

    def _open_format(self) -> None:
        path = self.root / FORMAT_FILE
        with disk_errors_as_user_errors(self.root):
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                text = path.read_text(encoding="utf-8", errors="replace").strip()
            except (FileExistsError, NotADirectoryError) as error:
                raise UserError(
                    f"{self.root}: a file is in the way; name another cache_dir in the dataset"
                ) from error
            except FileNotFoundError:
                atomic_write_text(path, f"{STORE_FORMAT}\n")
                return
        if text != str(STORE_FORMAT):
            is_older = text.isdigit() and int(text) < STORE_FORMAT
            remedy = (
                f"delete {self.root}, then what is needed is encoded anew"
                if is_older
                else "use the version that made it"
            )
            raise UserError(
                f"{path}: this cache has format {text[:20]!r}, and this version reads format {STORE_FORMAT}; "
                f"{remedy}, or name another cache_dir in the dataset"
            )
