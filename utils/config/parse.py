"""A TOML table -> a frozen record, strictly, with every problem collected.

Unknown, misplaced, mistyped, missing and out-of-range keys are all reported. So that rules over several keys can
still be checked when one key is wrong, the result holds a draft in which unusable keys have their default (None where
there is none), and the list of those keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from utils.config.convert import RefusedError, convert, show
from utils.config.introspect import Key, dotted, keys_of
from utils.config.schema import Problem
from utils.config.unknown import KeyIndex

T = TypeVar("T")


@dataclass(frozen=True)
class Parsed(Generic[T]):
    """What became of a document: the record in draft, the problems, and the dotted keys without a usable value.

    `notes` are what there is to say of keys that are taken, though they are none of ours.
    """

    draft: T
    problems: tuple[Problem, ...]
    invalid: frozenset[str]
    notes: tuple[Problem, ...] = ()

    @property
    def value(self) -> T | None:
        """The record, or None if there is any problem."""
        return None if self.problems else self.draft


def parse_table(
    record: type[T], table: Mapping[str, Any], *, file: str = "", others: Mapping[str, type] | None = None
) -> Parsed[T]:
    """Read `table` as the record class `record`.

    Args:
        record: a dataclass of `utils.config.schema`.
        table: a parsed TOML document.
        file: where the table comes from, for the problems.
        others: record classes of companion documents by their name in messages, to recognise keys that belong there.
    """
    reader = _Reader(KeyIndex(record, others or {}), file)
    draft = reader.read(record, table, "")
    return Parsed(draft, tuple(reader.all_problems()), frozenset(reader.invalid))


class _Reader:
    """Walks one document and collects what is wrong with it."""

    def __init__(self, index: KeyIndex, file: str) -> None:
        self._index = index
        self._file = file
        self._problems: list[Problem] = []
        self._missing: dict[str, Problem] = {}
        self._meant: set[str] = set()
        self.invalid: set[str] = set()

    def all_problems(self) -> list[Problem]:
        """The problems, without "missing" for keys that a misspelt or misplaced key already stands for."""
        return self._problems + [problem for key, problem in self._missing.items() if key not in self._meant]

    def read(self, record: type, table: Mapping[str, Any], prefix: str) -> Any:
        keys = keys_of(record)
        aliases = {key.alias: key.name for key in keys.values() if key.alias}
        given: dict[str, str] = {}
        for name in table:
            canonical = aliases.get(name, name)
            if canonical not in keys:
                self._report_unknown(name, record, prefix)
            elif canonical in given:
                self._report_twice(given[canonical], name, dotted(prefix, canonical), prefix)
            else:
                given[canonical] = name
        values: dict[str, Any] = {}
        for name, key in keys.items():
            if name in given:
                values[name] = self._read_key(
                    key, table[given[name]], dotted(prefix, given[name]), dotted(prefix, name)
                )
            else:
                values[name] = key.draft
                if key.is_required:
                    self._report_missing(key, dotted(prefix, name))
        return record(**values)

    def _read_key(self, key: Key, raw: Any, written: str, canonical: str) -> Any:
        if key.table is not None:
            return self._read_table(key, key.table, raw, canonical)
        try:
            return convert(key.kind, raw, key.bounds, may_be_blank=key.may_be_blank)
        except RefusedError as error:
            self._report(written, error.reason, error.fix, invalid=canonical)
            return key.draft

    def _read_table(self, key: Key, record: type, raw: Any, where: str) -> Any:
        if key.is_array:
            if key.shorthand is not None and isinstance(raw, list):
                raw = [{key.shorthand: item} if isinstance(item, str) else item for item in raw]
            if isinstance(raw, list) and all(isinstance(item, dict) for item in raw):
                return tuple(self.read(record, item, f"{where}[{index}]") for index, item in enumerate(raw))
            self._report(
                where,
                f"must be a list of tables, not {show(raw)}",
                f"head each with [[{where}]]",
                invalid=where,
            )
        elif isinstance(raw, dict):
            return self.read(record, raw, where)
        else:
            self._report(where, f"must be a table, not {show(raw)}", f"head it with [{where}]", invalid=where)
        return key.draft

    def _report(self, key: str, reason: str, fix: str, invalid: str) -> None:
        self._problems.append(Problem(key, reason, fix, self._file))
        self.invalid.add(invalid)

    def _report_unknown(self, name: str, record: type, prefix: str) -> None:
        diagnosis = self._index.diagnose(name, record, prefix)
        self._problems.append(Problem(dotted(prefix, name), "unknown key", diagnosis.fix, self._file))
        # What was meant is as good as invalid: rules about it would only repeat the complaint.
        self._meant.update(diagnosis.meant)
        self.invalid.update(diagnosis.meant)

    def _report_twice(self, first: str, second: str, canonical: str, prefix: str) -> None:
        reason = f"{first} and {second} are two names of one key"
        self._report(dotted(prefix, second), reason, "keep one of them", invalid=canonical)

    def _report_missing(self, key: Key, where: str) -> None:
        if key.table is None:
            problem = Problem(
                where, "missing; it has no default", f"{key.help} Add {key.name} = ...", self._file
            )
        else:
            header = f"[[{where}]]" if key.is_array else f"[{where}]"
            needed = ", ".join(name for name, inner in keys_of(key.table).items() if inner.is_required)
            problem = Problem(where, "missing", f"add a {header} section with {needed}", self._file)
        self._missing[where] = problem
        self.invalid.add(where)
