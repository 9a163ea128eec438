"""What the schema's record classes say about their keys: the one reader of `option` metadata and type hints.

The strict parser, the diagnosis of misplaced keys and the generated reference all work from these records, so a key
added to the schema is checked and documented without another line of code.
"""

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_SCALAR_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
_PLURALS = {bool: "of true or false", int: "of integers", float: "of numbers", str: "of strings"}


@dataclass(frozen=True)
class Key:
    """One key of a table. `kind` is its type without `| None`; `table` the record class of a (list of) table(s).

    `shorthand` is the key inside such a table that a plain string stands for.
    """

    name: str
    kind: Any
    default: Any
    help: str
    alias: str | None
    bounds: Mapping[str, float]
    table: type | None
    is_array: bool
    shorthand: str | None = None
    may_be_blank: bool = False

    @property
    def is_required(self) -> bool:
        """True where the file must give the key."""
        return self.default is MISSING

    @property
    def draft(self) -> Any:
        """What stands in for the key while its given value is unusable."""
        return None if self.is_required else self.default


@dataclass(frozen=True)
class Section:
    """One table of a document: dotted path ("" is the top level), record class, and whether it is `[[repeated]]`."""

    path: str
    record: type
    is_array: bool

    @property
    def title(self) -> str:
        """The header as one writes it in TOML; empty for the top level."""
        if not self.path:
            return ""
        return f"[[{self.path}]]" if self.is_array else f"[{self.path}]"


@cache
def keys_of(record: type) -> dict[str, Key]:
    """The keys of a record class by name, in the order of declaration."""
    hints = get_type_hints(record)
    return {field.name: _read_key(field, hints[field.name]) for field in dataclasses.fields(record)}


def sections_of(record: type, path: str = "", is_array: bool = False) -> tuple[Section, ...]:
    """The table `record` describes and every table below it, outermost first."""
    found = [Section(path, record, is_array)]
    for key in keys_of(record).values():
        if key.table is not None:
            found += sections_of(key.table, dotted(path, key.name), key.is_array)
    return tuple(found)


def dotted(prefix: str, name: str) -> str:
    """`prefix.name`, or just `name` at the top level."""
    return f"{prefix}.{name}" if prefix else name


def describe_kind(kind: Any) -> str:
    """A type in words: "an integer", "a list of numbers", "one of "warn", "stop""."""
    if kind in _SCALAR_NAMES:
        return _SCALAR_NAMES[kind]
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(_choice, get_args(kind)))
    if is_either(kind):
        number, words = get_args(kind)
        return f"{_SCALAR_NAMES[number]}, or {', '.join(map(_choice, get_args(words)))}"
    if get_origin(kind) is tuple:
        return f"a list {_plural(get_args(kind)[0])}"
    return "a table"


def is_either(kind: Any) -> bool:
    """Whether a type is a number or else one of some words: `float | Literal["auto"]`."""
    return get_origin(kind) in (Union, types.UnionType)


def _choice(choice: str | bool) -> str:
    """A choice as one writes it in TOML."""
    return f'"{choice}"' if isinstance(choice, str) else str(choice).lower()


def describe_bounds(bounds: Mapping[str, float]) -> str:
    """Bounds in words: "at least 0 and less than 1"; empty without bounds."""
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    return " and ".join(f"{words[name]} {_plain(limit)}" for name, limit in bounds.items())


def _plain(limit: float) -> str:
    """A limit as one would write it: 8192, 0.05, 1."""
    return str(int(limit)) if float(limit).is_integer() else str(limit)


def element_kind(kind: Any) -> Any:
    """The type of a list's elements."""
    return get_args(kind)[0]


def _read_key(field: "dataclasses.Field[Any]", hint: Any) -> Key:
    kind = _without_none(hint)
    is_array = get_origin(kind) is tuple and dataclasses.is_dataclass(get_args(kind)[0])
    inner = get_args(kind)[0] if is_array else kind
    return Key(
        name=field.name,
        kind=kind,
        default=field.default,
        help=field.metadata["help"],
        alias=field.metadata["alias"],
        bounds=field.metadata["bounds"],
        table=inner if dataclasses.is_dataclass(inner) and isinstance(inner, type) else None,
        is_array=is_array,
        shorthand=field.metadata["shorthand"],
        may_be_blank=field.metadata["may_be_blank"],
    )


def _without_none(hint: Any) -> Any:
    if not is_either(hint):
        return hint
    kinds = tuple(part for part in get_args(hint) if part is not type(None))
    return kinds[0] if len(kinds) == 1 else hint


def _plural(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"of lists {_plural(get_args(kind)[0])}"
    return _PLURALS.get(kind, f"of {describe_kind(kind)}")
