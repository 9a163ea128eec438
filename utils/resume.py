"""Whether and how a run goes on: what has changed since its checkpoint, what of that is allowed, and from where.

A step of the continued run computes what the same step of an uninterrupted one would have. What cannot change that is
free (how far, how split, when saved); everything else that has changed is refused, unless its name is given.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from utils.checkpoint import LoopState, read_state
from utils.config.changes import Change, config_changes, is_allowed, parse_allowed
from utils.config.load import load_config
from utils.config.schema import LoadedConfig, TrainConfig
from utils.data.sampler import BatchPlan
from utils.distributed import on_main
from utils.errors import UserError
from utils.run_dir import CONFIG_FILE, RunDir, find_run_dir
from utils.trainer import total_steps

_SAMPLES_PER_BATCH = "micro_batch_size_per_gpu"
_ACCUMULATION = "gradient_accumulation_steps"
_OPTIMIZER = "optimizer.type"
_DATASET = "dataset"


@dataclass(frozen=True)
class Inputs:
    """What a run rests on, by what it is ("the dataset"): a fingerprint of its content, and what it is in words."""

    fingerprints: dict[str, str]
    descriptions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Continuation:
    """A run that goes on: its directory, the configuration to go on with, and whether there is nothing left to do.

    Attributes:
        run_dir: with the checkpoint to load, if there is one yet.
        config: as given, but for the accumulation that keeps the global batch.
        is_finished: all steps are done.
    """

    run_dir: RunDir
    config: LoadedConfig
    is_finished: bool = False


def find_run(
    config: LoadedConfig,
    resume: str | None,
    allowed: str | None,
    plan: BatchPlan,
    inputs: Inputs,
    copies: int,
    say: Callable[[str], None],
) -> Continuation | None:
    """The run to continue. None where a new one begins. Every rank must call it. Nothing is written.

    Args:
        config: what the user gives now.
        resume: value of `--resume_from_checkpoint`; None where the flag is not there.
        allowed: value of `--allow_changed`.
        plan: order of the micro-batches.
        inputs: what training rests on now.
        copies: data-parallel copies of the model.
        say: prints on rank 0.

    Raises:
        UserError: the run to continue does not fit; each difference is named.
    """
    if resume is None:
        return None
    names = on_main(lambda: parse_allowed(allowed, [input_name(what) for what in inputs.fingerprints]))
    found = on_main(lambda: find_run_dir(config, resume))
    if found is None:
        say(f"no run to continue in {config.train.output_dir}: starting at step 0")
        return None
    stored = on_main(lambda: None if found.checkpoint is None else read_state(found.checkpoint))
    changes = on_main(lambda: _changes(found, stored, config.train, inputs, names))
    for change in changes:
        say(f"changed, as allowed: {change}")
    if stored is None or found.checkpoint is None:
        say(f"{found.path} has no checkpoint yet: starting at step 0")
        return Continuation(found, config)

    checkpoint = found.checkpoint
    settings = on_main(lambda: keep_global_batch(config.train, stored, copies, names, checkpoint))
    if settings != config.train:
        say(
            f"{_ACCUMULATION} = {settings.gradient_accumulation_steps} instead of "
            f"{config.train.gradient_accumulation_steps}: with {copies} data-parallel copies that keeps the "
            f"{stored.micro_batches_per_step} micro-batches of a step of this run"
        )
    state = replace(
        stored,
        fingerprints=dict(inputs.fingerprints),
        descriptions=dict(inputs.descriptions),
        micro_batches_per_step=settings.gradient_accumulation_steps * copies,
    )
    keys = {change.key for change in changes}
    if keys & {_SAMPLES_PER_BATCH, _DATASET}:
        state = replace(state, micro_batches_seen=position_after(plan, stored.samples_seen))
    # By what the checkpoint holds, not by the configuration: a run may have been killed before it saved with another one.
    with_optimizer = _OPTIMIZER not in keys and stored.optimizer in ("", settings.optimizer.type)
    if not with_optimizer:
        say("another optimizer: its state begins anew")
    total = total_steps(settings, plan, state)
    if state.step >= total:
        say(f"{found.path} is finished ({state.step} of {total} steps); nothing to do")
        return Continuation(found, config, is_finished=True)
    say(f"continuing {found.path} from {checkpoint.name} ({state.step} of {total} steps done)")
    run_dir = replace(found, state=state, with_optimizer=with_optimizer)
    return Continuation(run_dir, replace(config, train=settings))


def input_name(what: str) -> str:
    """The name to allow a changed input by: `text_encoder` for "the text encoder"."""
    return what.removeprefix("the ").lower().replace(" ", "_")


def _changes(
    found: RunDir, stored: LoopState | None, now: TrainConfig, inputs: Inputs, allowed: frozenset[str]
) -> list[Change]:
    """Everything that has changed, all of it allowed.

    Raises:
        UserError: something has changed that is not allowed.
    """
    changes = config_changes(load_config(found.path / CONFIG_FILE).train, now)
    if stored is not None:
        changes += input_changes(stored, inputs)
    refused = [change for change in changes if not is_allowed(change.key, allowed)]
    if refused:
        names = ",".join(sorted(allowed | {change.key for change in refused}))
        raise UserError(
            f"{found.path}: the run was made with something else, so this would not continue it but go on as another run "
            "(the run's -> yours):\n"
            + "\n".join(f"  {change}" for change in refused)
            + f"\nput these back, allow them by name with --allow_changed {names}, or start a new run without "
            "--resume_from_checkpoint"
        )
    return changes


def input_changes(stored: LoopState, inputs: Inputs) -> list[Change]:
    """Inputs whose content is not that of the checkpoint."""
    changes = []
    for what, digest in inputs.fingerprints.items():
        before = stored.fingerprints.get(what)
        if before != digest:
            then = stored.descriptions.get(what, "not known") if before is not None else "(none)"
            now = inputs.descriptions.get(what, "other content")
            if then == now:
                now += ", with other content"
            changes.append(Change(input_name(what), then, now))
    return changes


def keep_global_batch(
    config: TrainConfig, stored: LoopState, copies: int, allowed: frozenset[str], checkpoint: Path
) -> TrainConfig:
    """The configuration with the accumulation with which a step has as many micro-batches as before.

    Raises:
        UserError: the copies cannot share them evenly.
    """
    wanted = stored.micro_batches_per_step
    if config.gradient_accumulation_steps * copies == wanted or _ACCUMULATION in allowed:
        return config
    if wanted % copies:
        fitting = ", ".join(str(number) for number in range(1, wanted + 1) if wanted % number == 0)
        raise UserError(
            f"{checkpoint}: a step of this run has {wanted} micro-batches, and {copies} data-parallel copies cannot share "
            f"them evenly; start {fitting} copies (processes / pipeline_stages), or change the global batch on purpose "
            f"with --allow_changed {_ACCUMULATION}"
        )
    return replace(config, gradient_accumulation_steps=wanted // copies)


def position_after(plan: BatchPlan, num_samples: int) -> int:
    """The first position of the stream before which at least so many samples were seen.

    Where data or the size of micro-batches have changed, the old position has no meaning; the number of samples has.
    """
    epoch = 0
    while sum(plan.visits_before(epoch + 1)) <= num_samples:
        epoch += 1
    seen, position = sum(plan.visits_before(epoch)), plan.batches_before(epoch)
    for batch in plan.epoch_batches(epoch):
        if seen >= num_samples:
            break
        seen += len(batch.visits)
        position += 1
    return position
