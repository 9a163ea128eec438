"""What a rule over a whole configuration is, and running those whose keys are usable."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from utils.config.schema import Problem

_INDEX = re.compile(r"\[\d+\]")


class Rule(NamedTuple):
    """One rule: a check from the configuration to its problems, and the dotted keys that it reads.

    A key inside a list of tables is written with empty brackets: `directory[].path`.

    The first line of the check's docstring is the rule in words, for the reference documentation.
    """

    check: Callable[[Any], list[Problem]]
    keys: tuple[str, ...]

    @property
    def words(self) -> str:
        """The rule in a sentence."""
        return (self.check.__doc__ or "").partition("\n")[0]


def run_rules(
    rules: Iterable[Rule], config: Any, invalid: frozenset[str] = frozenset(), file: str = ""
) -> list[Problem]:
    """The problems of every rule that reads none of the `invalid` keys, with `file` as their place."""
    problems = []
    for rule in rules:
        if not any(_concerns(key, bad) for key in rule.keys for bad in invalid):
            problems += [Problem(found.key, found.reason, found.fix, file) for found in rule.check(config)]
    return problems


def _concerns(key: str, bad: str) -> bool:
    """Whether `bad` is `key`, a table around it or something inside it."""
    bad = _INDEX.sub("[]", bad)
    return key == bad or key.startswith((f"{bad}.", f"{bad}[")) or bad.startswith((f"{key}.", f"{key}["))
