"""The text of `report.md` and `INDEX.md`: Markdown from plain records. Nothing here touches the disk."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.report_summary import Summary

INDEX_HEADER = (
    "# Reports\n\nOne line per report, oldest first.\n\n"
    "| created | tool | run_tag | verdict | headline |\n| --- | --- | --- | --- | --- |\n"
)


@dataclass(frozen=True)
class Table:
    """A table of a report. `file_name` is its CSV; at most `inline_rows` rows are shown in `report.md`."""

    title: str
    file_name: str
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    inline_rows: int


@dataclass(frozen=True)
class Plot:
    """A picture of a report, as PNG bytes."""

    title: str
    file_name: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """A passage of free Markdown."""

    title: str
    markdown: str


def render_report(
    summary: Summary,
    *,
    meanings: Mapping[str, str],
    sections: Sequence[Section],
    tables: Sequence[Table],
    plots: Sequence[Plot],
    how_to_read: str,
    next_steps: str,
) -> str:
    """The whole of `report.md`.

    Args:
        summary: the numbers; the report repeats those of its metrics that are single values.
        meanings: what a metric tells, by its name (of a cap by `cap: <name>`), for the table of key numbers.
        sections, tables, plots: in the order in which they appear.
        how_to_read, next_steps: Markdown.
    """
    parts = [
        f"# {summary.tool}: {summary.run_tag}",
        f"**Verdict: {summary.verdict.upper()}.** {summary.explanation}",
        _section("Question", summary.question),
        _section("Key numbers", _key_numbers(summary, meanings)),
        *(_section(section.title, section.markdown) for section in sections),
        *(_section(table.title, _inline_table(table)) for table in tables),
        *(_section(plot.title, f"![{plot.title}]({plot.file_name})") for plot in plots),
        _section("How to read it", how_to_read),
        _section("What to do next", next_steps),
        _section("Inputs", _inputs(summary)),
        _section("Made with", _provenance(summary)),
    ]
    if summary.notes:
        parts.append(_section("Notes", "\n".join(f"- {one_line(note)}" for note in summary.notes)))
    return "\n\n".join(parts) + "\n"


def index_line(summary: Summary) -> str:
    """The line of one report in `INDEX.md`, newline-terminated."""
    link = f"[{summary.run_tag}]({summary.tool}/{summary.run_tag}/report.md)"
    return f"{_row((summary.created, summary.tool, link, summary.verdict, summary.explanation))}\n"


def format_value(value: Any) -> str:
    """A value as a table shows it: four significant digits, `n/a` for what is missing or not finite."""
    if value is None or (isinstance(value, float) and value != value):
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:#.4g}" if value and abs(value) < 1e4 else f"{value:.4g}"
    return str(value)


def one_line(text: str) -> str:
    """The text without line breaks, so that it cannot break a list or a table."""
    return " ".join(text.split())


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, cells formatted by `format_value`."""
    return "\n".join([_row(columns), _row(["---"] * len(columns)), *(_row(row) for row in rows)])


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(one_line(format_value(cell)).replace("|", "\\|") for cell in cells) + " |"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body.strip()}"


def _key_numbers(summary: Summary, meanings: Mapping[str, str]) -> str:
    rows = [(f"cap: {name}", cap, meanings.get(f"cap: {name}", "")) for name, cap in summary.caps.items()]
    rows += [(name, value, meanings.get(name, "")) for name, value in _single_values(summary.metrics)]
    return markdown_table(("name", "value", "what it is"), rows) if rows else "None."


def _single_values(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Metrics that are one value, those of nested tables under dotted names; lists stay in `summary.json`."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _single_values(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            yield f"{prefix}{name}", value


def _inline_table(table: Table) -> str:
    shown = table.rows[: table.inline_rows]
    count = "1 row" if len(table.rows) == 1 else f"{len(table.rows)} rows"
    text = f"{count}; the whole table is [{table.file_name}]({table.file_name})."
    if not shown:
        return text
    if len(shown) < len(table.rows):
        text = f"The first {len(shown)} of {text}"
    return (
        text
        + "\n\n"
        + markdown_table(table.columns, [[row.get(name) for name in table.columns] for row in shown])
    )


def _inputs(summary: Summary) -> str:
    if not summary.inputs:
        return "None."
    rows = [
        (entry.role, f"`{entry.path}`", entry.size_bytes, f"`{entry.fingerprint}`")
        for entry in summary.inputs
    ]
    return markdown_table(("role", "path", "bytes", "fingerprint"), rows)


def _provenance(summary: Summary) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in summary.versions.items())
    seed = "nothing random" if summary.seed is None else f"seed {summary.seed}"
    return f"{summary.created}; {seed}; {versions}."
