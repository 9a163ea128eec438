"""What argparse takes as a value: paths and numbers that mean something, refused with a reason otherwise."""

import argparse
import math
from pathlib import Path

from utils.saved_runs import RUN_CONFIG_NAME


def path_of(text: str) -> Path:
    """A path; an empty one, such as an unset variable of a shell gives, would mean this folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return Path(text)


def config_file(text: str) -> Path:
    """A TOML file; a run's directory stands for the `config.toml` in it."""
    path = path_of(text)
    if path.is_dir() and not (path / RUN_CONFIG_NAME).is_file():
        raise argparse.ArgumentTypeError(f"{path} is a directory without {RUN_CONFIG_NAME}, so it is no run")
    return path / RUN_CONFIG_NAME if path.is_dir() else path


def positive_int(text: str) -> int:
    """A whole number above 0."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def seed(text: str) -> int:
    """A whole number from 0 to 2^63: with what is added to it, a seed of torch."""
    if not text.isascii() or not text.isdigit() or int(text) > 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63")
    return int(text)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
