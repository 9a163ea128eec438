"""Captions of a directory's files: text files beside them, and tables (`captions.json`, `captions.jsonl`) of many."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SIDECAR_SUFFIX = ".txt"
JSON_TABLE, JSONL_TABLE = "captions.json", "captions.jsonl"
TABLE_NAMES = (JSON_TABLE, JSONL_TABLE)

NAME_KEYS = ("file", "file_name")
_CAPTION_KEYS = ("caption", "captions")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class CaptionError(Exception):
    """A file's caption cannot be used: it is unreadable, or given in two places."""

    def __init__(self, reason: str, code: Literal["unreadable", "caption_conflict"] = "unreadable") -> None:
        super().__init__(reason)
        self.reason = reason
        self.code: Literal["unreadable", "caption_conflict"] = code


class NoCaptionError(Exception):
    """A file has no caption, or a blank one. The message says which."""


@dataclass(frozen=True)
class CaptionEntry:
    """What the tables say of one file.

    Attributes:
        table: name of the table it stands in.
        captions: as written there; every one a string that UTF-8 can hold.
        problem: why it cannot be used; None if it can.
    """

    table: str
    captions: tuple[str, ...] = ()
    problem: CaptionError | None = None


@dataclass(frozen=True)
class TableDamage:
    """A part of a table that cannot be read, so that nobody knows which file it is about."""

    path: Path
    reason: str


@dataclass(frozen=True)
class CaptionTables:
    """All that a directory's tables hold: entries by file name, what could not be read, and which tables there are."""

    entries: Mapping[str, CaptionEntry] = field(default_factory=dict)
    damages: tuple[TableDamage, ...] = ()
    names: tuple[str, ...] = ()


class MalformedError(Exception):
    """A table of texts, or a line of one, has not the right form; the message is the reason."""


def read_caption_tables(directory: Path) -> CaptionTables:
    """Read `captions.json` and `captions.jsonl`, those that are there.

    `captions.json` is one object, {file name: caption, or list of captions}. `captions.jsonl` has an object on each
    line, {"file": name, "caption": text}; "file_name" and "captions" (a list) are understood as well, several lines
    of one file add up, other keys are passed over. Nothing is raised: what is wrong is part of the answer.
    """
    entries: dict[str, CaptionEntry] = {}
    damages: list[TableDamage] = []
    names: list[str] = []
    for table, read in ((JSON_TABLE, _read_json), (JSONL_TABLE, _read_jsonl)):
        path = directory / table
        # A broken link is there as well: captions are missed.
        if not (path.exists() or path.is_symlink()):
            continue
        names.append(table)
        try:
            content = path.read_bytes()
        except OSError as error:
            damages.append(TableDamage(path, f"not readable ({error.strerror})"))
            continue
        for item in read(content.removeprefix(BYTE_ORDER_MARK), table):
            if isinstance(item, str):
                damages.append(TableDamage(path, item))
            else:
                name, entry = item
                entries[name] = _merge(entries[name], entry) if name in entries else entry
    return CaptionTables(entries, tuple(damages), tuple(names))


def read_captions(path: Path, tables: CaptionTables) -> tuple[str, ...]:
    """The captions of a file, at least one, none blank, stripped.

    Args:
        path: the file.
        tables: of its directory.

    Raises:
        CaptionError: its caption cannot be read, or stands in several places.
        NoCaptionError: it has none.
    """
    entry = tables.entries.get(path.name)
    if entry is not None and entry.problem is not None:
        raise entry.problem
    sidecar = path.with_suffix(SIDECAR_SUFFIX)
    text = _read_sidecar(sidecar)
    if entry is not None and text is not None:
        raise CaptionError(
            f"it has both a caption file {sidecar.name} and an entry in {entry.table}; keep one of them",
            "caption_conflict",
        )
    if entry is not None:
        captions, blank = tuple(caption.strip() for caption in entry.captions), f"its entry in {entry.table}"
    else:
        captions, blank = (() if text is None else (text.strip(),)), f"its caption file {sidecar.name}"
    if captions and all(captions):
        return captions
    if any(captions):
        raise CaptionError(f"caption {captions.index('') + 1} of {blank} is blank; write it, or take it out")
    lack = f"{blank} is blank" if captions else _no_caption(sidecar, tables)
    if not captions and tables.damages:
        # It may well have one. To train it without would be wrong, whatever is made of files that have none.
        raise CaptionError(f"{lack} that can be read: {tables.damages[0].path.name} is damaged")
    raise NoCaptionError(lack)


def _no_caption(sidecar: Path, tables: CaptionTables) -> str:
    return " and ".join(
        [f"it has no caption file {sidecar.name}", *(f"no entry in {table}" for table in tables.names)]
    )


def _read_sidecar(sidecar: Path) -> str | None:
    """The text of a caption file, None if there is none."""
    try:
        return sidecar.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise CaptionError(f"{sidecar.name}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise CaptionError(f"{sidecar.name}: not readable ({error.strerror})") from error


def _read_json(content: bytes, table: str) -> Iterator[tuple[str, CaptionEntry] | str]:
    """Entries of a `captions.json`, or what is wrong with all of it."""
    try:
        document = parse_json(content)
        if not isinstance(document, dict):
            raise MalformedError("not an object of file names and captions")
    except MalformedError as error:
        yield str(error)
        return
    for name, value in document.items():
        if is_text(name):
            yield name, _make_entry(table, f"its entry in {table}", value)
        else:
            yield f"the name {name!r} is no text that UTF-8 can hold"


def _read_jsonl(content: bytes, table: str) -> Iterator[tuple[str, CaptionEntry] | str]:
    """Entries of a `captions.jsonl`, and what is wrong with lines of which the file is not known."""
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            name = _one_of(record, NAME_KEYS)
            if not is_text(name):
                raise MalformedError(f"the file's name is {name!r}, which is no text")
        except MalformedError as error:
            yield f"line {number}: {error}"
            continue
        where = f"line {number} of {table}"
        try:
            value = _one_of(record, _CAPTION_KEYS)
        except MalformedError as error:
            yield name, CaptionEntry(table, problem=CaptionError(f"{where}: {error}"))
        else:
            yield name, _make_entry(table, where, value)


def parse_json(content: bytes) -> Any:
    """Read JSON in which no object has a key twice.

    Raises:
        MalformedError: it is not that, or not UTF-8.
    """
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_object_of_distinct_keys)
    except UnicodeDecodeError as error:
        raise MalformedError(f"not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"not JSON ({error})") from error


def _object_of_distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. JSON would let the last of two equal keys win without a word."""
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise MalformedError(f"{name!r} stands there twice; give a file's captions as one list")
        made[name] = value
    return made


def _one_of(record: Any, keys: tuple[str, ...]) -> Any:
    """The value of the one key of `keys` that the object has."""
    if not isinstance(record, dict):
        raise MalformedError('not an object like {"file": name, "caption": text}')
    present = [key for key in keys if key in record]
    if len(present) != 1:
        raise MalformedError(f"it has {'both' if present else 'neither'} of the keys {' and '.join(keys)}")
    return record[present[0]]


def _make_entry(table: str, where: str, value: Any) -> CaptionEntry:
    captions = value if isinstance(value, list) else [value]
    if captions and all(is_text(caption) for caption in captions):
        return CaptionEntry(table, tuple(captions))
    return CaptionEntry(table, problem=CaptionError(f"{where} is neither a text nor a list of texts"))


def is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON may hold halves of characters."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _merge(first: CaptionEntry, second: CaptionEntry) -> CaptionEntry:
    """Two entries of one file: lines of one table add up, two tables contradict each other."""
    if first.problem is not None:
        return first
    if second.problem is not None:
        return second
    if first.table != second.table:
        reason = f"it has entries in both {first.table} and {second.table}; keep one of them"
        return CaptionEntry(first.table, problem=CaptionError(reason, "caption_conflict"))
    return CaptionEntry(first.table, first.captions + second.captions)


def orphan_captions(folder: Path, entries: Iterable[Path]) -> list[str]:
    """A warning where caption files of a folder belong to none of its other entries: perhaps a name is mistyped."""
    stems = {entry.stem for entry in entries}
    orphans = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix.lower() == SIDECAR_SUFFIX
        and not path.name.startswith(".")
        and (path.stem not in stems or path.suffix != SIDECAR_SUFFIX)
    )
    if not orphans:
        return []
    more = f" and {len(orphans) - 1} more" if len(orphans) > 1 else ""
    return [
        f"{folder / orphans[0]}{more}: a caption file without an image or video of its name; it is not used"
    ]
