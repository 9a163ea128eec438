"""Finding saved adapters: `utils.saved_runs` for the file that dit_lora saves."""

from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.saved_runs import (
    RUN_CONFIG_NAME,
    SavedKind,
    SavedRun,
    find_saved_file,
    last_saved,
    newest_saved_run,
    run_of_saved_file,
)

__all__ = [
    "ADAPTER_NAME",
    "RUN_CONFIG_NAME",
    "AdapterRun",
    "find_adapter_file",
    "last_save",
    "newest_adapter_run",
    "run_of_adapter",
]

ADAPTER_NAME = "adapter_model.safetensors"
_ADAPTER = SavedKind(ADAPTER_NAME, "an adapter", "--adapter and --base")


@dataclass(frozen=True)
class AdapterRun:
    """A training run and the adapter that it saved last."""

    directory: Path
    config: Path
    adapter: Path


def find_adapter_file(path: Path) -> Path:
    """The adapter file that `path` means: a file, a directory that holds one, or a training run (its last save).

    Raises:
        UserError: there is nothing, more than one file to choose from, or a file of another kind.
    """
    file = find_saved_file(path, _ADAPTER)
    if file.suffix != ".safetensors":
        raise UserError(
            f"{file}: adapters are read from .safetensors files only; convert it with the program that made it"
        )
    return file


def newest_adapter_run(root: Path) -> AdapterRun:
    """The run below `root` that saved an adapter last (by the file's time).

    Raises:
        UserError: no run below `root` has saved an adapter.
    """
    return _adapter_run(newest_saved_run(root, _ADAPTER))


def run_of_adapter(adapter: Path) -> AdapterRun | None:
    """The run that an adapter file lies in, None if it does not lie in one."""
    run = run_of_saved_file(adapter, _ADAPTER)
    return None if run is None else _adapter_run(run)


def last_save(run: Path) -> Path | None:
    """The adapter that a run saved last: by time, and by number where files were copied with one time."""
    return last_saved(run, _ADAPTER)


def _adapter_run(run: SavedRun) -> AdapterRun:
    return AdapterRun(run.directory, run.config, run.file)
