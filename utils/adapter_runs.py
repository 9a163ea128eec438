"""Finding saved adapters: `utils.saved_runs` for the file that dit_lora saves."""

from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.saved_runs import (
    PAIR_FILE,
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
    "adapters_of_pair",
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
    both = adapters_of_pair(path)
    if both:
        names = " or ".join(map(str, both))
        raise UserError(f"{path}: holds the adapters of two experts; name one of them, {names}")
    file = find_saved_file(path, _ADAPTER)
    if file.suffix != ".safetensors":
        raise UserError(
            f"{file}: adapters are read from .safetensors files only; convert it with the program that made it"
        )
    return file


def adapters_of_pair(path: Path) -> tuple[Path, ...]:
    """The finished adapters in the directory of a pair of runs, one for each expert; none for any other path."""
    return tuple(sorted(path.glob("adapter_*.safetensors"))) if (path / PAIR_FILE).is_file() else ()


def newest_adapter_run(root: Path) -> AdapterRun:
    """The run below `root` that saved an adapter last (by the file's time).

    Raises:
        UserError: no run below `root` has saved an adapter.
    """
    return _adapter_run(newest_saved_run(root, _ADAPTER))


def run_of_adapter(adapter: Path) -> AdapterRun | None:
    """The run that an adapter file lies in, or for a copy in the directory of a pair that it is from; None for others."""
    if adapter in adapters_of_pair(adapter.parent):
        run = adapter.parent / adapter.stem.removeprefix("adapter_")
        if (run / RUN_CONFIG_NAME).is_file():
            return AdapterRun(run, run / RUN_CONFIG_NAME, adapter)
    saved = run_of_saved_file(adapter, _ADAPTER)
    return None if saved is None else _adapter_run(saved)


def last_save(run: Path) -> Path | None:
    """The adapter that a run saved last: by time, and by number where files were copied with one time."""
    return last_saved(run, _ADAPTER)


def _adapter_run(run: SavedRun) -> AdapterRun:
    return AdapterRun(run.directory, run.config, run.file)
