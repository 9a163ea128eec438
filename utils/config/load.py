"""Loading a training TOML and its dataset TOML: one call, one report of everything that is wrong.

Checking in order: syntax, overrides, what another trainer calls by other names, the schema, the guardrails, the dataset
TOML, and, where asked, files and headers. Only a syntax error of the training TOML ends it early. After this nothing reads TOML, and nothing edits the
configuration.
"""

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from utils.config.dataset_rules import DATASET_RULES
from utils.config.dump import config_hash, dump_config, dump_dataset
from utils.config.experts import on_each_side, settled
from utils.config.file_checks import (
    can_be_seen,
    check_adapter_paths,
    check_budget_paths,
    check_closed_form_paths,
    check_dataset_paths,
    check_model_paths,
    check_output_path,
    check_probe_paths,
    check_sample_paths,
)
from utils.config.foreign import check_clip_mode, translate_dataset, translate_training
from utils.config.guardrails import RULES
from utils.config.overrides import FLAG, Overridden, apply_overrides
from utils.config.parse import Parsed, parse_table
from utils.config.rules import run_rules
from utils.config.schema import DatasetConfig, LoadedConfig, Problem, TrainConfig
from utils.errors import UserError

__all__ = ["ConfigError", "config_hash", "dump_config", "dump_dataset", "load_config", "load_dataset"]

Preflight = Callable[[TrainConfig], list[Problem]]


class ConfigError(UserError):
    """Everything wrong with a configuration. `problems` has them one by one, the message all of them."""

    def __init__(self, path: str, problems: Sequence[Problem]) -> None:
        self.path = path
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n".join([f"{path}: {count}", *(f"  - {problem}" for problem in self.problems)]))


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    check_files: bool = False,
    preflight: Preflight | None = None,
) -> LoadedConfig:
    """Load and check a training TOML and the dataset TOML it names.

    Args:
        path: the training TOML.
        overrides: `key=VALUE` strings of `--set`, the last one winning.
        check_files: also check that every file and directory exists; without it only the TOMLs are read, and the
            dataset TOML need not exist.
        preflight: with `check_files`, checks the headers of the weights that `[model]` names, and what has to fit
            them. It is the caller's, because this package knows no model. Where `[adapter]`, `[budget]` or `[samples]`
            have problems already, it gets a configuration without them.

    Where one expert is trained, `[adapter]` of the result holds what `[adapter.<expert>]` says (`utils.config.experts`).

    Raises:
        ConfigError: with every problem found.
    """
    path = str(path)
    table, unreadable = _read_toml(path)
    if unreadable is not None:
        raise ConfigError(path, [unreadable])
    overridden = apply_overrides(table, overrides)
    foreign = translate_training(overridden.table, path)
    parsed = foreign.completed(
        parse_table(TrainConfig, foreign.table, file=path, others={"the dataset TOML": DatasetConfig})
    )
    read = partial(
        _load_named_dataset,
        parsed=parsed,
        path=path,
        must_exist=check_files,
        came_along=foreign.came_from_elsewhere,
    )
    dataset = read("dataset", parsed.draft.dataset)
    evals = [
        read(f"eval_datasets[{index}].config", named.config)
        for index, named in enumerate(parsed.draft.eval_datasets)
    ]
    problems = [*overridden.problems, *parsed.problems, *run_rules(RULES, parsed.draft, parsed.invalid, path)]
    notes = list(foreign.notes)
    for found in filter(None, (dataset, *evals)):
        # One dataset TOML may be named twice, as what is trained and as what is evaluated.
        problems += [problem for problem in found.problems if problem not in problems]
        notes += [note for note in found.notes if note not in notes]
    about_clips, is_refused = _check_clip_mode(foreign.clip_mode, parsed.draft, (dataset, *evals), path)
    (problems if is_refused else notes).extend(about_clips)
    if check_files:
        in_files = _check_files(parsed, {problem.key for problem in problems}, preflight)
        problems += [replace(problem, file=problem.file or path) for problem in in_files]
    if problems:
        raise ConfigError(path, [_name_flag(problem, overridden, path) for problem in problems])
    return LoadedConfig(
        settled(parsed.draft),
        dataset.value if dataset else None,
        path,
        parsed.draft.dataset,
        tuple(overrides),
        tuple(found.value for found in evals if found is not None and found.value is not None),
        tuple(_name_flag(note, overridden, path) for note in notes),
    )


def load_dataset(path: str | Path, *, check_files: bool = False) -> DatasetConfig:
    """Load and check a dataset TOML alone.

    Raises:
        ConfigError: with every problem found.
    """
    path = str(path)
    parsed = _parse_dataset(path, check_files)
    if parsed.value is None:
        raise ConfigError(path, parsed.problems)
    return parsed.value


def _check_clip_mode(
    mode: Any, config: TrainConfig, found: Sequence[Parsed[DatasetConfig] | None], path: str
) -> tuple[list[Problem], bool]:
    """`check_clip_mode` against the dataset TOMLs that were `found`: the one to train, then those to evaluate."""
    names = (config.dataset, *(named.config for named in config.eval_datasets))
    pairs = zip(names, found, strict=True)
    return check_clip_mode(mode, [(name, parsed.draft) for name, parsed in pairs if parsed is not None], path)


def _read_toml(path: str) -> tuple[dict[str, Any], Problem | None]:
    """The document at `path`, or an empty one and why it cannot be read."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8")), None
    except FileNotFoundError:
        return {}, Problem(path, "does not exist", "mend the path; it is relative to the working directory")
    except OSError as error:
        return {}, Problem(path, f"cannot be read ({error.strerror})", "name a readable TOML file")
    except UnicodeDecodeError as error:
        return {}, Problem(path, f"is not UTF-8 text (byte {error.start})", "save it as UTF-8")
    except (ValueError, RecursionError) as error:
        return {}, Problem(path, f"is not valid TOML: {error}", "mend the syntax there")


def _load_named_dataset(
    key: str, named: str, *, parsed: Parsed[TrainConfig], path: str, must_exist: bool, came_along: bool
) -> Parsed[DatasetConfig] | None:
    """The dataset TOML that a key of the training TOML names; None where that is unusable or the file may be missing."""
    if key in parsed.invalid:
        return None
    if can_be_seen(named):
        return _parse_dataset(named, must_exist, came_along)
    if not must_exist:
        return None
    fix = "mend the path; it is relative to the working directory"
    return _unreadable_dataset(Problem(key, f'"{named}" does not exist', fix, path))


def _parse_dataset(path: str, check_files: bool, came_along: bool = False) -> Parsed[DatasetConfig]:
    table, unreadable = _read_toml(path)
    if unreadable is not None:
        return _unreadable_dataset(unreadable)
    foreign = translate_dataset(table, path, came_along)
    parsed = foreign.completed(
        parse_table(DatasetConfig, foreign.table, file=path, others={"the training TOML": TrainConfig})
    )
    problems = [*parsed.problems, *run_rules(DATASET_RULES, parsed.draft, parsed.invalid, path)]
    if check_files and not parsed.invalid:
        problems += [replace(found, file=path) for found in check_dataset_paths(parsed.draft)]
    return replace(parsed, problems=tuple(problems))


def _unreadable_dataset(problem: Problem) -> Parsed[DatasetConfig]:
    return Parsed(parse_table(DatasetConfig, {}).draft, (problem,), frozenset())


def _check_files(parsed: Parsed[TrainConfig], faulty: set[str], preflight: Preflight | None) -> list[Problem]:
    """What is wrong with the files of the training TOML, as far as its keys are usable and not reported as `faulty`."""
    config = parsed.draft
    problems = [] if "output_dir" in parsed.invalid else check_output_path(config.output_dir)
    problems += _check_adapter_files(config)
    if config.adapter is not None and config.adapter.closed_form is not None:
        problems += check_closed_form_paths(config.adapter.closed_form)
    if config.budget is not None:
        problems += check_budget_paths(config.budget)
    if config.probes is not None:
        problems += check_probe_paths(config.probes)
    if config.samples is not None:
        problems += check_sample_paths(config.samples)
    if "model" in parsed.invalid:
        return problems
    problems += check_model_paths(config.model)
    if preflight is not None and not any(key.startswith("model.") for key in parsed.invalid):
        # A path that does not exist has been reported; the preflight would only say so again.
        reported = {problem.key for problem in problems}
        unusable = {key.split(".")[0] for key in (*parsed.invalid, *faulty, *reported)}
        if not {"adapter", "budget"}.isdisjoint(unusable):
            config = replace(config, adapter=None, budget=None)
        if "samples" in unusable:
            config = replace(config, samples=None)
        problems += [found for found in preflight(config) if found.key not in reported]
    return problems


@on_each_side
def _check_adapter_files(config: TrainConfig) -> list[Problem]:
    return [] if config.adapter is None else check_adapter_paths(config.adapter)


def _name_flag(problem: Problem, overridden: Overridden, path: str) -> Problem:
    """Point at `--set` instead of the file where the value at fault came from there."""
    return replace(problem, file=FLAG) if problem.file == path and problem.key in overridden.keys else problem
