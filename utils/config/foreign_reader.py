"""A document of another trainer while it is read: its tables, what becomes of its keys, and what there is to say."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from utils.config.foreign_keys import ANY_VALUE, ForeignKey
from utils.config.parse import Parsed
from utils.config.schema import Problem

CLIP_MODE = "video_clip_mode"


@dataclass(frozen=True)
class Translated:
    """A table in our words, what there is to say about it, and the keys of ours that a problem stands for.

    `clip_mode` is `video_clip_mode` where the training TOML has it; the caller holds it against the dataset TOML.
    """

    table: dict[str, Any]
    notes: tuple[Problem, ...]
    problems: tuple[Problem, ...]
    invalid: frozenset[str]
    clip_mode: Any = None

    @property
    def came_from_elsewhere(self) -> bool:
        """Whether the document has keys of another trainer."""
        return bool(self.notes or self.problems) or self.clip_mode is not None

    def completed(self, parsed: Parsed[Any]) -> Parsed[Any]:
        """What the schema found in `table`, with what was found here before it."""
        return replace(
            parsed,
            problems=(*self.problems, *parsed.problems),
            invalid=parsed.invalid | self.invalid,
            notes=self.notes,
        )


class ForeignReader:
    """One document while it is translated."""

    def __init__(self, table: Mapping[str, Any], file: str) -> None:
        self.table: dict[str, Any] = copy.deepcopy(dict(table))
        self._file = file
        self._notes: dict[tuple[str, str], list[str]] = {}
        self._problems: list[Problem] = []
        self._invalid: set[str] = set()

    @property
    def has_said_something(self) -> bool:
        """Whether the document came from elsewhere, by what was found in it."""
        return bool(self._notes or self._problems) or CLIP_MODE in self.table

    def result(self, clip_mode: Any = None) -> Translated:
        """The document in our words, and all that was said about it."""
        # Keys with one reason share a line.
        notes = tuple(
            Problem(", ".join(dict.fromkeys(keys)), reason, fix, self._file)
            for (reason, fix), keys in self._notes.items()
        )
        return Translated(self.table, notes, tuple(self._problems), frozenset(self._invalid), clip_mode)

    def section(self, name: str) -> dict[str, Any]:
        """A table of the document; an empty one where it is missing or no table."""
        found = self.table.get(name)
        return found if isinstance(found, dict) else {}

    def note(self, key: str, reason: str, fix: str = "") -> None:
        """Say something about a key that is taken."""
        self._notes.setdefault((reason, fix), []).append(key)

    def refuse(self, key: str, reason: str, fix: str, stands_for: str | None = None) -> None:
        """Report a problem; `stands_for` is the key of ours whose value is not usable for it."""
        self._problems.append(Problem(key, reason, fix, self._file))
        if stands_for is not None:
            self.disregard(stands_for)

    def disregard(self, *keys: str) -> None:
        """Rules that read these keys of ours stay silent."""
        self._invalid.update(keys)

    def tables_at(
        self, parents: Iterable[str], with_top: bool = False
    ) -> Iterable[tuple[str, str, dict[str, Any]]]:
        """The tables of the document: name with `[]`, what precedes a key in messages, and the table."""
        if with_top:
            yield "", "", self.table
        for parent in parents:
            found = self.table.get(parent.removesuffix("[]"))
            if isinstance(found, dict) and not parent.endswith("[]"):
                yield parent, f"{parent}.", found
            elif isinstance(found, list) and parent.endswith("[]"):
                for index, one in enumerate(found):
                    if isinstance(one, dict):
                        yield parent, f"{parent[:-2]}[{index}].", one

    def drop_foreign(self, keys: Iterable[ForeignKey]) -> None:
        """Take every key of `keys` out of the document and say what it means here."""
        known = {key.key: key for key in keys}
        parents = dict.fromkeys(name.rpartition(".")[0] for name in known if "." in name)
        for parent, prefix, table in self.tables_at(parents, with_top=True):
            for name in list(table):
                key = known.get(f"{parent}.{name}" if parent else name)
                if key is None:
                    continue
                if key.is_idle(table.pop(name)):
                    # Nothing need be done about a value that says nothing.
                    fix = key.fix if key.idle is ANY_VALUE else ""
                    self.note(f"{prefix}{name}", f"has no effect here: {key.here}", fix)
                else:
                    self.refuse(f"{prefix}{name}", f"does not exist here: {key.here}", key.fix)
        for parent in parents:
            # A section of theirs alone is gone with its keys.
            if self.table.get(parent) == {} and parent == "monitoring":
                del self.table[parent]
