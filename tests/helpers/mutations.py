"""Configurations with one thing wrong, or at least changed."""

import copy
import random


def _tables(document: dict) -> list[dict]:
    """The document and every table in it, also those in lists."""
    found = [document]
    for value in document.values():
        children = value if isinstance(value, list) else [value]
        for child in children:
            if isinstance(child, dict):
                found += _tables(child)
    return found


def _misspelt(name: str, rng: random.Random) -> str:
    place = rng.randrange(len(name))
    return rng.choice(
        [
            name[:place] + name[place + 1 :] or "x",
            name[:place] + rng.choice("aeiou_") + name[place:],
            name.upper(),
        ]
    )


def mutate(document: dict, rng: random.Random) -> tuple[dict, str]:
    """The document with one key changed, and what was done."""
    document = copy.deepcopy(document)
    tables = _tables(document)
    table = rng.choice([one for one in tables if one])
    name = rng.choice(list(table))
    value = table[name]
    kind = rng.choice(["delete", "rename", "retype", "range", "move", "negate"])
    if kind == "delete":
        del table[name]
    elif kind == "rename":
        table[_misspelt(name, rng)] = table.pop(name)
    elif kind == "retype":
        table[name] = rng.choice(
            [True, 3, 2.5, "text", "", [], [1], ["a"], [[1]], [{}], {}, {"a": 1}, float("nan")]
        )
    elif kind == "range":
        table[name] = rng.choice(
            [0, -1, 10**9, 2**63 - 1, -(2**63), 1e308, -1e-308, float("inf"), "x" * 5000, [-1], [10**9] * 3]
        )
    elif kind == "move":
        target = rng.choice([one for one in tables if one is not table and one is not value] or [table])
        target[name] = table.pop(name)
    else:
        switches = [(one, key) for one in tables for key, held in one.items() if isinstance(held, bool)]
        one, name = rng.choice(switches) if switches else (table, name)
        one[name] = not one[name]
    return document, f"{kind} {name}"
