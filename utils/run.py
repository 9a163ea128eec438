"""The steps of a run around the loop: world size, run directory, pipeline, resume, closing summary."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from utils.budget import Drift
from utils.checkpoint import LoopState, checkpoint_name, load_checkpoint
from utils.config.schema import BudgetConfig, LoadedConfig, TrainConfig
from utils.data.sampler import BatchPlan
from utils.distributed import Processes, gather_objects, limit_waits, on_every_rank, on_main
from utils.errors import UserError
from utils.evaluate import EvalSet, Evaluator
from utils.layers import LayerSpec, TrainableModel
from utils.loss_recorder import LossRecorder
from utils.metrics import read_metrics
from utils.nodes import check_seen
from utils.optim import build_optimizer
from utils.pipeline import Pipeline, build_pipeline
from utils.probe_outcomes import describe_outcomes, read_outcomes
from utils.probe_plan import plan_probes
from utils.probe_runner import check_scripts
from utils.progress import announce
from utils.resume import Inputs
from utils.run_dir import CONFIG_FILE, RunDir, create_run_dir, record_config, remove_leftovers
from utils.run_probes import TrainingProbes
from utils.stage_plan import StagePlan, describe_plan, make_plan, plan_warnings
from utils.trainer import Trainer, initial_state, total_steps

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


@dataclass(frozen=True)
class Ended:
    """How a run ended: where it is, what stopped it before its last step, and whether it was asked to stop at all."""

    state: LoopState
    stopped_by: str | None
    is_told_to_stop: bool


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


def begin_run(config: LoadedConfig, describe: Callable[[Path], None], say: Say) -> RunDir:
    """Make the directory of a new run; `describe` writes into it what only the model knows.

    Raises:
        UserError: it cannot be written.
    """
    run = on_main(lambda: create_run_dir(config, describe))
    say(f"run directory: {run.path}")
    return run


def plan_stages(
    config: TrainConfig, model: TrainableModel, processes: Processes
) -> tuple[Sequence[LayerSpec], StagePlan]:
    """The model's layers, and which stage gets which, from headers alone. Every rank must call it.

    Raises:
        UserError: more stages than layers, or a probe that is to run is not there.
    """
    on_every_rank(lambda: check_scripts(plan_probes(config)))
    specs = on_every_rank(model.layer_specs)
    memory = device_memory(processes.device)
    copies = processes.world_size // config.pipeline_stages
    return specs, on_every_rank(lambda: make_plan(specs, config, memory, copies))


def build(
    config: TrainConfig, plan: BatchPlan, model: TrainableModel, processes: Processes, say: Say
) -> Ready:
    """Build this process's stage of the model and say how the model was split.

    Raises:
        UserError: more stages than layers, or weights that cannot be read.
    """
    specs, stages = plan_stages(config, model, processes)
    memory = device_memory(processes.device)
    # Before anything is built: where it does not fit, this is the last that is said.
    for line in describe_plan(stages) + plan_warnings(stages, memory):
        say(line)
    recorder = LossRecorder()
    pipeline = on_every_rank(
        lambda: build_pipeline(
            specs,
            stages.bounds,
            recorder,
            lambda trainables, tables, copies: build_optimizer(
                trainables, config.optimizer, tables, copies if config.zero_stage else None
            ),
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
    if config.zero_stage and pipeline.dp_size == 1:
        say("zero_stage = 1 changes nothing here: there is one copy, which keeps the optimizer's state")
    return Ready(config, plan, model, pipeline, recorder, processes)


def _within_budget(row: Mapping[str, Any], budget: BudgetConfig | None) -> str:
    """What the last step's metrics say about `[budget]`, as the end of a sentence."""
    if row.get("neutral_drift") is not None:
        return f"; drift of the neutral prompts {row['neutral_drift']:.4f}"
    if row.get("max_delta_ratio") is not None:
        largest, mean = row["max_delta_ratio"], row["mean_delta_ratio"]
        is_scaled = (
            budget is not None
            and budget.action == "project"
            and (largest > budget.max_delta_ratio or mean > (budget.max_mean_delta_ratio or math.inf))
        )
        scaled = " (what is saved is scaled onto the caps)" if is_scaled else ""
        return f"; ||dW|| / ||W|| at most {largest:.4f}, {mean:.4f} on average{scaled}"
    return ""


def device_memory(device: torch.device) -> float | None:
    """Bytes of the GPU; None on a CPU."""
    return float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def run(
    ready: Ready,
    run_dir: RunDir,
    inputs: Inputs,
    metadata: Mapping[str, str],
    say: Say,
    eval_sets: Sequence[EvalSet] = (),
    drift: Drift | None = None,
) -> Ended:
    """Train to the end, from the run's checkpoint where it has one, and say what was made.

    Raises:
        UserError: the checkpoint is damaged, or does not fit what is trained.
        TrainingStoppedError: see `Trainer.run`.
    """
    per_step = micro_batches_per_step(ready.config, ready.processes.world_size)
    state = replace(
        initial_state(per_step),
        fingerprints=dict(inputs.fingerprints),
        descriptions=dict(inputs.descriptions),
    )
    check_seen({f"the run directory {run_dir.path}": run_dir.path / CONFIG_FILE}, ready.processes)
    on_main(lambda: remove_leftovers(run_dir.path))
    if drift is not None:  # before a checkpoint is loaded: these are still the base's weights
        drift.begin(ready.pipeline)
        ready.recorder.clear()
    if run_dir.checkpoint is not None and run_dir.state is not None:
        checkpoint, state = run_dir.checkpoint, run_dir.state
        on_every_rank(
            lambda: load_checkpoint(checkpoint, ready.pipeline, with_optimizer=run_dir.with_optimizer)
        )
    state = replace(state, optimizer=ready.config.optimizer.type)
    # Only now: a run that cannot go on keeps the configuration of what is in it.
    on_main(lambda: record_config(run_dir.path, ready.config, state.step))
    evaluator = Evaluator(
        ready.config, eval_sets, ready.model, ready.pipeline, ready.recorder, ready.processes
    )
    planned = plan_probes(ready.config)
    probes = TrainingProbes(planned, ready.processes) if planned else None
    limit_waits(ready.config.timeout_minutes)
    trainer = Trainer(
        ready.config,
        ready.plan,
        ready.model,
        ready.pipeline,
        ready.recorder,
        ready.processes,
        run_dir.path,
        metadata,
        evaluator if eval_sets else None,
        drift,
        probes,
    )
    final = trainer.run(state)
    _say_end(ready, trainer, run_dir, final, say)
    if probes is not None:
        if ready.processes.is_main:
            for line in describe_outcomes(read_outcomes(run_dir.path)):
                say(f"  {line}")
        probes.raise_if_failed(run_dir.resume_path, is_complete=trainer.stopped_by is None)
    return Ended(final, trainer.stopped_by, trainer.is_told_to_stop())


def _say_end(ready: Ready, trainer: Trainer, run_dir: RunDir, final: LoopState, say: Say) -> None:
    """Where the run stopped, or what it has made."""
    if trainer.stopped_by is not None:
        say(
            f"stopped by {trainer.stopped_by} after step {final.step} of {trainer.total_steps}; everything up to here is in "
            f"{run_dir.path / checkpoint_name(final.step)}. To go on, give the same command with "
            f"--resume_from_checkpoint {run_dir.resume_path}"
        )
        return
    rows = read_metrics(run_dir.path) if ready.processes.is_main else []
    if rows:
        say(
            f"done: {final.step} steps, {final.samples_seen} samples, {final.train_seconds:.1f} s; loss "
            f"{rows[0]['loss']:.4f} at step 1, {rows[-1]['loss']:.4f} at step {rows[-1]['step']}"
            f"{_within_budget(rows[-1], ready.config.budget)}"
        )
        for path in sorted(run_dir.path.glob("epoch*/*")):
            if path.suffix in (".safetensors", ".pth"):
                say(f"  {path}")
