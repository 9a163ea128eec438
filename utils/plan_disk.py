"""Disk space that a run takes: checkpoints, exports, and what of it is free."""

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from utils.config.schema import TrainConfig
from utils.number_bytes import state_bytes_per_weight, trained_bytes


@dataclass(frozen=True)
class RunDisk:
    """Bytes of a run's directory.

    Attributes:
        checkpoint: of one checkpoint.
        checkpoints: of all that are there at once: those that are kept, and the one being written.
        export: of one `epochN` or `stepN`.
        exports: of all of them, which are never removed; None where the number of steps is not known.
    """

    checkpoint: float
    checkpoints: float
    export: float
    exports: float | None


def run_disk(
    config: TrainConfig,
    num_trained: float,
    export_bytes: float,
    steps: int | None,
    steps_per_epoch: float | None,
) -> RunDisk:
    """What a run of so many steps leaves in its directory.

    Args:
        config: the run.
        num_trained: trained weights.
        export_bytes: of one adapter or encoder.
        steps: of the whole run, where it is known.
        steps_per_epoch: the same of an epoch.
    """
    one = num_trained * (trained_bytes(config.optimizer) + state_bytes_per_weight(config.optimizer))
    exports = None
    if steps is not None and steps_per_epoch is not None:
        exports = export_bytes * _num_exports(config, steps, steps_per_epoch)
    return RunDisk(one, one * (config.keep_checkpoints + 1), export_bytes, exports)


def free_bytes(path: Path) -> int | None:
    """Bytes that are free where `path` is or will be made; None where that cannot be asked."""
    place = path.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def _num_exports(config: TrainConfig, steps: int, steps_per_epoch: float) -> int:
    """Saves by epoch, by step, and the last one, which comes at the end in any case and may be one by epoch."""
    number = 1
    if config.save_every_n_epochs:
        ended = int(
            steps / steps_per_epoch + 1e-9
        )  # epoch N ends in the step in which its last micro-batch is seen
        number += ended // config.save_every_n_epochs
        ends_with_one = ended > 0 and ended % config.save_every_n_epochs == 0
        if ends_with_one and math.ceil(ended * steps_per_epoch - 1e-9) == steps:
            number -= 1
    if config.save_every_n_steps is not None:
        number += steps // config.save_every_n_steps
    return number
