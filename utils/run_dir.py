"""The directory of one run: made new, or found again to be continued."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from utils.checkpoint import LoopState, latest_checkpoint
from utils.config.dump import dump_config
from utils.config.schema import LoadedConfig, TrainConfig
from utils.errors import UserError
from utils.files import TEMPORARY_SUFFIX, atomic_directory, atomic_write_text
from utils.saved_runs import PAIR_FILE

CONFIG_FILE = "config.toml"
NEWEST = ""
_RUN_NAME = re.compile(r"(?P<stamp>\d{8}_\d{6})(_(?P<number>\d+))?")


@dataclass(frozen=True)
class RunDir:
    """Where a run writes, and what it goes on from, if anything: a checkpoint and the loop's state to begin with.

    `with_optimizer` is false where the checkpoint's optimizer state is of no use, because another optimizer goes on. `pair`
    is the directory of the pair that the run is a half of.
    """

    path: Path
    checkpoint: Path | None = None
    state: LoopState | None = None
    with_optimizer: bool = True
    pair: Path | None = None

    @property
    def resume_path(self) -> Path:
        """What to continue by the same command: the pair where the run is one of its halves."""
        return self.pair or self.path


def create_run_dir(config: LoadedConfig, describe: Callable[[Path], None]) -> RunDir:
    """Make `output_dir/<UTC time stamp>/` with the resolved config and copies of the input TOML files.

    It appears whole or not at all, so that what is left of a start that failed is never taken for a run.

    Args:
        config: of the run.
        describe: writes what else belongs to the run from its start into the directory that it is given.

    Raises:
        UserError: output_dir is not writable, or the disk is full.
    """
    path = free_name(Path(config.train.output_dir))
    with atomic_directory(path) as temporary:
        fill_run_dir(temporary, config, describe)
    return RunDir(path)


def fill_run_dir(directory: Path, config: LoadedConfig, describe: Callable[[Path], None]) -> None:
    """Write what a run directory holds from its start into one that exists and is empty; see `create_run_dir`."""
    inputs = directory / "inputs"
    inputs.mkdir()
    shutil.copyfile(config.path, inputs / f"train_{Path(config.path).name}")
    shutil.copyfile(config.dataset_path, inputs / f"dataset_{Path(config.dataset_path).name}")
    for dataset in config.train.eval_datasets:
        shutil.copyfile(dataset.config, inputs / f"eval_{dataset.label}_{Path(dataset.config).name}")
    atomic_write_text(directory / CONFIG_FILE, dump_config(config.train))
    describe(directory)


def free_name(parent: Path) -> Path:
    """A time stamp, with a number behind it where another run began in the same second."""
    stamp = datetime.now(UTC).strftime("%Y%m%d_%H%M%S")
    names = (stamp, *(f"{stamp}_{number}" for number in range(1, 1000)))
    return next(path for path in map(parent.joinpath, names) if not path.exists())


def newest_run(output_dir: Path) -> Path | None:
    """The run that began last; directories that are not named by a time stamp do not count."""
    return newest_with(CONFIG_FILE, output_dir)


def newest_with(file_name: str, output_dir: Path) -> Path | None:
    """Of the directories of `output_dir` that are named by a time stamp and hold this file, the newest."""
    runs: dict[tuple[str, int], Path] = {}
    for path in output_dir.glob(f"*/{file_name}"):
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
        UserError: `wanted` names no run.
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
            _refuse_pair(wanted, candidates)
            raise UserError(
                f"--resume_from_checkpoint {wanted}: neither {candidates[0]} nor {candidates[1]} is a run directory "
                f"(with a {CONFIG_FILE}); give no value for the newest run of output_dir"
            )
        path = found[0]
    return RunDir(path, latest_checkpoint(path))


def _refuse_pair(wanted: str, candidates: Sequence[Path]) -> None:
    pair = next((path for path in candidates if (path / PAIR_FILE).is_file()), None)
    if pair is not None:
        halves = " or ".join(str(path.parent) for path in sorted(pair.glob(f"*/{CONFIG_FILE}")))
        raise UserError(
            f"--resume_from_checkpoint {wanted}: is a pair of runs, which is continued with the configuration that has "
            f'expert = "both"; with one expert\'s configuration, name its half: {halves}'
        )


def run_name(run_dir: Path) -> str:
    """The run's name for reports: that of its directory, behind its pair's where it is the half of one."""
    path = run_dir.absolute()
    return f"{path.parent.name}_{path.name}" if (path.parent / PAIR_FILE).is_file() else path.name


def record_config(run_dir: Path, config: TrainConfig, step: int) -> None:
    """Where a run goes on with other values (of keys that may differ, or were allowed to), keep the old ones and write the new.

    So `config.toml` is always that of the newest files, and its hash the one in their metadata. A directory without one
    is no run that a person started, and is left as it is.
    """
    path, text = run_dir / CONFIG_FILE, dump_config(config)
    if not path.is_file():
        return
    before = path.read_text(encoding="utf-8")
    if before != text:
        atomic_write_text(run_dir / "inputs" / f"config_until_step{step}.toml", before)
        atomic_write_text(path, text)
