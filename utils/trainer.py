"""The training loop. It knows data order, steps, metrics and files, and nothing of the model it trains."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from utils.budget import Budget, Drift
from utils.checkpoint import LoopState, latest_checkpoint
from utils.checkpoint_writer import CheckpointWriter, SaveTimes, WriteFlags
from utils.compiled import graphs_compiled
from utils.config.schema import TrainConfig
from utils.data.prefetch import ReadAhead
from utils.data.sampler import BatchPlan, MicroBatch, rank_slice
from utils.distributed import Processes, gather_objects, is_shared, on_every_rank, on_main
from utils.errors import TrainingStoppedError, UserError
from utils.finite import all_finite
from utils.layers import PreparedBatch, TrainableModel
from utils.loss_recorder import LossRecorder, loss_by_bin
from utils.metrics import MetricsWriter
from utils.optim import learning_rate, set_learning_rate
from utils.pipeline import NonFiniteGradientsError, Pipeline
from utils.progress import Progress, announce
from utils.run_probes import TrainingProbes
from utils.saver import export_trained
from utils.saves import DueSaves, due_saves
from utils.stopping import RequestFlags, RunControl

_NUM_WRITE_FLAGS = len(WriteFlags._fields)


@dataclass(frozen=True)
class _StepData:
    """Micro-batches of a step over all ranks, their samples, and this rank's share as tensors."""

    batches: Sequence[MicroBatch]
    num_samples: int
    prepared: Sequence[PreparedBatch]


class Evaluation(Protocol):
    """What the loop calls to have the model evaluated (`utils.evaluate.Evaluator`)."""

    def begin(self, run_dir: Path, step: int, writer: MetricsWriter | None) -> None:
        """Before the first step of this process."""
        ...

    def after_step(self, step: int, epoch: int, *, epoch_ended: bool, at_end: bool) -> None:
        """After every step."""
        ...


class Trainer:
    """Runs a configured training to its end."""

    def __init__(
        self,
        config: TrainConfig,
        plan: BatchPlan,
        model: TrainableModel,
        pipeline: Pipeline,
        recorder: LossRecorder,
        processes: Processes,
        run_dir: Path,
        metadata: Mapping[str, str],
        evaluation: Evaluation | None = None,
        drift: Drift | None = None,
        probes: TrainingProbes | None = None,
    ) -> None:
        self._config = config
        self._plan = plan
        self._model = model
        self._pipeline = pipeline
        self._recorder = recorder
        self._processes = processes
        self._run_dir = run_dir
        self._metadata = metadata
        self._evaluation = evaluation
        self._probes = probes
        self._per_step = config.gradient_accumulation_steps * pipeline.dp_size
        self.total_steps = 0
        self._begun = initial_state(self._per_step)
        self.stopped_by: str | None = None
        self._num_graphs = 0
        self._control = RunControl(run_dir, processes.is_main, config.checkpoint_every_n_minutes)
        self._writer = CheckpointWriter(run_dir, pipeline, config.keep_checkpoints)
        self._save_times: SaveTimes | None = None
        budget = config.budget
        say = announce if processes.is_main else lambda text: None
        self._budget = None if budget is None else Budget(budget, model, pipeline, drift, say)

    def run(self, state: LoopState) -> LoopState:
        """Train from `state` to the end, or until asked to stop, saving on the way. Every rank must call it.

        Where it was asked to stop, `stopped_by` says by what.

        Raises:
            TrainingStoppedError: a loss or gradient is not finite, or the budget says stop.
        """
        main = self._processes.is_main
        self._begun = state
        self.total_steps = total_steps(self._config, self._plan, state)
        with ExitStack() as stack:
            stack.enter_context(self._control)
            writer, bar = None, None
            if main:
                writer = stack.enter_context(closing(MetricsWriter(self._run_dir, state.step + 1)))
                bar = stack.enter_context(closing(Progress("training", self.total_steps, state.step)))
            stack.enter_context(self._last_checkpoint_in_place())
            if self._evaluation is not None:
                self._evaluation.begin(self._run_dir, state.step, writer)
            if self._probes is not None:
                stack.enter_context(closing(self._probes))
                self._probes.begin(self._run_dir, state.step, writer, self._control)
            ahead = stack.enter_context(ReadAhead(self._read_step))
            while state.step < self.total_steps and self.stopped_by is None:
                before = state
                state, row = self._step(before, ahead)
                due = due_saves(self._config, self._plan, state, before, self.total_steps)
                if self._budget is not None:
                    saves = due.any or self._control.wants_checkpoint
                    self._budget.measure(row, is_last=state.step == self.total_steps, saves=saves)
                    self._recorder.clear()  # neutral prompts went through the stages too
                if self._probes is not None:
                    self._probes.after_step(row)
                self._say_what_compiled(row)
                on_main(lambda row=row: writer.write(row) if writer is not None else None)  # type: ignore[misc]
                if writer is not None and bar is not None:
                    bar.advance(
                        1,
                        loss=f"{row['loss']:.4f}",
                        speed=f"{row['step_seconds']:.2f} s/step",
                        lr=f"{row['lr']:.2e}",
                        grad=f"{row['grad_norm']:.3g}",
                        **({} if self._probes is None else self._probes.figures()),
                    )
                if self._budget is not None:
                    self._budget.act(state.step, self._what_is_left)
                self._evaluate_if_due(state, before)
                self._save(state, due)
            self._writer.finish()
            if self._probes is not None and self.stopped_by is None:
                self._probes.at_end()
        return state

    def _say_what_compiled(self, row: Mapping[str, Any]) -> None:
        """A step that compiled took longer for it, and it should not go on for ever."""
        total = row.get("compiled_graphs", 0)
        if total > self._num_graphs and self._processes.is_main:
            announce(
                f"step {row['step']}: {total - self._num_graphs} graph(s) compiled, {total} so far, over all processes"
            )
        self._num_graphs = total

    def is_told_to_stop(self) -> bool:
        """Whether any process has been asked to stop, also too late to stop this run. Every rank must call it."""
        told = self._control.wants_stop or self._control.is_told_to_stop
        return any(gather_objects(told))

    @contextmanager
    def _last_checkpoint_in_place(self) -> Iterator[None]:
        """After an error that all ranks share, what was saved before it is still written to its end."""
        try:
            yield
        except (UserError, TrainingStoppedError) as error:
            if is_shared(error):
                with suppress(UserError):  # the first error is the one to tell
                    self._writer.finish()
            raise

    # ------------------------------------------------------------------ one step

    def _step(self, state: LoopState, ahead: "ReadAhead[_StepData]") -> tuple[LoopState, dict[str, Any]]:
        started = time.perf_counter()
        # Before the step begins: a file that one rank cannot read must not stop it in the middle of one.
        data = on_every_rank(lambda: ahead.take(state.micro_batches_seen))
        data_seconds = time.perf_counter() - started
        batches, num_samples = data.batches, data.num_samples
        if state.step + 1 < self.total_steps:
            ahead.begin(state.micro_batches_seen + len(batches))
        lr = learning_rate(
            state.step,
            self.total_steps,
            self._config.optimizer.lr,
            self._config.lr_scheduler,
            self._config.warmup_steps,
        )
        set_learning_rate(self._pipeline.optimizer, lr)
        self._recorder.clear()
        try:
            self._pipeline.train_step(iter(data.prepared))
        except NonFiniteGradientsError:
            self._stop_non_finite(state.step, batches)
        totals, timesteps, num_graphs = self._reduced_totals()
        loss = float(np.float32(totals[0] / totals[1]))
        if not np.isfinite(loss):  # an overflow in the loss may leave the gradient finite
            self._stop_non_finite(state.step, batches)
        seconds = time.perf_counter() - started
        state = replace(
            state,
            step=state.step + 1,
            samples_seen=state.samples_seen + num_samples,
            micro_batches_seen=state.micro_batches_seen + len(batches),
            train_seconds=state.train_seconds + seconds,
        )
        row = {
            "step": state.step,
            "epoch": batches[-1].epoch + 1,
            "loss": loss,
            "loss_by_timestep": loss_by_bin(totals),
            "timesteps": timesteps,
            "lr": lr,
            "grad_norm": self._pipeline.gradient_norm,
            "samples_seen": state.samples_seen,
            "step_seconds": round(seconds, 4),
            "data_seconds": round(data_seconds, 4),
            "tokens_per_second": round(sum(map(self._model.num_tokens, batches)) / seconds, 1),
        }
        if self._config.compile:
            row["compiled_graphs"] = num_graphs
        if self._save_times is not None:
            row["checkpoint_seconds"] = round(self._save_times.stall, 4)
            row["checkpoint_copy_seconds"] = round(self._save_times.copy, 4)
            self._save_times = None
        return state, row

    def _read_step(self, first: int) -> _StepData:
        """What this rank needs for the step that begins at this position; called in another thread than the steps."""
        batches = self._step_batches(first)
        num_samples = sum(len(batch.visits) for batch in batches)
        return _StepData(batches, num_samples, list(self._prepared(batches, num_samples)))

    def _step_batches(self, first: int) -> Sequence[MicroBatch]:
        """The micro-batches of the step that begins at this position; fewer than usual at the very end of the run."""
        limit = None if self._config.max_steps is not None else self._plan.batches_before(self._config.epochs)
        turn = self._begun.step + (first - self._begun.micro_batches_seen) // self._per_step
        return [replace(batch, turn=turn) for batch in self._plan.window(first, self._per_step, limit)]

    def _prepared(self, batches: Sequence[MicroBatch], num_samples: int) -> Iterator[PreparedBatch]:
        """This rank's share of the step. Weights make the step's loss the mean over its samples, however ragged.

        A step at the very end of the run may lack micro-batches; repeats of weight 0 fill the schedule.
        """
        weight = self._per_step / num_samples
        weighted = [(batch, weight) for batch in batches]
        weighted += [(batches[-1], 0.0)] * (self._per_step - len(batches))
        pipeline = self._pipeline
        for batch, batch_weight in rank_slice(weighted, pipeline.dp_rank, pipeline.dp_size):
            yield self._model.prepare(
                batch, batch_weight, need_inputs=pipeline.is_first, need_labels=pipeline.is_last
            )

    def _reduced_totals(self) -> tuple[np.ndarray, dict[str, float], int]:
        """Over all ranks: totals of the step and the timesteps that it visited, of last stages; graphs compiled so far.

        With them, at no further cost, go what any rank was asked for and how far the checkpoint in flight is.
        """
        flags = [graphs_compiled(), *self._control.flags(), *self._writer.flags()]
        pipeline = self._pipeline
        # A sum is all that is reduced, so each copy has a place of its own.
        ranges = np.zeros((pipeline.dp_size, 2))
        if pipeline.is_last:
            ranges[pipeline.dp_rank] = self._recorder.timestep_range()
        own = np.concatenate([self._recorder.totals(), ranges.ravel(), np.array(flags, dtype=np.float64)])
        everything = torch.from_numpy(own).to(self._processes.device)
        dist.all_reduce(everything)
        totals, places, counts = np.split(everything.cpu().numpy(), [-len(flags) - ranges.size, -len(flags)])
        (num_graphs,), requests, written = np.split(counts.astype(int), [1, -_NUM_WRITE_FLAGS])
        self._control.hear(RequestFlags(*requests.tolist()))
        self._writer.advance(WriteFlags(*written.tolist()))
        lows, highs = places.reshape(-1, 2).T
        timesteps = {"min": round(float(lows.min()), 4), "max": round(float(highs.max()), 4)}
        return totals, timesteps, int(num_graphs)

    def _stop_non_finite(self, step: int, batches: Sequence[MicroBatch]) -> None:
        bad = sorted(
            {index for indices in gather_objects(self._recorder.non_finite_samples()) for index in indices}
        )
        everything = sorted({visit.sample_index for batch in batches for visit in batch.visits})
        what = "the loss of" if bad else "the gradient (every loss is finite) of the step with"
        files = ", ".join(self._model.describe_sample(index) for index in (bad or everything)[:8])
        raise TrainingStoppedError(
            f"step {step + 1}: {what} {files} is not finite. Nothing of this step is saved; {self._what_is_left()}. Check these "
            "files, lower optimizer.lr, or set gradient_clipping"
        )

    def _what_is_left(self) -> str:
        self._writer.finish()
        newest = latest_checkpoint(self._run_dir)
        return "there is no checkpoint yet" if newest is None else f"the last good checkpoint is {newest}"

    # ------------------------------------------------------------------ evaluation

    def _evaluate_if_due(self, state: LoopState, before: LoopState) -> None:
        """Before the checkpoint of the same step, so that whoever goes on from that finds the evaluation done."""
        if self._evaluation is None:
            return
        completed = self._plan.epoch_of(state.micro_batches_seen)
        ended = completed > self._plan.epoch_of(before.micro_batches_seen)
        epoch = completed if ended else completed + 1
        at_end = state.step == self.total_steps
        self._evaluation.after_step(state.step, epoch, epoch_ended=ended, at_end=at_end)

    # ------------------------------------------------------------------ saving

    def _save(self, state: LoopState, due: DueSaves) -> None:
        try:
            self._export_due(state, due)
        except UserError as error:
            if due.checkpoint and is_shared(error):
                self._keep_state(state)
            raise
        if due.checkpoint or self._control.wants_checkpoint:
            self._control.saving()
            self._save_times = self._writer.save(state, then=self._control.saved)
        if self._control.wants_stop and state.step != self.total_steps:
            self.stopped_by = self._control.reason

    def _keep_state(self, state: LoopState) -> None:
        """The checkpoint that is due, although an export has failed; not of weights that are not finite."""
        own = all(all_finite(one) for one in self._pipeline.trainables.values())
        if all(gather_objects(own)):
            with suppress(UserError):  # the first error is the one to tell
                self._writer.save(state)
                self._writer.finish()

    def _export_due(self, state: LoopState, due: DueSaves) -> None:
        if due.of_epoch:
            self._export(f"epoch{due.epoch}", state, due.epoch)
            if self._probes is not None:
                at_end = state.step == self.total_steps
                self._probes.saved(self._run_dir / f"epoch{due.epoch}", due.epoch, state.step, at_end=at_end)
        if due.of_step:
            self._export(f"step{state.step}", state, due.epoch)

    def _export(self, name: str, state: LoopState, epoch: int) -> None:
        metadata = {**self._metadata, "step": str(state.step), "epoch": str(epoch)}

        def export(trained: Mapping[str, Tensor], directory: Path, about: Mapping[str, str]) -> list[Path]:
            within = trained if self._budget is None else self._budget.projected(trained)
            return self._model.export(within, directory, about)

        export_trained(self._pipeline, self._run_dir / name, export, metadata)


def total_steps(config: TrainConfig, plan: BatchPlan, state: LoopState) -> int:
    """Optimizer steps of the whole run, seen from `state`: `max_steps` where given, else until `epochs` are seen whole."""
    if config.max_steps is not None:
        return config.max_steps
    left = plan.batches_before(config.epochs) - state.micro_batches_seen
    return state.step + max(0, -(-left // state.micro_batches_per_step))


def initial_state(micro_batches_per_step: int) -> LoopState:
    """State of a run that has not begun."""
    return LoopState(step=0, samples_seen=0, micro_batches_per_step=micro_batches_per_step, train_seconds=0.0)
