"""Shards: files of many items that only ever grow at their end, each with an index beside it.

A shard is a sequence of frames: 64 bytes of header, then the item (a whole safetensors file), padded to 64 bytes. The
header has the item's digest, length and checksum, so a shard can be read without its index, and a frame that a killed
process left half-written is known by its checksum or by the end of the file. The index holds the same facts as records
of 64 bytes, so that opening a store reads no items. Only one process writes a shard (it holds a lock on it); it writes
the frame first and the index record after it.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import resource
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import numpy as np

from utils.data.frames import (
    FIELDS,
    HEADER_BYTES,
    RECORD,
    Entry,
    count_valid,
    frame_checksum,
    frame_header,
    index_records,
    next_whole_frame,
    parse_header,
    read_records,
)
from utils.errors import UserError
from utils.files import TEMPORARY_SUFFIX, atomic_write_bytes

SHARD_SUFFIX, INDEX_SUFFIX = ".shard", ".index"
# A writer begins another shard where the next item would make one larger than this; a larger item has one of its own.
MAX_SHARD_BYTES = 1 << 30

_SYNC_BYTES = 64 << 20


class Shard:
    """A shard as a reader sees it; other processes may append to it meanwhile."""

    def __init__(self, path: Path) -> None:
        """Nothing is opened before `refresh` or `payload`."""
        self.path = path
        self.end = 0
        self._index_bytes = 0
        self._map: mmap.mmap | None = None

    @property
    def index_path(self) -> Path:
        """The index beside the shard."""
        return self.path.with_suffix(INDEX_SUFFIX)

    def refresh(self) -> list[Entry]:
        """Whole frames that have come since the last call, in the order of the file.

        Raises:
            FileNotFoundError: the shard is gone (another process has compacted the store).
        """
        size = self.path.stat().st_size
        if size <= self.end:
            return []
        entries = self._read_index(size)
        if self.end < size:
            entries += self._scan_tail(size)
        return entries

    def is_whole(self, entry: Entry) -> bool:
        """Read the frame and compare its checksum."""
        start = entry.offset - HEADER_BYTES
        with self.payload(entry) as payload:
            header = bytes(self._mapped(entry.end)[start : entry.offset])
            found = parse_header(header, entry.offset)
            return found == entry and frame_checksum(header[: FIELDS.size], payload) == entry.checksum

    def payload(self, entry: Entry) -> memoryview:
        """The item's bytes, mapped from the file (writing to them changes this process's copy only).

        Raises:
            FileNotFoundError: the shard is gone.
            ValueError: the file has become shorter than it was.
        """
        mapped = self._mapped(entry.end)
        return memoryview(mapped)[entry.offset : entry.offset + entry.length]

    def _mapped(self, end: int) -> mmap.mmap:
        if self._map is None or len(self._map) < end:
            mapped = _map(self.path)
            if len(mapped) < end:
                raise ValueError(f"{self.path} ends at {len(mapped)} and not at {end} as its index says")
            self._map = mapped  # tensors in use keep the former one alive
        return self._map

    def _read_index(self, size: int) -> list[Entry]:
        try:
            with self.index_path.open("rb") as file:
                file.seek(self._index_bytes)
                data = file.read()
        except FileNotFoundError:
            return []
        records = np.frombuffer(data[: len(data) // RECORD.itemsize * RECORD.itemsize], dtype=RECORD)
        num_valid = count_valid(records, size)
        self._index_bytes += num_valid * RECORD.itemsize
        entries = [entry for entry in read_records(records[:num_valid]) if entry.offset > self.end]
        if entries:
            self.end = entries[-1].end
        return entries

    def _scan_tail(self, size: int) -> list[Entry]:
        """Frames behind the last one in the index: of a writer that is at work, or that was killed between the two.

        Where the index is lost that is the whole shard; a damaged frame in it is stepped over. What comes behind the
        last whole frame is a torn tail.
        """
        entries: list[Entry] = []
        with self.path.open("rb") as file:
            while (entry := next_whole_frame(file, self.end, size)) is not None:
                entries.append(entry)
                self.end = entry.end
        return entries


class ShardWriter:
    """The one process that appends to a shard, and holds a lock on it as long as it lives."""

    def __init__(self, path: Path, file: FileIO, num_bytes: int) -> None:
        """Of `create` and `adopt`; `file` holds the lock."""
        self.path = path
        self.num_bytes = num_bytes
        # Files and not descriptors: they close, and so give the lock free, also where nobody calls `close`.
        self._file = file
        index = path.with_suffix(INDEX_SUFFIX)
        index.touch()
        self._index = index.open("r+b", buffering=0)
        self._index_bytes = index.stat().st_size
        self._unsynced = 0

    @classmethod
    def create(cls, folder: Path, kind: str) -> "ShardWriter":
        """Begin a new shard, under a name that no other process uses.

        Raises:
            OSError: the folder is not writable or the disk is full.
        """
        path = folder / f"{kind}-{os.urandom(8).hex()}{SHARD_SUFFIX}"
        # Locked before it has its name: another process must not adopt it in between.
        hidden = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
        file = hidden.open("x+b", buffering=0)
        _lock(file)
        hidden.rename(path)
        return cls(path, file, 0)

    @classmethod
    def adopt(cls, path: Path) -> "ShardWriter | None":
        """Go on with a shard that no process writes; a torn tail is cut off and the index made whole.

        None where another process writes it, where locks do not work, or where it is gone or not writable.
        """
        try:
            file = path.open("r+b", buffering=0)
        except OSError:
            return None
        try:
            # The path may have been deleted between opening and locking.
            if not _lock(file) or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                file.close()
                return None
            shard = Shard(path)
            entries = shard.refresh()
            file.truncate(shard.end)
            _mend_index(shard.index_path, entries)
            return cls(path, file, shard.end)
        except FileNotFoundError:
            file.close()
            return None
        except BaseException:
            file.close()
            raise

    def append(
        self, digest: bytes, payload: bytes | memoryview, *, is_tombstone: bool = False, written_ns: int = 0
    ) -> Entry:
        """Write an item's frame, then its index record. An error leaves both files as they were.

        Args:
            digest: 16 bytes.
            payload: the item; empty for a tombstone.
            is_tombstone: the item is removed.
            written_ns: nanoseconds since the epoch; 0 is now.

        Raises:
            OSError: the disk is full.
        """
        header = frame_header(
            digest, len(payload), written_ns or time.time_ns(), is_tombstone=is_tombstone, payload=payload
        )
        start, index_start = self.num_bytes, self._index_bytes
        entry = parse_header(header, start + HEADER_BYTES)
        assert entry is not None, "just packed"
        try:
            _write_all(self._file, start, header, payload, bytes(entry.end - entry.offset - entry.length))
            _write_all(self._index, index_start, index_records(entry))
        except BaseException:
            with contextlib.suppress(OSError):
                self._index.truncate(index_start)
                self._file.truncate(start)
            raise
        self.num_bytes, self._index_bytes = entry.end, index_start + RECORD.itemsize
        self._unsynced += entry.end - start
        if self._unsynced >= _SYNC_BYTES:
            self.sync()
        return entry

    def sync(self) -> None:
        """Make what was written survive a loss of power; the frames first, then the index that names them."""
        os.fsync(self._file.fileno())
        os.fsync(self._index.fileno())
        self._unsynced = 0

    def close(self) -> None:
        """Sync, and let another process go on with the shard."""
        self.sync()
        self._index.close()
        self._file.close()


def has_room(shard_bytes: int, length: int) -> bool:
    """Whether an item of this length still belongs into a shard of this size."""
    return shard_bytes == 0 or shard_bytes + HEADER_BYTES + length <= MAX_SHARD_BYTES


def shard_paths(folder: Path) -> Iterator[Path]:
    """Shards in a folder, by name."""
    try:
        with os.scandir(folder) as found:
            # A link that leads nowhere is no shard.
            names = sorted(
                entry.name for entry in found if entry.name.endswith(SHARD_SUFFIX) and entry.is_file()
            )
    except FileNotFoundError:
        return
    for name in names:
        yield folder / name


def kind_of(path: Path) -> str:
    """The kind of a shard's items: its name is `<kind>-<16 hex digits>.shard`."""
    return path.stem.rpartition("-")[0]


def _map(path: Path) -> mmap.mmap:
    """A private mapping. Each holds a descriptor, and a large cache has many shards: the limit is raised where it bites.

    Raises:
        UserError: this process may open no more files, and may not raise the limit further.
    """
    for is_last_try in (False, True):
        try:
            with path.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if error.errno != errno.EMFILE:
                raise
            if is_last_try or soft == hard:
                raise UserError(
                    f"{path}: this process may open no more than {soft} files; raise the limit (ulimit -n), or make fewer "
                    "and larger shards with cache_tool.py prune"
                ) from error
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    raise AssertionError("the last try returns or raises")


def _lock(file: FileIO) -> bool:
    """Whether this process now holds the lock; False also on file systems without locks."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _write_all(file: FileIO, offset: int, *parts: bytes | memoryview) -> None:
    for part in parts:
        view = memoryview(part)
        while len(view):
            written = os.pwrite(file.fileno(), view, offset)
            offset, view = offset + written, view[written:]


def _mend_index(path: Path, entries: list[Entry]) -> None:
    """Make the index what it is when every frame has its record."""
    wanted = index_records(*entries)
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        found = b""
    if found != wanted:
        atomic_write_bytes(path, wanted)
