"""`--set a.b=VALUE` on the command line: values put into the parsed TOML before it is checked.

VALUE is read as a TOML value (`8`, `true`, `[20, 29]`, `"text"`); what is none is a plain string, so paths need no
quotes.
"""

import copy
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.config.schema import Problem

FLAG = "--set"
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Overridden:
    """The table with the overrides in it, the problems, and the dotted keys that were set."""

    table: dict[str, Any]
    problems: tuple[Problem, ...]
    keys: frozenset[str]


def apply_overrides(table: Mapping[str, Any], overrides: Sequence[str]) -> Overridden:
    """Put every `a.b=VALUE` of `overrides` into a copy of `table`, the last one winning; tables are made as needed.

    Keys inside lists of tables and keys of the dataset TOML cannot be overridden. Each override that cannot be
    applied is a problem and changes nothing.
    """
    changed = copy.deepcopy(dict(table))
    problems: list[Problem] = []
    keys: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        problem = _check_key(override, key, bool(equals)) or _put(changed, key, parse_value(text))
        if problem is None:
            keys.add(key)
        else:
            problems.append(problem)
    return Overridden(changed, tuple(problems), frozenset(keys))


def parse_value(text: str) -> Any:
    """Read `text` as a TOML value; what is none is itself, as a string."""
    try:
        document = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    # A line break in the text could smuggle in further keys; such a text is no TOML value.
    return document["value"] if len(document) == 1 else text


def _check_key(override: str, key: str, has_equals: bool) -> Problem | None:
    if not has_equals or not key:
        return Problem(f'"{override}"', "is no override", "write key=value, e.g. adapter.rank=8", FLAG)
    if "[" in key:
        return _inside_list(key)
    if not all(_BARE_KEY.fullmatch(part) for part in key.split(".")):
        reason = "is no dotted key"
        return Problem(
            f'"{key}"', reason, "write names of letters, digits and _ joined by dots, e.g. adapter.rank", FLAG
        )
    return None


def _put(table: dict[str, Any], key: str, value: Any) -> Problem | None:
    *parents, name = key.split(".")
    # The path is walked before anything is made, so that a refused override leaves nothing behind.
    node: Any = table
    for depth, parent in enumerate(parents):
        node = node.get(parent, {})
        if not isinstance(node, dict):
            return _not_a_table(key, ".".join(parents[: depth + 1]), node)
    for parent in parents:
        table = table.setdefault(parent, {})
    table[name] = value
    return None


def _not_a_table(key: str, parent: str, value: Any) -> Problem:
    if parent == "dataset":
        reason = "dataset names a TOML file of its own, whose keys cannot be overridden"
        return Problem(key, reason, f"edit that file, or name another one with {FLAG} dataset=FILE", FLAG)
    if isinstance(value, list):
        return _inside_list(key)
    return Problem(
        key,
        f"{parent} is a value, not a table, so there is nothing below it",
        f"{FLAG} {parent}=VALUE sets it",
        FLAG,
    )


def _inside_list(key: str) -> Problem:
    return Problem(
        key,
        "values inside a list cannot be overridden one by one",
        "set the whole list, or edit the file",
        FLAG,
    )
