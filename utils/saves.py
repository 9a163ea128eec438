"""What is saved after a step, by the configuration alone."""

from dataclasses import dataclass

from utils.checkpoint import LoopState
from utils.config.schema import TrainConfig
from utils.data.sampler import BatchPlan


@dataclass(frozen=True)
class DueSaves:
    """What is saved after a step: the adapter or encoder under its epoch's or its step's name, a checkpoint."""

    epoch: int
    of_epoch: bool
    of_step: bool
    checkpoint: bool

    @property
    def any(self) -> bool:
        """Whether anything is."""
        return self.of_epoch or self.of_step or self.checkpoint


def due_saves(
    config: TrainConfig, plan: BatchPlan, state: LoopState, before: LoopState, total_steps: int
) -> DueSaves:
    """What is due after the step that led from `before` to `state`; the last one saves everything."""
    step = state.step
    at_end = step == total_steps
    completed = plan.epoch_of(state.micro_batches_seen)
    ended = completed > plan.epoch_of(before.micro_batches_seen)
    number = completed if ended else completed + 1

    def every(interval: int | None, count: int) -> bool:
        return interval is not None and interval > 0 and count % interval == 0

    by_epoch = ended and every(config.checkpoint_every_n_epochs, number)
    return DueSaves(
        epoch=number,
        of_epoch=(ended and every(config.save_every_n_epochs, number)) or at_end,
        of_step=every(config.save_every_n_steps, step),
        checkpoint=by_epoch or every(config.checkpoint_every_n_steps, step) or at_end,
    )
