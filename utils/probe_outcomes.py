"""What became of the probes of a run: one line each in `probes.jsonl` of its directory."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from utils.files import atomic_write_text
from utils.metrics import append_line, read_rows

PROBES_FILE = "probes.jsonl"
Result = Literal["pass", "fail", "inconclusive", "error", "timeout", "skipped", "stopped"]


@dataclass(frozen=True)
class ProbeOutcome:
    """What became of a job.

    Attributes:
        tool, epoch, step: of the job.
        result: the report's verdict; or `error` (no verdict: it crashed, or could not read its files), `timeout` (cut
            off), `skipped` (a newer save took its place), `stopped` (the run ended before it did).
        explanation: the report's sentence, or what happened.
        report: its directory; None where there is none.
        seconds: how long it ran.
    """

    tool: str
    epoch: int
    step: int
    result: Result
    explanation: str
    report: str | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        place = f" ({self.report})" if self.report else ""
        return f"{self.tool} on epoch{self.epoch}: {self.result}: {self.explanation.rstrip('.')}{place}"


def describe_outcomes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Rows of `probes.jsonl` as lines for the summary of a run, by epoch."""
    ordered = sorted(rows, key=lambda row: (row["epoch"], row["step"]))
    return [f"probe {ProbeOutcome(**row)}" for row in ordered]


def read_outcomes(run_dir: Path) -> list[dict[str, Any]]:
    """All rows of a run's `probes.jsonl`; those of another version are passed over.

    Raises:
        UserError: the file is not what a run writes.
    """
    names = {field.name for field in fields(ProbeOutcome)}
    return [row for row in read_rows(run_dir / PROBES_FILE) if row.keys() == names]


def keep_outcomes(run_dir: Path, step: int) -> None:
    """Drop what belongs to saves after `step`: a run that goes on from there saves, and probes, again.

    Raises:
        OSError, UserError: the file cannot be written.
    """
    path = run_dir / PROBES_FILE
    if path.exists():
        kept = [row for row in read_outcomes(run_dir) if row["step"] <= step]
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def append_outcome(run_dir: Path, outcome: ProbeOutcome) -> None:
    """Write one down, whole or not at all.

    Raises:
        OSError: the disk is full.
    """
    with (run_dir / PROBES_FILE).open("ab", buffering=0) as file:
        append_line(file, (json.dumps(asdict(outcome)) + "\n").encode())


def rows_of(outcomes: Sequence[ProbeOutcome]) -> list[dict[str, Any]]:
    """Outcomes as a row of metrics has them; explanations stand in `probes.jsonl`."""
    return [
        {"tool": one.tool, "epoch": one.epoch, "result": one.result, "report": one.report} for one in outcomes
    ]
