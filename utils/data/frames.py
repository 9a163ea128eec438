"""The format of shards: frames of 64 bytes of header and an item, and index records of 64 bytes. Numbers are little-endian."""

import struct
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash

ALIGNMENT = 64

_MAGIC = b"WANITEM1"
_TOMBSTONE = 1
# magic, flags, nothing, length, time written, digest; then the checksum over these and the item.
FIELDS = struct.Struct("<8sIIQQ16s")
_CHECKSUM_BYTES = 16
HEADER_BYTES = FIELDS.size + _CHECKSUM_BYTES
RECORD = np.dtype(
    [
        ("digest", "V16"),
        ("checksum", "V16"),
        ("offset", "<u8"),
        ("length", "<u8"),
        ("written_ns", "<u8"),
        ("flags", "<u4"),
        ("check", "<u4"),
    ]
)
_CHECK_WEIGHTS = (np.arange(15, dtype=np.uint32) * np.uint32(2654435761)) | np.uint32(1)
_SEARCH_BYTES = 1 << 20  # a multiple of ALIGNMENT


class Entry(NamedTuple):
    """One frame: the item's digest and checksum, where it begins and how long it is, when it was written.

    A tombstone says that an item of the same digest that was written before it has been removed.
    """

    digest: bytes
    checksum: bytes
    offset: int
    length: int
    written_ns: int
    is_tombstone: bool

    @property
    def end(self) -> int:
        """Where the next frame begins."""
        return aligned(self.offset + self.length)


def aligned(offset: int) -> int:
    """The next multiple of 64."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def frame_checksum(fields: bytes, payload: bytes | memoryview) -> bytes:
    """xxh3-128 over the header's fields and the item."""
    digest = xxhash.xxh3_128(fields)
    digest.update(payload)
    return digest.digest()


def parse_header(header: bytes, payload_offset: int) -> Entry | None:
    """The frame that a header describes, its item at `payload_offset`; None where it is no header."""
    if len(header) < HEADER_BYTES:
        return None
    magic, flags, _, length, written_ns, digest = FIELDS.unpack_from(header)
    if magic != _MAGIC:
        return None
    return Entry(digest, header[FIELDS.size :], payload_offset, length, written_ns, bool(flags & _TOMBSTONE))


def next_whole_frame(file: BinaryIO, start: int, size: int) -> Entry | None:
    """The first frame from `start` on that lies in the file and matches its checksum; frames begin at multiples of 64."""
    while start + HEADER_BYTES <= size:
        file.seek(start)
        block = file.read(_SEARCH_BYTES)
        for place in range(0, len(block), ALIGNMENT):
            if block[place : place + len(_MAGIC)] != _MAGIC:
                continue
            file.seek(start + place)
            header = file.read(HEADER_BYTES)
            entry = parse_header(header, start + place + HEADER_BYTES)
            if entry is None or entry.end > size:
                continue
            if frame_checksum(header[: FIELDS.size], file.read(entry.length)) == entry.checksum:
                return entry
        start += _SEARCH_BYTES
    return None


def index_records(*entries: Entry) -> bytes:
    """Index records of these frames."""
    records = np.zeros(len(entries), dtype=RECORD)
    for name in ("offset", "length", "written_ns"):
        records[name] = [getattr(entry, name) for entry in entries]
    records["digest"] = [np.void(entry.digest) for entry in entries]
    records["checksum"] = [np.void(entry.checksum) for entry in entries]
    records["flags"] = [_TOMBSTONE if entry.is_tombstone else 0 for entry in entries]
    records["check"] = _check_words(records)
    return records.tobytes()


def _check_words(records: np.ndarray) -> np.ndarray:
    """A word per record over the others, to know a record that was not written whole from one that was."""
    words = records.view("<u4").reshape(len(records), 16)[:, :15].astype(np.uint32)
    return ((words + np.uint32(1)) * _CHECK_WEIGHTS).sum(axis=1, dtype=np.uint32)


def count_valid(records: np.ndarray, shard_bytes: int) -> int:
    """How many records from the first on are whole and lie inside the shard."""
    is_valid = (records["check"] == _check_words(records)) & (
        records["offset"] + records["length"] <= np.uint64(shard_bytes)
    )
    return int(is_valid.argmin()) if not is_valid.all() else len(records)


def read_records(records: np.ndarray) -> list[Entry]:
    """Index records as entries."""
    digests, checksums = records["digest"].tobytes(), records["checksum"].tobytes()
    rows = zip(
        records["offset"].tolist(),
        records["length"].tolist(),
        records["written_ns"].tolist(),
        (records["flags"] & _TOMBSTONE).astype(bool).tolist(),
        strict=True,
    )
    return [
        Entry(digests[16 * number : 16 * number + 16], checksums[16 * number : 16 * number + 16], *row)
        for number, row in enumerate(rows)
    ]


def frame_header(
    digest: bytes, length: int, written_ns: int, *, is_tombstone: bool, payload: bytes | memoryview
) -> bytes:
    """The 64 bytes before an item, with its checksum."""
    fields = FIELDS.pack(_MAGIC, _TOMBSTONE if is_tombstone else 0, 0, length, written_ns, digest)
    return fields + frame_checksum(fields, payload)
