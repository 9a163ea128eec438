"""Globs over module paths: which modules an adapter goes on.

A pattern is matched against the whole module path within a block (`cross_attn.k`). `*`, `?` and `[kv]` work as in a
shell, `*` crosses dots, and `{a,b}` expands first. Nothing here knows a model: the paths come from the caller.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from utils.errors import UserError


def expand_braces(pattern: str) -> tuple[str, ...]:
    """Every pattern that `{a,b}` groups stand for, left to right; groups may be nested.

    Raises:
        UserError: a brace without its partner, or an empty group.
    """
    start = pattern.find("{")
    if start < 0:
        if "}" in pattern:
            raise UserError(f'"{pattern}": }} without {{; write groups as {{a,b}}')
        return (pattern,)
    if "}" in pattern[:start]:
        raise UserError(f'"{pattern}": }} without {{; write groups as {{a,b}}')
    choices, end = _split_group(pattern, start)
    head, tail = pattern[:start], pattern[end + 1 :]
    expanded = [head + choice + rest for choice in choices for rest in expand_braces(tail)]
    return tuple(dict.fromkeys(final for one in expanded for final in expand_braces(one)))


def matches(pattern: str, path: str) -> bool:
    """Whether `pattern` (braces allowed) matches the whole of `path`."""
    return any(fnmatchcase(path, glob) for glob in expand_braces(pattern))


def select(paths: Sequence[str], include: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """The `paths` that an include pattern matches and no exclude pattern does, in the order of `paths`.

    Raises:
        UserError: a pattern (each alternative of a `{a,b}` counts) matches nothing, or nothing is left.
    """
    for key, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            _check_matches_something(key, pattern, paths)
    chosen = [path for path in paths if _any_matches(include, path) and not _any_matches(exclude, path)]
    if not chosen:
        raise UserError(
            f"adapter: include {list(include)} and exclude {list(exclude)} leave no module to adapt"
        )
    return chosen


def split_block(path: str) -> tuple[int | None, str]:
    """`blocks.3.self_attn.q` -> (3, `self_attn.q`); (None, path) for a path outside the blocks."""
    first, _, rest = path.partition(".")
    number, _, inner = rest.partition(".")
    if first == "blocks" and number.isdecimal() and inner:
        return int(number), inner
    return None, path


def _split_group(pattern: str, start: int) -> tuple[list[str], int]:
    """The top-level choices of the group that opens at `start`, and where it closes."""
    depth, choices = 0, [""]
    for position in range(start, len(pattern)):
        sign = pattern[position]
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if depth == 0:
            if "" in choices:
                raise UserError(f'"{pattern}": an empty choice in {{...}}; write groups as {{a,b}}')
            return choices, position
        if depth == 1 and sign == ",":
            choices.append("")
        elif position > start:
            choices[-1] += sign
    raise UserError(f'"{pattern}": {{ without }}; write groups as {{a,b}}')


def _any_matches(patterns: Sequence[str], path: str) -> bool:
    return any(matches(pattern, path) for pattern in patterns)


def _check_matches_something(key: str, pattern: str, paths: Sequence[str]) -> None:
    for glob in expand_braces(pattern):
        if not any(fnmatchcase(path, glob) for path in paths):
            part = f' ("{glob}")' if glob != pattern else ""
            known = ", ".join(paths) if len(paths) <= 16 else f"{', '.join(paths[:16])}, ..."
            raise UserError(
                f'adapter.{key}: pattern "{pattern}"{part} matches no module; the modules are {known}'
            )
