"""Finding what runs saved: in a file, a directory or a training run, and the newest run of all. No file is opened.

A training run is a directory that holds `config.toml` and, once something was saved, `epochN/` or `stepN/` with a file
of a known name in it: which one is what a `SavedKind` says.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError

RUN_CONFIG_NAME = "config.toml"
# Marks the directory of two runs, one for each expert (utils/pair_dir.py).
PAIR_FILE = "pair.json"
_SAVE_DIRECTORY = re.compile(r"(?:epoch|step)(\d+)")


@dataclass(frozen=True)
class SavedKind:
    """One kind of file that runs save.

    Attributes:
        name: the file's name in each save.
        what: what messages call it, such as "an adapter".
        flags: what to name it with on a command line instead.
        other_names: names that the file has in other formats.
    """

    name: str
    what: str
    flags: str
    other_names: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names, the usual one first."""
        return (self.name, *self.other_names)


@dataclass(frozen=True)
class SavedRun:
    """A training run and the file that it saved last, or that was asked about."""

    directory: Path
    config: Path
    file: Path


def find_saved_file(path: Path, kind: SavedKind) -> Path:
    """The file that `path` means: itself, that of a directory that holds one, or of a training run (its last save).

    Raises:
        UserError: there is nothing, or more than one file to choose from.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(
            f"{path}: no such file or directory; give the .safetensors file of {kind.what}, or the directory it is in"
        )
    for name in kind.names:
        if (path / name).is_file():
            return path / name
    saved = last_saved(path, kind)
    if saved is not None:
        return saved
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    found = (
        f"{len(files)} .safetensors files" if files else f"neither {kind.name} nor another .safetensors file"
    )
    found_saves = (save for name in kind.names for save in path.glob(f"*/{name}"))
    saves = sorted(save.parent.name for save in found_saves if _save_number(save) is not None)
    if saves and not files:
        found = f"{', '.join(saves)} but no {RUN_CONFIG_NAME}, so it is no whole run"
    raise UserError(f"{path}: holds {found}; name the file of {kind.what} itself")


def newest_saved_run(root: Path, kind: SavedKind) -> SavedRun:
    """The run below `root` that saved this kind of file last (by the file's time).

    Raises:
        UserError: no run below `root` has saved one.
    """
    runs = list(_saved_runs(Path(root), kind))
    if not runs:
        raise UserError(
            f"{root}: no run with {RUN_CONFIG_NAME} and epochN/{kind.name} below it; train one first, or name the files "
            f"with {kind.flags}"
        )
    return max(runs, key=lambda run: (run.file.stat().st_mtime_ns, str(run.directory)))


def run_of_saved_file(file: Path, kind: SavedKind) -> SavedRun | None:
    """The run that a file lies in, None if it does not lie in one."""
    # Kept relative where it can be: the run is named in messages as the user named it.
    directory = (file if len(file.parts) > 1 else file.absolute()).parent.parent
    config = directory / RUN_CONFIG_NAME
    if file.name in kind.names and _save_number(file) is not None and config.is_file():
        return SavedRun(directory, config, file)
    return None


def last_saved(run: Path, kind: SavedKind) -> Path | None:
    """The file that a run saved last: by time, and by number where files were copied with one time."""
    if not (run / RUN_CONFIG_NAME).is_file():
        return None
    saves = [path for name in kind.names for path in run.glob(f"*/{name}") if _save_number(path) is not None]
    return max(saves, key=lambda path: (path.stat().st_mtime_ns, _save_number(path) or 0), default=None)


def _saved_runs(root: Path, kind: SavedKind) -> Iterator[SavedRun]:
    directories = {path.parent.parent for name in kind.names for path in root.rglob(name)}
    for directory in sorted(directories):
        file = last_saved(directory, kind)
        if file is not None:
            yield SavedRun(directory, directory / RUN_CONFIG_NAME, file)


def _save_number(file: Path) -> int | None:
    """12 for `epoch12/adapter_model.safetensors`, None for a directory with another kind of name."""
    match = _SAVE_DIRECTORY.fullmatch(file.absolute().parent.name)
    return int(match[1]) if match else None
