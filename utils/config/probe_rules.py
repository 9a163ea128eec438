"""Which probes can run on the saves of a training run, what they are pointed at, and the rules about `[probes]`."""

import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from utils.config.rules import Rule
from utils.config.schema import Problem, TrainConfig


@dataclass(frozen=True)
class TrainingProbe:
    """A probe that looks at what a run has saved.

    Attributes:
        mode: the mode whose saves it can read.
        flag: the flag that names the directory of a save, `epochN/`.
    """

    mode: Literal["dit_lora", "encoder_ft"]
    flag: str


# Each also takes --config (the run's config.toml), --run_tag and --reports_dir.
TRAINING_PROBES = {
    "lora_delta_budget": TrainingProbe("dit_lora", "--adapter"),
    "attn_logit_probe": TrainingProbe("dit_lora", "--adapter"),
    "dit_lora_translator": TrainingProbe("dit_lora", "--adapter"),
    "te_eval": TrainingProbe("encoder_ft", "--text_encoder"),
}
_NOT_ABOUT_SAVES = {
    "weights_inspect": "describes checkpoints by their headers, which saves of one run have in common",
    "dataset_inspect": "looks at the dataset, which no save changes",
    "cache_check": "looks at the cache, which no save changes",
}
SAMPLES_PROBE = "prompt_grid"
_WHAT_IS_SAVED = {"dit_lora": "an adapter", "encoder_ft": "a text encoder"}


def probes_of(mode: str) -> list[str]:
    """Names of the probes that can run on the saves of a mode."""
    return [name for name, probe in TRAINING_PROBES.items() if probe.mode == mode]


def check_probe_names(config: TrainConfig) -> list[Problem]:
    """probes.run names at least one probe, each once, and each one that can look at a save of this mode."""
    if config.probes is None:
        return []
    names = config.probes.run
    mode = "encoder_ft" if config.model.train_text_encoder else "dit_lora"
    there = f"for {mode} there are {', '.join(probes_of(mode))}"
    if not names:
        return [Problem("probes.run", "is empty, so [probes] would be ignored", f"{there}; or take it out")]
    problems = []
    for index, name in enumerate(names):
        key = f"probes.run[{index}]"
        probe = TRAINING_PROBES.get(name)
        if name in names[:index]:
            problems.append(Problem(key, f'names "{name}" for the second time', "name it once"))
        elif probe is None:
            problems.append(_unknown(key, name, there))
        elif probe.mode != mode:
            reason = (
                f'"{name}" looks at {_WHAT_IS_SAVED[probe.mode]}, and {mode} saves {_WHAT_IS_SAVED[mode]}'
            )
            problems.append(Problem(key, reason, there))
    return problems


def _unknown(key: str, name: str, there: str) -> Problem:
    if name == SAMPLES_PROBE:
        reason = f'"{name}" has a section of its own, which says what it draws'
        return Problem(key, reason, f"write [samples]; {there}")
    if name in _NOT_ABOUT_SAVES:
        reason = f'"{name}" cannot run after a save: it {_NOT_ABOUT_SAVES[name]}'
        return Problem(key, reason, f"start it by hand; {there}")
    close = get_close_matches(name.lower(), [*TRAINING_PROBES, *_NOT_ABOUT_SAVES], n=1)
    return Problem(
        key, f'there is no probe "{name}"', f'did you mean "{close[0]}"? {there}' if close else there
    )


def check_probe_reports_place(config: TrainConfig) -> list[Problem]:
    """probes.reports_dir and output_dir are not inside each other."""
    if config.probes is None:
        return []
    reports, output = (
        Path(os.path.realpath(path)) for path in (config.probes.reports_dir, config.output_dir)
    )
    if not (reports.is_relative_to(output) or output.is_relative_to(reports)):
        return []
    reason = (
        f'is "{config.probes.reports_dir}" and output_dir is "{config.output_dir}": training output and the reports of '
        "probes never mix"
    )
    return [Problem("probes.reports_dir", reason, 'choose places apart, e.g. "reports" and "output/<name>"')]


PROBE_RULES = (
    Rule(check_probe_names, ("probes", "model.train_text_encoder", "model.cache_text_embeddings")),
    Rule(check_probe_reports_place, ("probes.reports_dir", "output_dir")),
)
