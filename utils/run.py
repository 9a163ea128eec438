"""The steps of a run around the loop: world size, run directory, pipeline, resume, closing summary."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from utils.checkpoint import LoopState, load_checkpoint, read_state
from utils.config.schema import LoadedConfig, TrainConfig
from utils.data.sampler import BatchPlan
from utils.distributed import Processes, gather_objects, on_every_rank, on_main
from utils.errors import UserError
from utils.layers import TrainableModel
from utils.metrics import read_metrics
from utils.optim import build_optimizer
from utils.pipeline import Pipeline, build_pipeline
from utils.progress import announce
from utils.run_dir import RunDir, create_run_dir, find_run_dir, record_config, remove_leftovers
from utils.stage_plan import describe_plan, make_plan, plan_warnings
from utils.trainer import LossRecorder, Trainer, initial_state, total_steps

Say = Callable[[str], None]


@dataclass(frozen=True)
class Ready:
    """Everything that has to stand before the first step."""

    config: TrainConfig
    plan: BatchPlan
    model: TrainableModel
    pipeline: Pipeline
    recorder: LossRecorder
    processes: Processes


def speaker(processes: Processes) -> Say:
    """A function that prints on rank 0 and is silent elsewhere."""
    return announce if processes.is_main else lambda text: None


def check_world_size(config: TrainConfig, world_size: int) -> None:
    """The number of processes must be a multiple of `pipeline_stages`.

    Raises:
        UserError: it is not.
    """
    stages = config.pipeline_stages
    if world_size % stages:
        fits = world_size // stages * stages
        number = f"{fits} or {fits + stages}" if fits else f"{stages} (or a multiple)"
        started = "process that was" if world_size == 1 else "processes that were"
        error = UserError(
            f"pipeline_stages = {stages} does not divide the {world_size} {started} started. Start {number} processes, "
            "e.g. with deepspeed --num_gpus N or torchrun --nproc_per_node N, or change pipeline_stages"
        )
        error.on_every_rank = True
        raise error


def micro_batches_per_step(config: TrainConfig, world_size: int) -> int:
    """Micro-batches of one optimizer step over all copies of the model."""
    return config.gradient_accumulation_steps * (world_size // config.pipeline_stages)


def find_run(config: LoadedConfig, resume: str | None, plan: BatchPlan, say: Say) -> RunDir | None:
    """The run to continue, which may be finished. None where a new one begins.

    Raises:
        UserError: the run to continue does not fit this configuration.
    """
    if resume is None:
        return None
    found = on_main(lambda: find_run_dir(config, resume))
    if found is None:
        say(f"no run to continue in {config.train.output_dir}: starting at step 0")
        return None
    if found.checkpoint is None:
        say(f"{found.path} has no checkpoint yet: starting at step 0")
        return found
    state = on_main(lambda: read_state(Path(str(found.checkpoint))))
    total = total_steps(config.train, plan, state)
    if state.step >= total:
        say(f"{found.path} is finished ({state.step} of {total} steps); nothing to do")
        return replace(found, is_finished=True)
    on_main(lambda: record_config(found.path, config.train, state.step))
    say(f"continuing {found.path} from {found.checkpoint.name} ({state.step} of {total} steps done)")
    return found


def begin_run(config: LoadedConfig, describe: Callable[[Path], None], say: Say) -> RunDir:
    """Make the directory of a new run; `describe` writes into it what only the model knows.

    Raises:
        UserError: it cannot be written.
    """
    run = on_main(lambda: create_run_dir(config, describe))
    say(f"run directory: {run.path}")
    return run


def build(
    config: TrainConfig, plan: BatchPlan, model: TrainableModel, processes: Processes, say: Say
) -> Ready:
    """Build this process's stage of the model and say how the model was split.

    Raises:
        UserError: more stages than layers, or weights that cannot be read.
    """
    specs = on_every_rank(model.layer_specs)
    memory = device_memory(processes.device)
    stages = on_every_rank(lambda: make_plan(specs, config, memory))
    # Before anything is built: where it does not fit, this is the last that is said.
    for line in describe_plan(stages) + plan_warnings(stages, memory):
        say(line)
    recorder = LossRecorder()
    pipeline = on_every_rank(
        lambda: build_pipeline(
            specs,
            stages.bounds,
            recorder,
            lambda trainables, tables: build_optimizer(trainables, config.optimizer, tables),
            micro_batch_size=config.micro_batch_size_per_gpu,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            gradient_clipping=config.gradient_clipping,
            processes=processes,
        )
    )
    per_step = micro_batches_per_step(config, processes.world_size)
    say(
        f"{total_steps(config, plan, initial_state(per_step))} steps of {per_step} micro-batch(es); "
        f"{plan.batches_before(1)} micro-batches in the first epoch"
    )
    own = (pipeline.stage_id, sum(p.numel() for p in pipeline.trainables.values()))
    trained = dict(gather_objects(own))
    say(
        f"{pipeline.num_stages} stage(s) x {pipeline.dp_size} data-parallel; {config.gradient_accumulation_steps} "
        f"micro-batch(es) of {config.micro_batch_size_per_gpu} per step and copy; {sum(trained.values()):,} trained "
        f"parameters ({', '.join(f'{trained[stage]:,}' for stage in sorted(trained))})"
    )
    return Ready(config, plan, model, pipeline, recorder, processes)


def device_memory(device: torch.device) -> float | None:
    """Bytes of the GPU; None on a CPU."""
    return float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def run(
    ready: Ready, run_dir: RunDir, fingerprints: Mapping[str, str], metadata: Mapping[str, str], say: Say
) -> None:
    """Train to the end, from the run's checkpoint where it has one, and say what was made.

    Raises:
        UserError: the checkpoint does not fit this run.
        TrainingStoppedError: see `Trainer.run`.
    """
    per_step = micro_batches_per_step(ready.config, ready.processes.world_size)
    state = replace(initial_state(per_step), fingerprints=dict(fingerprints))
    on_main(lambda: remove_leftovers(run_dir.path))
    if run_dir.checkpoint is not None:
        checkpoint = run_dir.checkpoint
        stored = on_main(lambda: read_state(checkpoint))
        on_main(lambda: _check_fits(stored, state, checkpoint))
        on_every_rank(lambda: load_checkpoint(checkpoint, ready.pipeline))
        state = stored
    trainer = Trainer(
        ready.config,
        ready.plan,
        ready.model,
        ready.pipeline,
        ready.recorder,
        ready.processes,
        run_dir.path,
        metadata,
    )
    final = trainer.run(state)
    rows = read_metrics(run_dir.path) if ready.processes.is_main else []
    if rows:
        say(
            f"done: {final.step} steps, {final.samples_seen} samples, {final.train_seconds:.1f} s; loss "
            f"{rows[0]['loss']:.4f} at step 1, {rows[-1]['loss']:.4f} at step {rows[-1]['step']}"
        )
        for path in sorted(run_dir.path.glob("epoch*/*.safetensors")):
            say(f"  {path}")


def _check_fits(stored: LoopState, fresh: LoopState, checkpoint: Path) -> None:
    if stored.micro_batches_per_step != fresh.micro_batches_per_step:
        raise UserError(
            f"{checkpoint}: was made with {stored.micro_batches_per_step} micro-batches per step, this run has "
            f"{fresh.micro_batches_per_step}; choose gradient_accumulation_steps so that accumulation times data-parallel "
            "copies stays the same"
        )
    changed = [
        name for name in fresh.fingerprints if stored.fingerprints.get(name) != fresh.fingerprints[name]
    ]
    if changed:
        raise UserError(
            f"{checkpoint}: the content of {', '.join(changed)} has changed since it was made, so training would not be "
            "continued but go on from something else; put it back, or start a new run"
        )
