"""The directory of a pair of runs, one for each of two experts: made new, or found again to be continued.

`output_dir/<UTC time stamp>/` holds a run directory per expert, named after it, and what both have made: the adapters side
by side and the report. `pair.json` marks it.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.adapter_runs import last_save
from utils.config.schema import Expert, LoadedConfig, TrainConfig
from utils.errors import UserError
from utils.files import atomic_directory, atomic_path, atomic_write_text
from utils.run_dir import CONFIG_FILE, NEWEST, fill_run_dir, free_name, newest_with
from utils.saved_runs import PAIR_FILE

REPORT_FILE = "report.md"
FORMAT = 1


@dataclass(frozen=True)
class PairDir:
    """The directory of a pair."""

    path: Path

    def run(self, expert: Expert) -> Path:
        """The run directory of one expert."""
        return self.path / expert

    def adapter(self, expert: Expert) -> Path:
        """Where the expert's finished adapter lies for other programs."""
        return self.path / f"adapter_{expert}.safetensors"


@dataclass(frozen=True)
class HalfStart:
    """What the run directory of one expert begins with: its configuration, and what writes the rest."""

    expert: Expert
    config: LoadedConfig
    describe: Callable[[Path], None]


def create_pair_dir(output_dir: Path, halves: Sequence[HalfStart], document: Mapping[str, Any]) -> PairDir:
    """Make `output_dir/<UTC time stamp>/` with both run directories, whole or not at all.

    Raises:
        UserError: output_dir is not writable, or the disk is full.
    """
    path = free_name(output_dir)
    with atomic_directory(path) as temporary:
        for half in halves:
            run = temporary / half.expert
            run.mkdir()
            fill_run_dir(run, half.config, half.describe)
        atomic_write_text(temporary / PAIR_FILE, _text(document))
    return PairDir(path)


def find_pair_dir(config: TrainConfig, wanted: str) -> PairDir | None:
    """The pair to continue: the directory `wanted` or one of its halves, a name inside output_dir, or the newest pair.

    Returns None where output_dir holds no pair yet.

    Raises:
        UserError: `wanted` names no pair.
    """
    parent = Path(config.output_dir)
    if wanted == NEWEST:
        path = newest_with(PAIR_FILE, parent)
        return None if path is None else PairDir(path)
    candidates = [Path(wanted), parent / wanted]
    candidates += [path.parent for path in candidates if (path / CONFIG_FILE).is_file()]
    found = [path for path in candidates if (path / PAIR_FILE).is_file()]
    if not found:
        raise UserError(
            f"--resume_from_checkpoint {wanted}: neither {candidates[0]} nor {candidates[1]} is the directory of a pair "
            f'(with a {PAIR_FILE}), which expert = "both" continues; give no value for the newest pair of output_dir'
        )
    return PairDir(found[0])


def place_adapter(pair: PairDir, expert: Expert) -> Path | None:
    """Copy what the expert's run saved last beside its sibling's; None where it has saved nothing.

    Raises:
        UserError: the disk is full or not writable.
    """
    saved = last_save(pair.run(expert))
    if saved is None:
        return None
    target = pair.adapter(expert)
    with atomic_path(target) as temporary:
        shutil.copyfile(saved, temporary)
    return target


def write_pair_report(pair: PairDir, document: Mapping[str, Any], text: str) -> None:
    """Replace `pair.json` and `report.md`.

    Raises:
        UserError: the disk is full or not writable.
    """
    atomic_write_text(pair.path / REPORT_FILE, text)
    atomic_write_text(pair.path / PAIR_FILE, _text(document))


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, allow_nan=False) + "\n"
