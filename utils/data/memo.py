"""What was found out about files, remembered between runs, so that unchanged files are not read again."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import xxhash

from utils.data.buckets import Bucket
from utils.data.masks import MaskGrid, make_mask_grid
from utils.data.media import MediaInfo, probe_media
from utils.files import atomic_write_text, content_hash

# Raise whenever `probe_media` or `make_mask_grid` answers differently for the same file, or `MediaInfo` has other fields: old answers
# are then not used.
_FORMAT = 1
# Within the coarsest time resolution of a file system in use, a second change may leave the same time stamp.
_TOO_FRESH_NS = 2_000_000_000


@dataclass
class _Entry:
    """What is known of a file as long as its size and time stamp stay the same."""

    size: int
    mtime_ns: int
    content_hash: str | None = None
    info: MediaInfo | None = None
    mask_grids: dict[str, MaskGrid] = field(default_factory=dict)


class HashMemo:
    """Content hashes and probe results of files, keyed by (absolute path, size, modification time).

    Kept as JSON lines under a first line with a checksum; a memo that is damaged, or of another format, counts as
    empty and is made anew. Nothing is written before `save`.
    """

    def __init__(self, path: Path | None = None, *, read_only: bool = False) -> None:
        """Read the memo at `path`, if there is one; None keeps it in memory only, and `read_only` what is new."""
        self._path = path
        self._read_only = read_only
        self._entries: dict[str, _Entry] = dict(_read_entries(path)) if path is not None else {}
        self._is_changed = False

    def content_hash(self, path: Path) -> str:
        """`utils.files.content_hash`, read from the memo if the file is unchanged.

        Raises:
            OSError: the file cannot be read.
        """
        entry = self._entry(path)
        if entry.content_hash is None:
            entry.content_hash = content_hash(path)
            self._is_changed = True
        return entry.content_hash

    def media_info(self, path: Path) -> MediaInfo:
        """`media.probe_media`, read from the memo if the file is unchanged. Failures are not remembered.

        Raises:
            UserError: as `probe_media`.
            OSError: the file cannot be read.
        """
        entry = self._entry(path)
        if entry.info is None:
            entry.info = probe_media(path)
            self._is_changed = True
        return entry.info

    def mask_grid(self, path: Path, medium: MediaInfo, bucket: Bucket, stride: int) -> MaskGrid:
        """`masks.make_mask_grid`, read from the memo if the mask is unchanged. Failures are not remembered.

        Raises:
            UserError: as `make_mask_grid`.
            OSError: the file cannot be read.
        """
        entry = self._entry(path)
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

    def _entry(self, path: Path) -> _Entry:
        status = path.stat()
        # Not resolved: a link is a file of its own.
        key = str(path.absolute())
        entry = self._entries.get(key)
        if entry is None or (entry.size, entry.mtime_ns) != (status.st_size, status.st_mtime_ns):
            entry = self._entries[key] = _Entry(status.st_size, status.st_mtime_ns)
        return entry


def _fields(entry: _Entry) -> dict[str, object]:
    """An entry as JSON has it; only masks have grids."""
    fields = asdict(entry)
    if not entry.mask_grids:
        del fields["mask_grids"]
    return fields


def _header(body: str) -> str:
    return f"hash-memo {_FORMAT} {xxhash.xxh3_128_hexdigest(body.encode())}"


def _read_entries(path: Path) -> Iterator[tuple[str, _Entry]]:
    try:
        header, _, body = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return
    if header != _header(body):
        return
    for line in body.splitlines():
        fields = json.loads(line)
        info = fields.pop("info")
        grids = {use: MaskGrid(**grid) for use, grid in fields.pop("mask_grids", {}).items()}
        yield (
            fields.pop("path"),
            _Entry(**fields, info=None if info is None else MediaInfo(**info), mask_grids=grids),
        )
