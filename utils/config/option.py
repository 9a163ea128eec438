"""Declaring a key of the configuration: the one place that says which facts a key has beside its type."""

from dataclasses import MISSING, field
from typing import Any


def option(
    help: str,
    default: Any = MISSING,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    alias: str | None = None,
    shorthand: str | None = None,
    may_be_blank: bool | None = None,
) -> Any:
    """Declare a config key: help text, default (none = required) and bounds (of each element, for lists).

    Literal types give the choices. A string may be blank only where its default is, or where `may_be_blank` says so. In a
    list of tables, a plain string stands for a table with that string under the key `shorthand`.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {
        "help": help,
        "alias": alias,
        "shorthand": shorthand,
        "may_be_blank": default == "" if may_be_blank is None else may_be_blank,
        "bounds": {k: v for k, v in bounds.items() if v is not None},
    }
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)
