"""What was found out about files, remembered between runs, so that unchanged files are not read again."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import xxhash

from utils.data.buckets import Bucket
from utils.data.masks import MaskGrid, make_mask_grid
from utils.data.media import MediaInfo, probe_media
from utils.files import atomic_write_text, content_hash

# Raise whenever `probe_media` or `make_mask_grid` answers differently for the same file, or `MediaInfo` has other fields: old answers
# are then not used.
_FORMAT = 2
# Format 1 did not know where a file lies from the memo; all else is the same.
_READ_FORMATS = (1, _FORMAT)
# Within the coarsest time resolution of a file system in use, a second change may leave the same time stamp.
_TOO_FRESH_NS = 2_000_000_000


@dataclass
class _Entry:
    """What is known of a file as long as its size and time stamp stay the same, and where it lies from the memo."""

    size: int
    mtime_ns: int
    content_hash: str | None = None
    info: MediaInfo | None = None
    mask_grids: dict[str, MaskGrid] = field(default_factory=dict)
    relative: str | None = None


class HashMemo:
    """Content hashes and probe results of files, keyed by (absolute path, size, modification time).

    Kept as JSON lines under a first line with a checksum; a memo that is damaged, or of another format, counts as
    empty and is made anew. Nothing is written before `save`.

    With `trust_sizes` a file counts as unchanged if its size is the same: its time stamp is not compared, and it may
    also be known by where it lies from the memo, because memo and files were copied or mounted together. What was
    taken on trust is never written down, so that a later run without trust looks again.
    """

    def __init__(
        self, path: Path | None = None, *, read_only: bool = False, trust_sizes: bool = False
    ) -> None:
        """Read the memo at `path`, if there is one; None keeps it in memory only, and `read_only` what is new."""
        self._path = path
        self._read_only = read_only
        self._entries: dict[str, _Entry] = dict(_read_entries(path)) if path is not None else {}
        # Of several former places of a file the one with the newest time stamp counts.
        by_age = sorted(self._entries.values(), key=lambda entry: entry.mtime_ns)
        self._by_relative = (
            {entry.relative: entry for entry in by_age if entry.relative is not None} if trust_sizes else {}
        )
        self._trust_sizes = trust_sizes
        # By path, apart from what is saved.
        self._trusted: dict[str, _Entry] = {}
        self._is_changed = False
        self.num_read = 0

    @property
    def num_trusted(self) -> int:
        """Files that were taken for unchanged although their time stamp or place is another."""
        return len(self._trusted)

    def content_hash(self, path: Path, *, compare_time: bool = False) -> str:
        """`utils.files.content_hash`, read from the memo if the file is unchanged.

        Args:
            path: the file.
            compare_time: compare its time stamp also where the memo trusts sizes.

        Raises:
            OSError: the file cannot be read.
        """
        entry = self._entry(path, trust_size=self._trust_sizes and not compare_time)
        if entry.content_hash is None:
            entry.content_hash = content_hash(path)
            self.num_read += not compare_time
            self._is_changed = True
        return entry.content_hash

    def paths_of(self, content_hash: str) -> list[str]:
        """Where files with this content were when the memo was written; they may have changed or gone since."""
        return sorted(path for path, entry in self._entries.items() if entry.content_hash == content_hash)

    def time_stamp(self, path: Path) -> int | None:
        """The file's time stamp, in ns; None where the memo trusts sizes, because then it says nothing.

        Asked before `content_hash`, so that a file which changes afterwards has another one.

        Raises:
            OSError: the file cannot be read.
        """
        return None if self._trust_sizes else path.stat().st_mtime_ns

    def media_info(self, path: Path) -> MediaInfo:
        """`media.probe_media`, read from the memo if the file is unchanged. Failures are not remembered.

        Raises:
            UserError: as `probe_media`.
            OSError: the file cannot be read.
        """
        entry = self._entry(path, trust_size=self._trust_sizes)
        if entry.info is None:
            entry.info = probe_media(path)
            self._is_changed = True
        return entry.info

    def mask_grid(self, path: Path, medium: MediaInfo, bucket: Bucket, stride: int) -> MaskGrid:
        """`masks.make_mask_grid`, read from the memo if the mask is unchanged. Failures are not remembered.

        The time stamp counts also where the memo trusts sizes: nobody looks into a mask again later, and an
        uncompressed one has the same size whatever it shows.

        Raises:
            UserError: as `make_mask_grid`.
            OSError: the file cannot be read.
        """
        entry = self._entry(path, trust_size=False)
        use = f"{medium.width}x{medium.height} in {bucket} by {stride}"
        if use not in entry.mask_grids:
            entry.mask_grids[use] = make_mask_grid(path, medium, bucket, stride)
            self._is_changed = True
        return entry.mask_grids[use]

    def save(self) -> None:
        """Write the memo, if anything is new, it has a path and is not read-only.

        Files changed within the last two seconds are left out: another change could leave the same time stamp.

        Raises:
            UserError: the disk is full or the folder not writable.
        """
        if self._path is None or self._read_only or not self._is_changed:
            return
        newest_ns = time.time_ns() - _TOO_FRESH_NS
        lines = [
            json.dumps({"path": path, **_fields(entry)})
            for path, entry in sorted(self._entries.items())
            if entry.mtime_ns <= newest_ns
        ]
        body = "".join(line + "\n" for line in lines)
        atomic_write_text(self._path, f"{_header(body)}\n{body}")
        self._is_changed = False

    def _entry(self, path: Path, *, trust_size: bool) -> _Entry:
        status = path.stat()
        # Not resolved: a link is a file of its own.
        key = str(path.absolute())
        entry = self._entries.get(key)
        if entry is not None and (entry.size, entry.mtime_ns) == (status.st_size, status.st_mtime_ns):
            return entry
        relative = None if self._path is None else os.path.relpath(key, self._path.absolute().parent)
        if trust_size:
            trusted = self._trusted.get(key) or self._take_on_trust(
                key, (entry, self._by_relative.get(relative or "")), status.st_size
            )
            if trusted is not None:
                return trusted
        entry = self._entries[key] = _Entry(status.st_size, status.st_mtime_ns, relative=relative)
        return entry

    def _take_on_trust(self, key: str, known: Iterable[_Entry | None], size: int) -> _Entry | None:
        """The first of `known` that has a hash and this size, as an entry of its own that is not saved."""
        for entry in known:
            if entry is not None and entry.size == size and entry.content_hash is not None:
                self._trusted[key] = replace(entry)
                return self._trusted[key]
        return None


def _fields(entry: _Entry) -> dict[str, object]:
    """An entry as JSON has it; only masks have grids."""
    fields = asdict(entry)
    if not entry.mask_grids:
        del fields["mask_grids"]
    return fields


def _header(body: str, number: int = _FORMAT) -> str:
    return f"hash-memo {number} {xxhash.xxh3_128_hexdigest(body.encode())}"


def _read_entries(path: Path) -> Iterator[tuple[str, _Entry]]:
    try:
        header, _, body = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return
    if header not in [_header(body, number) for number in _READ_FORMATS]:
        return
    for line in body.splitlines():
        fields = json.loads(line)
        info = fields.pop("info")
        grids = {use: MaskGrid(**grid) for use, grid in fields.pop("mask_grids", {}).items()}
        yield (
            fields.pop("path"),
            _Entry(**fields, info=None if info is None else MediaInfo(**info), mask_grids=grids),
        )
