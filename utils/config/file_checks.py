"""The second check of a configuration: that the files and directories it names are there and usable."""

import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from utils.config.keywords import read_keywords
from utils.config.schema import (
    AdapterConfig,
    BudgetConfig,
    ClosedFormConfig,
    DatasetConfig,
    ModelConfig,
    ProbesConfig,
    Problem,
    SamplesConfig,
)
from utils.errors import UserError
from utils.prompt_files import read_prompt_file


def can_be_seen(path: str) -> bool:
    """Whether something is at `path`; False, never an error, also for a path that cannot be looked at (too long)."""
    return os.access(path, os.F_OK)


def check_model_paths(model: ModelConfig) -> list[Problem]:
    """Every weight file or directory that `[model]` names exists, and the keyword file can be read."""
    names = [field.name for field in fields(model) if field.name.endswith("_path")]
    named = {name: path for name in names if (path := getattr(model, name)) is not None}
    problems = [problem for name, path in named.items() for problem in _check_exists(f"model.{name}", path)]
    if model.caption_aug is not None and model.caption_aug.keywords_file is not None:
        problems += _check_keywords_file("model.caption_aug.keywords_file", model.caption_aug.keywords_file)
    return problems


def check_output_path(output_dir: str) -> list[Problem]:
    """`output_dir` exists and is writable, or can be made; nothing is made."""
    return _check_can_be_made("output_dir", output_dir)


def check_adapter_paths(adapter: AdapterConfig) -> list[Problem]:
    """The files that `[adapter]` names exist."""
    problems = []
    if adapter.include_file is not None:
        problems += _check_exists("adapter.include_file", adapter.include_file, only_file=True)
    if adapter.init_from_existing is not None:
        problems += _check_exists("adapter.init_from_existing", adapter.init_from_existing)
    return problems


def check_closed_form_paths(closed_form: ClosedFormConfig) -> list[Problem]:
    """The files of prompts and keywords can be read, and the reports' directory can be made; nothing is made."""
    section = "adapter.closed_form"
    problems = _check_prompts(f"{section}.prompts", closed_form.prompts)
    problems += _check_prompts(f"{section}.domain_prompts", closed_form.domain_prompts)
    if closed_form.keywords_file is not None:
        problems += _check_keywords_file(f"{section}.keywords_file", closed_form.keywords_file)
    if closed_form.reports_dir is not None:
        problems += _check_can_be_made(f"{section}.reports_dir", closed_form.reports_dir)
    return problems


def check_dataset_paths(dataset: DatasetConfig) -> list[Problem]:
    """Every `[[directory]]` and its `mask_path` can be listed, and `cache_dir` can be made."""
    problems = [] if dataset.cache_dir is None else _check_can_be_made("cache_dir", dataset.cache_dir)
    for index, directory in enumerate(dataset.directory):
        problems += _check_directory(f"directory[{index}].path", directory.path)
        if directory.mask_path is not None:
            problems += _check_directory(f"directory[{index}].mask_path", directory.mask_path, "the masks")
    return problems


def _check_can_be_made(key: str, path: str) -> list[Problem]:
    place = next(place for place in _self_and_parents(path) if os.path.lexists(place))
    if not place.is_dir():
        return [Problem(key, f'"{path}" cannot be made: {place} is not a directory', "choose another place")]
    if not os.access(place, os.W_OK | os.X_OK):
        return [
            Problem(
                key,
                f'"{path}" cannot be written: {place} is not writable',
                "choose another place or mend its rights",
            )
        ]
    return []


def check_budget_paths(budget: BudgetConfig) -> list[Problem]:
    """The file of neutral prompts can be read."""
    return _check_prompts("budget.neutral_prompts", budget.neutral_prompts)


def check_probe_paths(probes: ProbesConfig) -> list[Problem]:
    """`probes.reports_dir` exists and is writable, or can be made; nothing is made."""
    return _check_can_be_made("probes.reports_dir", probes.reports_dir)


def check_sample_paths(samples: SamplesConfig) -> list[Problem]:
    """The files of prompts can be read, the image exists, and `samples.reports_dir` can be made; nothing is made."""
    problems = _check_prompts("samples.prompts", samples.prompts)
    problems += _check_prompts("samples.domain_prompts", samples.domain_prompts)
    if samples.image is not None:
        problems += _check_exists("samples.image", samples.image)
    if samples.reports_dir is not None:
        problems += _check_can_be_made("samples.reports_dir", samples.reports_dir)
    return problems


def _check_prompts(key: str, path: str | None) -> list[Problem]:
    if path is None:
        return []
    try:
        read_prompt_file(path)
    except UserError as error:
        fix = "name a UTF-8 text file with one prompt per line; its path is relative to the working directory"
        return [Problem(key, str(error), fix)]
    return []


def _check_exists(key: str, path: str, only_file: bool = False) -> list[Problem]:
    if not can_be_seen(path):
        return [
            Problem(key, f'"{path}" does not exist', "mend the path; it is relative to the working directory")
        ]
    if only_file and not Path(path).is_file():
        return [Problem(key, f'"{path}" is not a file', "name a text file with one module path per line")]
    return []


def _check_keywords_file(key: str, path: str) -> list[Problem]:
    try:
        read_keywords(path)
    except UserError as error:
        fix = (
            "name a UTF-8 text file with one keyword per line; its path is relative to the working directory"
        )
        return [Problem(key, str(error), fix)]
    return []


def _check_directory(key: str, path: str, content: str = "the images and videos") -> list[Problem]:
    missing = _check_exists(key, path)
    if missing:
        return missing
    if not Path(path).is_dir():
        return [Problem(key, f'"{path}" is not a directory', f"name the folder that holds {content}")]
    if not os.access(path, os.R_OK | os.X_OK):
        return [Problem(key, f'"{path}" cannot be listed', "mend its rights")]
    return []


def _self_and_parents(path: str) -> Iterator[Path]:
    place = Path(path).absolute()
    yield place
    yield from place.parents
