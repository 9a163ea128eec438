"""Rules about evaluation: its datasets have names, its keys are read, its quantiles make sense."""

import re
from dataclasses import fields

from utils.config.introspect import keys_of
from utils.config.rules import Rule
from utils.config.schema import Problem, TrainConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_EVAL_KEYS = tuple(key.name for key in fields(TrainConfig) if key.name.startswith("eval_"))


def check_eval_keys_are_read(config: TrainConfig) -> list[Problem]:
    """eval_* keys need eval_datasets, without which nothing would read them."""
    if config.eval_datasets:
        return []
    keys = keys_of(TrainConfig)
    given = [name for name in _EVAL_KEYS if getattr(config, name) != keys[name].default]
    reason, fix = "would be ignored: there are no eval_datasets", "take it out, or add eval_datasets"
    return [Problem(name, reason, fix) for name in given]


def check_eval_is_due(config: TrainConfig) -> list[Problem]:
    """eval_datasets need a time: eval_every_n_epochs, eval_every_n_steps or eval_before_first_step."""
    due = config.eval_before_first_step or config.eval_every_n_epochs or config.eval_every_n_steps
    if not config.eval_datasets or due:
        return []
    reason = "would be ignored: no key says when to evaluate"
    return [Problem("eval_datasets", reason, "set eval_every_n_epochs or eval_every_n_steps, or take it out")]


def check_eval_names(config: TrainConfig) -> list[Problem]:
    """Names of eval_datasets are distinct and can be names of files."""
    problems, seen = [], set()
    for index, dataset in enumerate(config.eval_datasets):
        key, label = f"eval_datasets[{index}].name", dataset.label
        fix = 'give it a name of its own, e.g. name = "holdout"'
        if not _NAME.fullmatch(label):
            reason = f"is {label!r}; letters, digits, `_`, `-` and `.` make a name, and a letter or digit begins it"
            problems.append(Problem(key, reason, fix))
        elif label.lower() in seen:
            problems.append(Problem(key, f"is {label!r} for the second time", fix))
        seen.add(label.lower())
    return problems


def check_eval_names_of_first_frames(config: TrainConfig) -> list[Problem]:
    """With first_frame_prob no name is that of another dataset's image-conditioned evaluation, NAME.first_frame."""
    if config.model.first_frame_prob == 0:
        return []
    taken = {dataset.first_frame_label.lower() for dataset in config.eval_datasets}
    fix = 'give it a name of its own, e.g. name = "holdout"'
    return [
        Problem(
            f"eval_datasets[{index}].name",
            f"is {dataset.label!r}, which with first_frame_prob is the name of another one's image-conditioned evaluation",
            fix,
        )
        for index, dataset in enumerate(config.eval_datasets)
        if dataset.label.lower() in taken
    ]


def check_eval_quantiles(config: TrainConfig) -> list[Problem]:
    """eval_quantiles holds at least one value, and each once."""
    quantiles = config.eval_quantiles
    if quantiles and len(set(quantiles)) == len(quantiles):
        return []
    reason = f"is {list(quantiles)}; it needs at least one value, and each once"
    return [Problem("eval_quantiles", reason, "e.g. [0.1, 0.3, 0.5, 0.7, 0.9]")]


EVAL_RULES = (
    Rule(check_eval_keys_are_read, _EVAL_KEYS),
    Rule(
        check_eval_is_due,
        ("eval_datasets", "eval_before_first_step", "eval_every_n_epochs", "eval_every_n_steps"),
    ),
    Rule(check_eval_names, ("eval_datasets[].name", "eval_datasets[].config")),
    Rule(
        check_eval_names_of_first_frames,
        ("eval_datasets[].name", "eval_datasets[].config", "model.first_frame_prob"),
    ),
    Rule(check_eval_quantiles, ("eval_quantiles",)),
)
