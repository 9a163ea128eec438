"""The reports below a reports directory, read from their `summary.json`: listing them, and holding some side by side."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.report_markdown import format_value, one_line
from utils.report_summary import SUMMARY_NAME, Summary, read_summary

_HEADLINE_CHARACTERS = 90
_CELL_CHARACTERS = 40
# Whole numbers beyond it have no float, so no relative change.
_LARGEST = 10**300


@dataclass(frozen=True)
class Found:
    """All reports that could be read, oldest first, and a line about each that could not."""

    summaries: tuple[Summary, ...]
    damaged: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """One value in each report: None where a report does not have it."""

    name: str
    values: tuple[Any, ...]

    @property
    def differs(self) -> bool:
        """Whether not all values are equal. A truth value is not a number here."""
        return any(
            type(value) is not type(self.values[0]) or value != self.values[0] for value in self.values
        )


def find_reports(reports_dir: Path, tool: str | None = None) -> Found:
    """Read every `<tool>/<run_tag>/summary.json` below `reports_dir`.

    Args:
        tool: this tool's reports alone.

    Raises:
        UserError: the directory is not there, or holds no folder of that tool.
        OSError: a folder in it may not be read.
    """
    reports_dir = Path(reports_dir)
    if not reports_dir.is_dir():
        raise UserError(f"{reports_dir}: no such directory; check --reports_dir")
    if tool is not None and not (Path(tool).name == tool and (reports_dir / tool).is_dir()):
        there = sorted({path.parent.parent.name for path in reports_dir.glob(f"*/*/{SUMMARY_NAME}")})
        known = f"there are reports of {', '.join(there)}" if there else "there are no reports at all"
        raise UserError(f"{reports_dir}: holds no reports of {tool!r} ({known}); check --tool")
    summaries, damaged = [], []
    folders = [reports_dir / tool] if tool is not None else sorted(reports_dir.iterdir())
    # Not a glob, which passes over what may not be read.
    for directory in sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir()):
        # What begins with a dot is a report that is being written, or whose writer was killed.
        if not directory.is_dir() or directory.name.startswith("."):
            continue
        try:
            summaries.append(_read_in_place(directory))
        except UserError as error:
            damaged.append(one_line(str(error)))
    return Found(
        tuple(sorted(summaries, key=lambda one: (one.created, one.tool, one.run_tag))), tuple(damaged)
    )


def choose_report(reports_dir: Path, name: str) -> Summary:
    """The report that `name` means: a report's directory or its summary.json, `tool/run_tag`, or a run tag that only one
    tool has.

    Raises:
        UserError: there is none, several fit, or it is damaged.
    """
    path = Path(name)
    if (path / SUMMARY_NAME).is_file() or path.name == SUMMARY_NAME:
        return read_summary(path)
    inside = Path(reports_dir) / name
    if inside.is_dir() and len(path.parts) == 2 and ".." not in path.parts:
        return read_summary(inside)
    fitting = sorted(one for one in Path(reports_dir).glob("*/*") if one.is_dir() and one.name == name)
    if len(fitting) == 1:
        return read_summary(fitting[0])
    if fitting:
        names = ", ".join(f"{one.parent.name}/{one.name}" for one in fitting)
        raise UserError(f"{name}: several tools have a report of this name ({names}); say which")
    raise UserError(
        f"{name}: no such report in {reports_dir}; name it as tool/run_tag, as its directory, or by a run_tag that only one "
        "tool has"
    )


def list_rows(summaries: Sequence[Summary]) -> list[list[str]]:
    """Columns created, tool, run_tag, verdict, headline; the latter cut."""
    return [
        [one.created, one.tool, one.run_tag, one.verdict, _cut(one.explanation, _HEADLINE_CHARACTERS)]
        for one in summaries
    ]


def compare_metrics(summaries: Sequence[Summary]) -> list[Line]:
    """Every metric of any of the reports, tables under dotted names and lists by position, in the order of the first."""
    return _lines([_flat(one.metrics) for one in summaries])


def compare_caps(summaries: Sequence[Summary]) -> list[Line]:
    """Every cap."""
    return _lines([one.caps for one in summaries])


def compare_versions(summaries: Sequence[Summary]) -> list[Line]:
    """Versions that are not the same everywhere."""
    return [line for line in _lines([one.versions for one in summaries]) if line.differs]


def compare_inputs(summaries: Sequence[Summary]) -> list[Line]:
    """Inputs whose content is not the same everywhere, by role; a value is `path (fingerprint)`.

    Files of one role are told apart by their place among them. The same content under another path is no difference.
    """
    tables, prints = [], []
    for one in summaries:
        places: dict[str, int] = {}
        shown, known = {}, {}
        for entry in one.inputs:
            places[entry.role] = places.get(entry.role, 0) + 1
            number = places[entry.role]
            name = entry.role if number == 1 else f"{entry.role} {number}"
            shown[name] = f"{_tail(entry.path)} ({entry.fingerprint[:8]})"
            known[name] = entry.fingerprint
        tables.append(shown)
        prints.append(known)
    differing = {line.name for line in _lines(prints) if line.differs}
    return [line for line in _lines(tables) if line.name in differing]


def change(first: Any, other: Any) -> tuple[str, str]:
    """Absolute and relative change of two numbers, as text; empty where they are not numbers, or the first is 0."""
    if not (_is_number(first) and _is_number(other)):
        return "", ""
    difference = other - first
    if difference == 0:
        return "0", ""
    absolute = f"{difference:+d}" if isinstance(difference, int) else f"{difference:+.4g}"
    return absolute, f"{difference / abs(first):+.2%}" if first else ""


def comparison_rows(lines: Sequence[Line]) -> list[list[str]]:
    """A row per line: name, the values, and with two reports the absolute and the relative change."""
    rows = []
    for line in lines:
        row = [line.name, *(_cell(value) for value in line.values)]
        rows.append(row + list(change(*line.values)) if len(line.values) == 2 else row)
    return rows


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to one width, two spaces between them."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _read_in_place(directory: Path) -> Summary:
    """A report whose own words agree with where it lies.

    Raises:
        UserError: it is damaged, or is one of another tool or name.
    """
    summary = read_summary(directory)
    if (summary.tool, summary.run_tag) != (directory.parent.name, directory.name):
        raise UserError(
            f"{directory / SUMMARY_NAME}: says that it is {summary.tool}/{summary.run_tag}; it was moved or copied by hand"
        )
    return summary


def _lines(tables: Sequence[Mapping[str, Any]]) -> list[Line]:
    names = dict.fromkeys(name for table in tables for name in table)
    return [Line(name, tuple(table.get(name) for table in tables)) for name in names]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Single values by dotted name. A table in a list that has a name is called by it, so that order does not matter."""
    if isinstance(value, Mapping):
        pairs = [(str(key), entry) for key, entry in value.items()]
    elif isinstance(value, list) and any(isinstance(entry, (Mapping, list)) for entry in value):
        pairs = [(_entry_name(entry, index), entry) for index, entry in enumerate(value)]
    else:
        return {name: ", ".join(map(str, value)) if isinstance(value, list) else value}
    found: dict[str, Any] = {}
    for key, entry in pairs:
        found |= _flat(entry, f"{name}.{key}" if name else key)
    return found


def _entry_name(entry: Any, index: int) -> str:
    name = entry.get("name") if isinstance(entry, Mapping) else None
    return name if isinstance(name, str) else str(index)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= _LARGEST if isinstance(value, int) else math.isfinite(value)


def _cell(value: Any) -> str:
    return "-" if value is None else _cut(one_line(format_value(value)), _CELL_CHARACTERS)


def _tail(path: str) -> str:
    """The end of a long path, which is what tells paths apart."""
    limit = _CELL_CHARACTERS - len(" (12345678)")
    return path if len(path) <= limit else "..." + path[3 - limit :]


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
