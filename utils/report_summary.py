"""`summary.json`: the one schema in which every report keeps its numbers, and reading it back with checks.

A file is read as strictly as it is written: a key too many or too few, a wrong type or a NaN is an error, so that
whatever compares reports can rely on every field.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, get_args

from utils.errors import UserError

Verdict = Literal["pass", "fail", "inconclusive"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
SUMMARY_NAME = "summary.json"


@dataclass(frozen=True)
class InputFile:
    """One file that a report is about. `fingerprint` is `utils.files.quick_fingerprint`, 32 hex digits."""

    role: str
    path: str
    size_bytes: int
    fingerprint: str


@dataclass(frozen=True)
class Summary:
    """Everything in `summary.json`.

    Attributes:
        tool: name of the probe; also the name of its folder in `reports/`.
        run_tag: name of this report; also the name of its folder.
        created: UTC, ISO 8601, such as `2030-01-31T12:00:00Z`.
        question: what the report answers, as one sentence.
        verdict: `pass`, `fail` or `inconclusive`.
        explanation: one sentence that says why.
        metrics: every number the report uses: numbers, strings, booleans, null, and lists and tables of them.
        caps: the limits that the metrics were held against.
        inputs: the files that were looked at.
        seed: the seed of whatever was random, null where nothing was.
        versions: of Python, of this project and of the libraries in use.
        notes: remarks, such as which metric was not finite and therefore is null.
    """

    tool: str
    run_tag: str
    created: str
    question: str
    verdict: Verdict
    explanation: str
    metrics: dict[str, Any]
    caps: dict[str, float]
    inputs: tuple[InputFile, ...]
    seed: int | None
    versions: dict[str, str]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """The text of `summary.json`, newline-terminated."""
        return json.dumps(asdict(self), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def read_summary(path: Path) -> Summary:
    """Read and check a `summary.json`, or the one in a report's directory.

    Raises:
        UserError: the file is missing, is not JSON, or does not follow the schema; the message names the field.
    """
    path = Path(path)
    if path.is_dir():
        path = path / SUMMARY_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{path}: not readable as a report's summary ({reason}); give a directory made by a probe"
        ) from None
    problem = _problem(values)
    if problem:
        raise UserError(f"{path}: does not follow the schema of summary.json: {problem}; run the probe again")
    values["inputs"] = tuple(InputFile(**entry) for entry in values["inputs"])
    values["notes"] = tuple(values["notes"])
    return Summary(**values)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _problem(values: Any) -> str | None:
    """The first way in which `values` departs from the schema."""
    problem = _key_problem(values, Summary)
    if problem:
        return problem
    for key in ("tool", "run_tag", "created", "question", "explanation"):
        if not isinstance(values[key], str) or not values[key]:
            return f"{key} must be a text that is not empty"
    if values["verdict"] not in VERDICTS:
        return f"verdict is {values['verdict']!r}, not one of {', '.join(VERDICTS)}"
    if not _is_utc(values["created"]):
        return f"created is {values['created']!r}, not a UTC time in ISO 8601"
    if not _is_table(values["metrics"], object):
        return "metrics must be a table"
    if not _is_table(values["caps"], (int, float)):
        return "caps must be a table of numbers"
    if not _is_table(values["versions"], str):
        return "versions must be a table of texts"
    if values["seed"] is not None and not _is_int(values["seed"]):
        return "seed must be a whole number or null"
    if not isinstance(values["notes"], list) or not all(isinstance(note, str) for note in values["notes"]):
        return "notes must be a list of texts"
    return _inputs_problem(values["inputs"])


def _inputs_problem(entries: Any) -> str | None:
    if not isinstance(entries, list):
        return "inputs must be a list"
    for index, entry in enumerate(entries):
        problem = _key_problem(entry, InputFile)
        if problem:
            return f"inputs[{index}]: {problem}"
        if not all(isinstance(entry[key], str) and entry[key] for key in ("role", "path", "fingerprint")):
            return f"inputs[{index}]: role, path and fingerprint must be texts that are not empty"
        if not _is_int(entry["size_bytes"]) or entry["size_bytes"] < 0:
            return f"inputs[{index}]: size_bytes must be a whole number from 0 up"
    return None


def _key_problem(values: Any, record: type) -> str | None:
    if not isinstance(values, dict):
        return "not a table"
    names = {field.name for field in fields(record)}
    missing, unknown = sorted(names - values.keys()), sorted(values.keys() - names)
    if missing:
        return f"{', '.join(missing)} missing"
    return f"{', '.join(unknown)} unknown" if unknown else None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_table(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(entry, kind) and (kind is object or not isinstance(entry, bool))
        for entry in value.values()
    )


def _is_utc(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).utcoffset() == timedelta(0)
    except ValueError:
        return False
