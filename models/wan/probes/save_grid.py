"""The grid that was drawn of a save (prompt_grid), found again and shown in another report."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.wan.probes.grid import ADAPTER_ROLE, ENCODER_ROLE
from utils.adapter_runs import run_of_adapter
from utils.config.probe_rules import SAMPLES_PROBE
from utils.errors import UserError
from utils.files import quick_fingerprint
from utils.probe_plan import repeated, report_tag
from utils.report import Report
from utils.report_markdown import format_value, markdown_table
from utils.report_summary import SUMMARY_NAME, Summary, read_summary
from utils.tensor_source import open_safetensors

GRID_FILE = "grid.png"
_SAVE = re.compile(r"(?:epoch|step)\d+")
_ADAPTER = re.compile(re.escape(ADAPTER_ROLE).replace(r"\{name\}", "(.+)").replace(r"\{weight\}", "1"))
_GROUPS = ("neutral", "domain")


@dataclass(frozen=True)
class SaveGrid:
    """A report of prompt_grid, and its column that draws with one adapter alone, at its full weight."""

    directory: Path
    summary: Summary
    column: str

    def value(self, metric: str) -> Any:
        """What a metric holds for the column; None where it has none, as without domain prompts."""
        found = self.summary.metrics.get(metric)
        return found.get(self.column) if isinstance(found, dict) else None


@dataclass(frozen=True)
class GridSearch:
    """What came of looking for the grid of an adapter: the newest one, or where it is missing; and remarks."""

    grid: SaveGrid | None
    missing: str = ""
    remarks: tuple[str, ...] = ()


def find_grid(adapter: Path, reports_dir: Path) -> GridSearch:
    """The grid of the save that `adapter` is, where training or a person has had it drawn: `prompt_grid/<run>_epochN/`.

    It counts only where it was drawn from this very file, by its fingerprint.
    """
    run = run_of_adapter(adapter)
    save = None if run is None else _save_name(adapter)
    if run is None or save is None:
        how = "draw one with `python scripts/diagnostics/prompt_grid.py`"
        return GridSearch(None, f"{adapter} is no save in a run, of which a grid could be found; {how}.")
    tag, fingerprint = report_tag(run.directory, save), quick_fingerprint(adapter)
    found: SaveGrid | None = None
    remarks = []
    for directory in _reports(reports_dir / SAMPLES_PROBE, tag):
        try:
            summary = read_summary(directory)
        except UserError as error:
            remarks.append(f"warning: {error}")
            continue
        column = _column_of(summary, fingerprint)
        if column is None or not (directory / GRID_FILE).is_file():
            remarks.append(f"warning: {directory} does not show {adapter} as it is now, so it is left out")
            continue
        found = SaveGrid(directory, summary, column)
    if found is not None:
        return GridSearch(found, "", tuple(remarks))
    words = ["--config", str(run.directory), "--run", f"adapter={adapter.parent}", "--run_tag"]
    free = repeated(tag, len(remarks) + 1)  # of each report that is there, there is a remark
    command = shlex.join(
        ["python", "scripts/diagnostics/prompt_grid.py", *words, free, "--reports_dir", str(reports_dir)]
    )
    missing = (
        f"No grid of this save is there ({reports_dir / SAMPLES_PROBE / tag}). `[samples]` in the config has one drawn after "
        f"each epoch's save; by hand it is\n\n```sh\n{command}\n```\n\nand then this probe again."
    )
    return GridSearch(None, missing, tuple(remarks))


def add_grid(report: Report, search: GridSearch) -> None:
    """Show the grid and the change that it measured, or say how to get one."""
    grid = search.grid
    report.metric(
        "grid", "none" if grid is None else grid.directory.as_posix(), "the prompt_grid report shown here"
    )
    if grid is None:
        report.section("The grid", search.missing)
        return
    from PIL import Image

    report.add_input("grid", grid.directory / SUMMARY_NAME)
    rows = []
    for group in _GROUPS:
        change = grid.value(f"{group}_change")
        if change is None:
            continue
        low, high = grid.value(f"{group}_change_interval") or (None, None)
        between = "one prompt has none" if low is None else f"{format_value(low)} to {format_value(high)}"
        rows.append((group, change, between, grid.value(f"{group}_latent_distance")))
        report.metric(
            f"grid_{group}_change", change, f"mean of 1 - SSIM to the base's pictures, {group} prompts"
        )
    link = f"[{grid.directory.name}](../../{SAMPLES_PROBE}/{grid.directory.name}/report.md)"
    table = markdown_table(("prompts", "change", "95 % interval", "latent distance"), rows)
    report.section(
        "The grid",
        f"{SAMPLES_PROBE} {link}, column `{grid.column}`: **{grid.summary.verdict}**. {grid.summary.explanation} It is no part "
        f"of the verdict above.\n\n{table}\n\n{grid.summary.metrics.get('settings', '')}",
    )
    with Image.open(grid.directory / GRID_FILE) as picture:
        report.picture("grid", picture, "The grid: same prompt and noise in each row")


def _save_name(adapter: Path) -> str | None:
    """`epoch3` of a file in such a directory; of a copy elsewhere what its metadata say."""
    name = adapter.absolute().parent.name
    if _SAVE.fullmatch(name):
        return name
    epoch = open_safetensors([adapter]).metadata().get("epoch", "")
    return f"epoch{epoch}" if epoch.isascii() and epoch.isdecimal() else None


def _reports(folder: Path, tag: str) -> Iterator[Path]:
    """Those of one name, in the order in which they were made."""
    number = 1
    while (folder / repeated(tag, number)).is_dir():
        yield folder / repeated(tag, number)
        number += 1


def _column_of(summary: Summary, fingerprint: str) -> str | None:
    """The column that draws with the file of this fingerprint and nothing else, at weight 1."""
    roles = [entry.role for entry in summary.inputs]
    for entry in summary.inputs:
        match = _ADAPTER.fullmatch(entry.role)
        if match is None or entry.fingerprint != fingerprint:
            continue
        name = match[1]
        of_column = [
            role for role in roles if role.startswith(ADAPTER_ROLE.partition("{name}")[0] + name + " ")
        ]
        if len(of_column) == 1 and ENCODER_ROLE.format(name=name) not in roles:
            return name
    return None
