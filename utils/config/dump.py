"""Writing a configuration out again: as TOML that reloads equal, and as a hash."""

import dataclasses
import json
from typing import Any

import tomli_w
import xxhash

from utils.config.schema import DatasetConfig, TrainConfig


def dump_config(config: TrainConfig) -> str:
    """The whole configuration, defaults included, as TOML. Loading it gives an equal `TrainConfig`."""
    return tomli_w.dumps(_without_none(dataclasses.asdict(config)))


def dump_dataset(dataset: DatasetConfig) -> str:
    """The whole dataset configuration, defaults included, as TOML. Loading it gives an equal `DatasetConfig`."""
    return tomli_w.dumps(_without_none(dataclasses.asdict(dataset)))


def config_hash(config: TrainConfig | DatasetConfig) -> str:
    """xxh3-128 of the values (as canonical JSON: sorted keys, no spaces, ASCII), as 32 hex digits."""
    text = json.dumps(dataclasses.asdict(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _without_none(value: Any) -> Any:
    """The same value without keys that are None: TOML has no such value, and every one is the default of its key."""
    if isinstance(value, dict):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, tuple):
        return [_without_none(inner) for inner in value]
    return value
