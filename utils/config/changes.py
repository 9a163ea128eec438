"""What may differ between a run and its continuation, and the differences in words."""

import tomllib
from collections.abc import Collection
from dataclasses import fields
from typing import NamedTuple

from utils.config.dump import dump_config
from utils.config.introspect import dotted, keys_of, sections_of
from utils.config.schema import SamplesConfig, TrainConfig
from utils.errors import UserError

# How far a run goes, how it is split, when it saves, how it caches: nothing that a step computes.
# `dataset` is the path; its content is compared by fingerprint. The global batch is kept whatever the accumulation.
FREE_KEYS = frozenset(
    {
        "output_dir",
        "dataset",
        "epochs",
        "max_steps",
        "pipeline_stages",
        "zero_stage",
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
        "model.save_text_encoder_format",
        "caching_batch_size",
        "decode_workers",
        "activation_checkpointing",
        "blocks_to_swap",
        "adapter.closed_form.device",
        "adapter.closed_form.reports_dir",
        "eval_datasets",
        "eval_before_first_step",
        "eval_every_n_epochs",
        "eval_every_n_steps",
        "eval_quantiles",
        "eval_micro_batch_size_per_gpu",
        "probes.run",
        "probes.every_n_epochs",
        "probes.timeout_minutes",
        "probes.on_fail",
        "probes.reports_dir",
        *(f"samples.{field.name}" for field in fields(SamplesConfig)),
    }
)


class Change(NamedTuple):
    """One difference: the name to allow it by, what was, and what is."""

    key: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.now}"


def config_changes(before: TrainConfig, now: TrainConfig) -> list[Change]:
    """Keys that differ, in alphabetical order; those that may always differ are left out."""
    old, new = _flatten(dump_config(before)), _flatten(dump_config(now))
    return [
        Change(key, old.get(key, "(not set)"), new.get(key, "(not set)"))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in FREE_KEYS
    ]


def parse_allowed(text: str | None, inputs: Collection[str]) -> frozenset[str]:
    """The names in `--allow_changed`: keys or tables of the configuration, or `inputs` (what fingerprints name).

    Raises:
        UserError: a name is none of these.
    """
    names = frozenset(name.strip() for name in (text or "").split(",") if name.strip())
    tables = sections_of(TrainConfig)
    known = {dotted(table.path, name) for table in tables for name in keys_of(table.record)} | set(inputs)
    unknown = sorted(names - known)
    if unknown:
        raise UserError(
            f"--allow_changed {unknown[0]}: is neither a key of the configuration nor one of {', '.join(sorted(inputs))}; "
            "the message that refuses to continue gives the names"
        )
    return names


def is_allowed(key: str, allowed: Collection[str]) -> bool:
    """Whether a key, or a table around it, is among the allowed names."""
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


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
