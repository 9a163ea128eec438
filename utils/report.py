"""The one writer of reports: `<reports_dir>/<tool>/<run_tag>/{report.md, summary.json, *.csv, *.png}`.

A report is assembled in a temporary directory and moved, so that none is ever seen half-written, and none is ever
overwritten. `INDEX.md` in the reports directory gets one line for each.
"""

import csv
import fcntl
import io
import math
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.files import atomic_directory, atomic_write_text, disk_errors_as_user_errors, quick_fingerprint
from utils.report_markdown import INDEX_HEADER, Plot, Section, Table, index_line, one_line, render_report
from utils.report_summary import SUMMARY_NAME, InputFile, Summary, Verdict, read_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = [
    "InputFile",
    "Report",
    "Summary",
    "Verdict",
    "check_writable",
    "read_summary",
    "refuse_training_run",
    "utc_run_tag",
]

REPORT_NAME = "report.md"
INDEX_NAME = "INDEX.md"
_PROJECT = "ai-model-sandbox"
_LIBRARIES = ("torch", "numpy", "safetensors", "transformers", "diffusers", "peft", "matplotlib")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,119}")
_PLOT_DPI = 100
_INLINE_ROWS = 20


def utc_run_tag() -> str:
    """The default name of a report: the UTC time to the second, such as `20300131T120000Z`."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


class Report:
    """Collects what a probe finds out, then writes it with `write`.

    Args:
        tool: name of the probe.
        question: what it answers, as one sentence.
        reports_dir: the directory that holds all reports.
        run_tag: name of this report; default a UTC time stamp that is not taken yet.
        seed: the seed of whatever is random, None where nothing is.

    Raises:
        UserError: the name is not usable, the report exists already, or `reports_dir` cannot be written to or lies in a
            training run. This comes before anything is measured, not after.
    """

    def __init__(
        self,
        tool: str,
        question: str,
        reports_dir: Path | str = "reports",
        run_tag: str | None = None,
        seed: int | None = None,
    ) -> None:
        _check_name(tool, "the name of a tool")
        self.reports_dir = Path(reports_dir)
        _check_place(self.reports_dir)
        self.tool = tool
        self.question = question
        self.run_tag = _free_tag(self.reports_dir / tool) if run_tag is None else run_tag
        _check_name(self.run_tag, "--run_tag")
        self.directory = self.reports_dir / tool / self.run_tag
        if self.directory.exists():
            raise UserError(
                f"{self.directory}: exists already and is never overwritten; choose another --run_tag"
            )
        check_writable(self.directory, "--reports_dir")
        self.seed = seed
        self._metrics: dict[str, Any] = {}
        self._meanings: dict[str, str] = {}
        self._caps: dict[str, float] = {}
        self._inputs: list[InputFile] = []
        self._notes: list[str] = []
        self._tables: list[Table] = []
        self._plots: list[Plot] = []
        self._sections: list[Section] = []
        self._texts: dict[str, str] = {}

    def add_input(self, role: str, path: Path | str) -> None:
        """Name a file that the report is about; its size and fingerprint are taken now.

        Raises:
            UserError: the file cannot be read.
        """
        path = Path(path)
        try:
            entry = InputFile(role, _shown_path(path), path.stat().st_size, quick_fingerprint(path))
        except OSError as error:
            raise UserError(
                f"{path}: not readable as the input {role!r} ({error.strerror}); give a file"
            ) from None
        self._inputs.append(entry)

    def add_prompt_file(self, role: str, path: Path | None, *, is_private: bool) -> None:
        """The same for a file of prompts, if there is one; a private one is neither named nor fingerprinted.

        Whoever has a guess at a short list could confirm it by its hash.

        Raises:
            UserError: as `add_input`.
        """
        if path is not None and is_private:
            self.note(f"--{role}: a private file, neither named nor fingerprinted here (--no-redact does)")
        elif path is not None:
            self.add_input(role, path)

    def metric(self, name: str, value: Any, meaning: str = "") -> None:
        """Record a number, text, truth value, None, or lists and tables of them; `meaning` goes into `report.md`.

        What is not finite has no place in JSON: it is recorded as null, with a note that says so.
        """
        self._metrics[name] = self._plain(value, name)
        self._meanings[name] = meaning

    def cap(self, name: str, value: float, meaning: str = "") -> None:
        """Record a limit that metrics are held against."""
        if not math.isfinite(value):
            raise ValueError(f"cap {name} is {value}")
        self._caps[name] = float(value)
        self._meanings[f"cap: {name}"] = meaning

    def note(self, text: str) -> None:
        """Record a remark, such as an assumption that was made."""
        self._notes.append(one_line(text))

    def table(self, name: str, rows: Any, title: str = "", inline_rows: int = _INLINE_ROWS) -> None:
        """Add `<name>.csv`: a pandas DataFrame, or a sequence of rows that map column names to values.

        Its first `inline_rows` rows also stand in `report.md`.
        """
        records = rows.to_dict(orient="records") if hasattr(rows, "to_dict") else list(rows)
        columns = tuple(str(name) for name in rows.columns) if hasattr(rows, "columns") else _columns(records)
        file_name = self._file_name(name, ".csv")
        plain = tuple({str(key): _scalar(value) for key, value in row.items()} for row in records)
        self._tables.append(Table(title or name, file_name, columns, plain, inline_rows))

    def plot(self, name: str, figure: "Figure", title: str = "") -> None:
        """Add `<name>.png`, drawn now; keep figures at most about 9 x 5 inches, they are stored at 100 dpi."""
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=_PLOT_DPI, pil_kwargs={"optimize": True})
        self._plots.append(Plot(title or name, self._file_name(name, ".png"), png.getvalue()))

    def picture(self, name: str, image: "Image", title: str = "") -> None:
        """Add `<name>.png` from pixels, such as a contact sheet; keep it at most about 1000 px wide."""
        png = io.BytesIO()
        image.save(png, format="png", optimize=True)
        self._plots.append(Plot(title or name, self._file_name(name, ".png"), png.getvalue()))

    def section(self, title: str, markdown: str) -> None:
        """Add a passage of Markdown, after the key numbers."""
        self._sections.append(Section(title, markdown))

    def text_file(self, file_name: str, text: str) -> None:
        """Add a text file for another program to read, such as a list of LoRA targets."""
        _check_name(file_name, "the name of a text file")
        self._texts[file_name] = text

    def write(self, verdict: Verdict, explanation: str, how_to_read: str, next_steps: str) -> Path:
        """Write everything and return the report's directory.

        Args:
            verdict: `pass`, `fail` or `inconclusive`.
            explanation: why, in one sentence; it is also the headline in `INDEX.md`.
            how_to_read, next_steps: Markdown.

        Raises:
            UserError: the report exists already, the disk is full, or the place is not writable.
        """
        summary = self._summary(verdict, one_line(explanation))
        text = render_report(
            summary,
            meanings=self._meanings,
            sections=self._sections,
            tables=self._tables,
            plots=self._plots,
            how_to_read=how_to_read,
            next_steps=next_steps,
        )
        with atomic_directory(self.directory) as temporary:
            (temporary / SUMMARY_NAME).write_text(summary.to_json(), encoding="utf-8")
            (temporary / REPORT_NAME).write_text(text, encoding="utf-8")
            for table in self._tables:
                _write_csv(temporary / table.file_name, table)
            for plot in self._plots:
                (temporary / plot.file_name).write_bytes(plot.png)
            for file_name, content in self._texts.items():
                (temporary / file_name).write_text(content, encoding="utf-8")
            read_summary(temporary)  # a report that breaks its own schema is never put in its place
        _append_to_index(self.reports_dir, summary)
        return self.directory

    def _summary(self, verdict: Verdict, explanation: str) -> Summary:
        return Summary(
            tool=self.tool,
            run_tag=self.run_tag,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            question=self.question,
            verdict=verdict,
            explanation=explanation,
            metrics=self._metrics,
            caps=self._caps,
            inputs=tuple(self._inputs),
            seed=self.seed,
            versions=_versions(),
            notes=tuple(self._notes),
        )

    def _file_name(self, name: str, suffix: str) -> str:
        _check_name(name, "the name of a table or plot")
        file_name = name + suffix
        if file_name in {table.file_name for table in self._tables} | {
            plot.file_name for plot in self._plots
        }:
            raise ValueError(f"two tables or plots named {name}")
        return file_name

    def _plain(self, value: Any, name: str) -> Any:
        """`value` as JSON holds it: scalars of torch and numpy become Python's, what is not finite becomes None."""
        if isinstance(value, Mapping):
            return {str(key): self._plain(entry, f"{name}.{key}") for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._plain(entry, f"{name}[{index}]") for index, entry in enumerate(value)]
        value = _scalar(value)
        if isinstance(value, float) and not math.isfinite(value):
            self.note(f"{name} is {value}; summary.json has null in its place")
            return None
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"metric {name}: {type(value).__name__} has no place in summary.json")


def _scalar(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str, int, float)):
        return float(value) if isinstance(value, float) else value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _check_name(name: str, what: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{what} {name!r} cannot be the name of a folder or file: use letters, digits, '_', '-' and '.', "
            "at most 120 of them, and no '.' or '-' in front"
        )


def _check_place(reports_dir: Path) -> None:
    if reports_dir.exists() and not reports_dir.is_dir():
        raise UserError(
            f"{reports_dir}: is a file, but reports need a directory; choose another --reports_dir"
        )
    refuse_training_run(reports_dir, "--reports_dir")


def check_writable(path: Path, flag: str) -> None:
    """Refuse a file or directory that could not be made, before anything is measured.

    Raises:
        UserError: what `path`, which `flag` names, would be made in is no directory, or not writable.
    """
    there = next(folder for folder in path.absolute().parents if folder.exists())
    by_effective_user = os.access in os.supports_effective_ids
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK, effective_ids=by_effective_user):
        raise UserError(f"{path}: {there} is not writable; choose another {flag} or mend its rights")


def refuse_training_run(path: Path, flag: str) -> None:
    """What a probe writes does not go into a training run's directory.

    Raises:
        UserError: `path`, which `flag` names, lies in one.
    """
    resolved = path.resolve()
    for folder in (resolved, *resolved.parents):
        if (folder / "config.toml").is_file() and (folder / "metrics.jsonl").is_file():
            raise UserError(
                f"{path}: lies in the training run {folder}, where only training writes; choose another {flag}"
            )


def _free_tag(directory: Path) -> str:
    """A time stamp; a second report within the same second gets a number behind it."""
    stamp = utc_run_tag()
    tag, number = stamp, 2
    while (directory / tag).exists():
        tag, number = f"{stamp}-{number}", number + 1
    return tag


def _shown_path(path: Path) -> str:
    """Relative to the working directory where that is possible, so that a report can be handed on."""
    absolute = path.absolute()
    return (absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute).as_posix()


def _columns(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(name) for row in rows for name in row))


def _write_csv(path: Path, table: Table) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, table.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.rows)


def _versions() -> dict[str, str]:
    """Python, this project, and those libraries that are in use; none is imported for its version."""
    versions = {"python": platform.python_version()}
    for name in (_PROJECT, *(library for library in _LIBRARIES if library in sys.modules)):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _append_to_index(reports_dir: Path, summary: Summary) -> None:
    index = reports_dir / INDEX_NAME
    with _locked(reports_dir / f".{INDEX_NAME}.lock"):
        text = index.read_text(encoding="utf-8") if index.exists() else INDEX_HEADER
        text = text if text.endswith("\n") else text + "\n"
        atomic_write_text(index, text + index_line(summary))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file, so that two probes that end together both get their line."""
    with disk_errors_as_user_errors(path), path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
