"""Finding saved adapters: in a file, a directory or a training run, and the newest run of all. No file is opened.

A training run is a directory that holds `config.toml` and, once something was saved, `epochN/` or `stepN/` with
`adapter_model.safetensors` in it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError

ADAPTER_NAME = "adapter_model.safetensors"
RUN_CONFIG_NAME = "config.toml"
_SAVE_DIRECTORY = re.compile(r"(?:epoch|step)(\d+)")


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
    path = Path(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path}: adapters are read from .safetensors files only; convert it with the program that made it"
            )
        return path
    if not path.is_dir():
        raise UserError(
            f"{path}: no such file or directory; give an adapter's .safetensors file or the directory it is in"
        )
    if (path / ADAPTER_NAME).is_file():
        return path / ADAPTER_NAME
    saved = last_save(path)
    if saved is not None:
        return saved
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    found = (
        f"{len(files)} .safetensors files"
        if files
        else f"neither {ADAPTER_NAME} nor another .safetensors file"
    )
    raise UserError(f"{path}: holds {found}; name the adapter's file itself")


def newest_adapter_run(root: Path) -> AdapterRun:
    """The run below `root` that saved an adapter last (by the file's time).

    Raises:
        UserError: no run below `root` has saved an adapter.
    """
    runs = list(_adapter_runs(Path(root)))
    if not runs:
        raise UserError(
            f"{root}: no run with {RUN_CONFIG_NAME} and epochN/{ADAPTER_NAME} below it; train one first, or name the files "
            "with --adapter and --base"
        )
    return max(runs, key=lambda run: (run.adapter.stat().st_mtime_ns, str(run.directory)))


def run_of_adapter(adapter: Path) -> AdapterRun | None:
    """The run that an adapter file lies in, None if it does not lie in one."""
    # Kept relative where it can be: the run is named in messages as the user named it.
    directory = (adapter if len(adapter.parts) > 1 else adapter.absolute()).parent.parent
    config = directory / RUN_CONFIG_NAME
    if adapter.name == ADAPTER_NAME and _save_number(adapter) is not None and config.is_file():
        return AdapterRun(directory, config, adapter)
    return None


def _adapter_runs(root: Path) -> Iterator[AdapterRun]:
    directories = {path.parent.parent for path in root.rglob(ADAPTER_NAME)}
    for directory in sorted(directories):
        adapter = last_save(directory)
        if adapter is not None:
            yield AdapterRun(directory, directory / RUN_CONFIG_NAME, adapter)


def last_save(run: Path) -> Path | None:
    """The adapter that a run saved last: by time, and by number where files were copied with one time."""
    if not (run / RUN_CONFIG_NAME).is_file():
        return None
    saves = [path for path in run.glob(f"*/{ADAPTER_NAME}") if _save_number(path) is not None]
    return max(saves, key=lambda path: (path.stat().st_mtime_ns, _save_number(path) or 0), default=None)


def _save_number(adapter: Path) -> int | None:
    """12 for `epoch12/adapter_model.safetensors`, None for a directory with another kind of name."""
    match = _SAVE_DIRECTORY.fullmatch(adapter.absolute().parent.name)
    return int(match[1]) if match else None
