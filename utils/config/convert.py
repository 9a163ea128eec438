"""One TOML value -> one Python value of the declared type, or the reason why not.

Nothing is guessed: `true` is no integer, `4.0` is no integer, `"8"` is no number. An integer stands for a number,
because TOML writers leave the `.0` out.
"""

import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from utils.config.introspect import describe_bounds, describe_kind, element_kind, is_either

_MAX_SHOWN = 60
_INT64 = range(-(2**63), 2**63)
_COMPARE = {
    "ge": lambda value, limit: value >= limit,
    "gt": lambda value, limit: value > limit,
    "le": lambda value, limit: value <= limit,
    "lt": lambda value, limit: value < limit,
}


class RefusedError(Exception):
    """A value that does not fit its key: the reason and, where there is one, the way out."""

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.fix = fix


def convert(kind: Any, raw: Any, bounds: Mapping[str, float], *, may_be_blank: bool = True) -> Any:
    """Check `raw` against a type and bounds and return it in that type (lists become tuples, integers floats).

    Args:
        kind: bool, int, float, str, a Literal of strings and truth values, a tuple of one of these (also nested), or a
            number or else one of some words.
        raw: what the TOML holds.
        bounds: limits by name (ge, gt, le, lt), applied to each element of a list.
        may_be_blank: whether an empty or all-space string is a value.

    Raises:
        RefusedError: with a reason that names the expected type or range and shows the value.
    """
    if get_origin(kind) is Literal:
        return _convert_choice(kind, raw)
    if get_origin(kind) is tuple:
        return _convert_list(kind, raw, bounds)
    if is_either(kind):
        return _convert_either(kind, raw, bounds)
    if kind in (int, float):
        return _convert_number(kind, raw, bounds)
    if not isinstance(raw, kind):
        raise _mistyped(kind, raw)
    if isinstance(raw, str) and "\0" in raw:
        raise RefusedError("holds a NUL character, which no path or caption may", "take it out")
    if isinstance(raw, str) and not may_be_blank and not raw.strip():
        raise RefusedError("must not be blank", "write a value, or take the key out if it is optional")
    return raw


def show(raw: Any) -> str:
    """A TOML value for a message: as one writes it, cut to a readable length."""
    if isinstance(raw, bool):
        text = "true" if raw else "false"
    elif isinstance(raw, str):
        text = f'"{raw}"'
    elif isinstance(raw, dict):
        text = "a table"
    elif isinstance(raw, list) and raw and all(isinstance(item, dict) for item in raw):
        text = "a list of tables"
    elif isinstance(raw, list):
        text = f"[{', '.join(show(item) for item in raw)}]"
    elif isinstance(raw, int) and raw not in _INT64:
        text = "an integer of more than 64 bits"
    else:
        text = str(raw)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def _convert_choice(kind: Any, raw: Any) -> str | bool:
    choices = get_args(kind)
    # By type too: in Python 1 equals True.
    for choice in choices:
        if type(choice) is type(raw) and choice == raw:
            return raw
    if bool in map(type, choices) and (hint := _hint(bool, raw)):
        raise RefusedError(f"must be {describe_kind(kind)}, not {show(raw)}", hint)
    close = get_close_matches(str(raw).lower(), [word for word in choices if isinstance(word, str)], n=1)
    raise RefusedError(
        f"must be {describe_kind(kind)}, not {show(raw)}", f'did you mean "{close[0]}"?' if close else ""
    )


def _convert_list(kind: Any, raw: Any, bounds: Mapping[str, float]) -> tuple[Any, ...]:
    if not isinstance(raw, list):
        raise _mistyped(kind, raw)
    items = []
    for index, item in enumerate(raw):
        try:
            items.append(convert(element_kind(kind), item, bounds, may_be_blank=False))
        except RefusedError as error:
            raise RefusedError(f"element {index + 1} {error.reason}", error.fix) from None
    return tuple(items)


def _convert_either(kind: Any, raw: Any, bounds: Mapping[str, float]) -> Any:
    number, words = get_args(kind)
    if isinstance(raw, str) and raw in get_args(words):
        return raw
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise RefusedError(f"must be {describe_kind(kind)}, not {show(raw)}", _hint(number, raw))
    return _convert_number(number, raw, bounds)


def _convert_number(kind: Any, raw: Any, bounds: Mapping[str, float]) -> int | float:
    if isinstance(raw, bool) or not isinstance(raw, int if kind is int else (int, float)):
        raise _mistyped(kind, raw)
    if isinstance(raw, int) and raw not in _INT64:
        raise RefusedError("is larger than a 64-bit integer", "write a smaller number")
    value: int | float = kind(raw)
    if not math.isfinite(value):
        raise RefusedError(f"must be a finite number, not {show(raw)}")
    if not all(_COMPARE[name](value, limit) for name, limit in bounds.items()):
        raise RefusedError(f"must be {describe_bounds(bounds)}, not {show(raw)}")
    return value


def _mistyped(kind: Any, raw: Any) -> RefusedError:
    return RefusedError(f"must be {describe_kind(kind)}, not {show(raw)}", _hint(kind, raw))


def _hint(kind: Any, raw: Any) -> str:
    """How the value is probably meant, for the slips that people really make."""
    if kind is bool and isinstance(raw, str) and raw.lower() in ("true", "false"):
        return f"write {raw.lower()}, in lower case and without quotes"
    if kind in (int, float) and isinstance(raw, str) and raw.strip().isdecimal():
        return f"write {raw.strip()}, without quotes"
    if kind is int and isinstance(raw, float) and raw.is_integer():
        return f"write {int(raw)}"
    if get_origin(kind) is tuple and not isinstance(raw, dict):
        return f"write [{show(raw)}]"
    return ""
