"""The directory of one run: made new, or found again to be continued."""

import re
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from utils.checkpoint import latest_checkpoint
from utils.config.dump import dump_config
from utils.config.load import load_config
from utils.config.schema import LoadedConfig, TrainConfig
from utils.errors import UserError
from utils.files import TEMPORARY_SUFFIX, atomic_directory, atomic_write_text

CONFIG_FILE = "config.toml"
NEWEST = ""
_RUN_NAME = re.compile(r"(?P<stamp>\d{8}_\d{6})(_(?P<number>\d+))?")

# What may differ between a run and its continuation: how far it goes, how it is split, when it saves.
_FREE_KEYS = frozenset(
    {
        "output_dir",
        "dataset",
        "epochs",
        "max_steps",
        "pipeline_stages",
        "partition_method",
        "partition_split",
        "gradient_accumulation_steps",
        "save_every_n_epochs",
        "save_every_n_steps",
        "checkpoint_every_n_epochs",
        "checkpoint_every_n_steps",
        "checkpoint_every_n_minutes",
        "keep_checkpoints",
        "timeout_minutes",
        "activation_checkpointing",
        "blocks_to_swap",
    }
)


@dataclass(frozen=True)
class RunDir:
    """Where a run writes, the checkpoint it continues from, if any, and whether there is nothing left to do."""

    path: Path
    checkpoint: Path | None = None
    is_resumed: bool = False
    is_finished: bool = False


def create_run_dir(config: LoadedConfig, describe: Callable[[Path], None]) -> RunDir:
    """Make `output_dir/<UTC time stamp>/` with the resolved config and copies of the input TOML files.

    It appears whole or not at all, so that what is left of a start that failed is never taken for a run.

    Args:
        config: of the run.
        describe: writes what else belongs to the run from its start into the directory that it is given.

    Raises:
        UserError: output_dir is not writable, or the disk is full.
    """
    path = _free_name(Path(config.train.output_dir))
    with atomic_directory(path) as temporary:
        inputs = temporary / "inputs"
        inputs.mkdir()
        shutil.copyfile(config.path, inputs / f"train_{Path(config.path).name}")
        shutil.copyfile(config.dataset_path, inputs / f"dataset_{Path(config.dataset_path).name}")
        atomic_write_text(temporary / CONFIG_FILE, dump_config(config.train))
        describe(temporary)
    return RunDir(path)


def _free_name(parent: Path) -> Path:
    """A time stamp, with a number behind it where another run began in the same second."""
    stamp = datetime.now(UTC).strftime("%Y%m%d_%H%M%S")
    names = (stamp, *(f"{stamp}_{number}" for number in range(1, 1000)))
    return next(path for path in map(parent.joinpath, names) if not path.exists())


def newest_run(output_dir: Path) -> Path | None:
    """The run that began last; directories that are not named by a time stamp do not count."""
    runs: dict[tuple[str, int], Path] = {}
    for path in output_dir.glob(f"*/{CONFIG_FILE}"):
        match = _RUN_NAME.fullmatch(path.parent.name)
        if match is not None:
            runs[match["stamp"], int(match["number"] or 0)] = path.parent
    return runs[max(runs)] if runs else None


def remove_leftovers(run_dir: Path) -> None:
    """Delete what a killed process was in the middle of writing."""
    for path in run_dir.glob(f".*{TEMPORARY_SUFFIX}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def find_run_dir(config: LoadedConfig, wanted: str) -> RunDir | None:
    """The run to continue: the directory `wanted`, a name inside output_dir, or (`NEWEST`) the newest run there.

    Returns None where output_dir holds no run yet.

    Raises:
        UserError: `wanted` names no run, or the run was made with another configuration.
    """
    parent = Path(config.train.output_dir)
    if wanted == NEWEST:
        path = newest_run(parent)
        if path is None:
            return None
    else:
        candidates = [Path(wanted), parent / wanted]
        found = [path for path in candidates if (path / CONFIG_FILE).is_file()]
        if not found:
            raise UserError(
                f"--resume_from_checkpoint {wanted}: neither {candidates[0]} nor {candidates[1]} is a run directory "
                f"(with a {CONFIG_FILE}); give no value for the newest run of output_dir"
            )
        path = found[0]
    _check_same_config(path, config.train)
    return RunDir(path, latest_checkpoint(path), is_resumed=True)


def record_config(run_dir: Path, config: TrainConfig, step: int) -> None:
    """Where a run goes on with other values (of keys that may differ), keep the old ones and write the new.

    So `config.toml` is always that of the newest files, and its hash the one in their metadata.
    """
    path, text = run_dir / CONFIG_FILE, dump_config(config)
    before = path.read_text(encoding="utf-8")
    if before != text:
        atomic_write_text(run_dir / "inputs" / f"config_until_step{step}.toml", before)
        atomic_write_text(path, text)


def _check_same_config(path: Path, config: TrainConfig) -> None:
    saved = load_config(path / CONFIG_FILE).train
    before, now = _flatten(dump_config(saved)), _flatten(dump_config(config))
    changed = [
        f"  {key}: {before.get(key, '(not set)')} -> {now.get(key, '(not set)')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in _FREE_KEYS
    ]
    if changed:
        raise UserError(
            f"{path}: the run was made with another configuration, so it cannot be continued with this one (the run's -> yours):\n"
            + "\n".join(changed)
            + "\nput these back, or start a new run without --resume_from_checkpoint"
        )


def _flatten(toml: str) -> dict[str, str]:
    """Dotted keys and their values as text."""
    flat: dict[str, str] = {}

    def visit(prefix: str, table: dict[str, object]) -> None:
        for key, value in table.items():
            if isinstance(value, dict):
                visit(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = repr(value)

    visit("", tomllib.loads(toml))
    return flat
