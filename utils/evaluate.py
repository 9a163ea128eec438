"""Evaluation: the loss on datasets at fixed quantiles of the noise level, with noise fixed per sample and quantile.

Two evaluations differ by the weights alone, so their difference is taken sample by sample. The stages run forward
only, and every draw is named by what it is for (`utils/rng.py`), so training goes on as if nothing had happened.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from utils.config.schema import TrainConfig
from utils.data.sampler import MicroBatch, Schedulable, Visit, rank_slice
from utils.distributed import Processes, broadcast_object, gather_objects, on_every_rank, on_main
from utils.eval_records import EvalRecords, Measured
from utils.layers import PreparedBatch, TrainableModel
from utils.loss_recorder import LossRecorder
from utils.metrics import MetricsWriter
from utils.pipeline import Pipeline
from utils.progress import announce

# Micro-batches of a copy that are read ahead and go through the stages in one pass.
_MICRO_BATCHES_IN_A_PASS = 16
_MAX_SAMPLES_NAMED = 8


class EvalBatches(Protocol):
    """Makes micro-batches of a dataset that is evaluated."""

    def prepare(
        self, batch: MicroBatch, weight: float, *, need_inputs: bool, need_labels: bool
    ) -> PreparedBatch:
        """As `TrainableModel.prepare`, but the number of a visit is the index of its quantile."""
        ...

    def describe_sample(self, sample_index: int) -> str:
        """A sample's name for messages and files."""
        ...


@dataclass(frozen=True)
class EvalSet:
    """A dataset to evaluate on.

    Attributes:
        name: what it is called in files and messages.
        samples: each is seen once per quantile, whatever its `num_repeats`.
        quantiles: of the law of the noise level.
        identity: names everything but the weights that its losses depend on.
        batches: makes its micro-batches.
    """

    name: str
    samples: Sequence[Schedulable]
    quantiles: tuple[float, ...]
    identity: str
    batches: EvalBatches


def plan_evaluation(
    samples: Sequence[Schedulable], num_quantiles: int, micro_batch_size: int
) -> list[MicroBatch]:
    """Every sample at every quantile once, in micro-batches of one bucket, by sample id: the same for any layout."""
    batches = []
    ordered = sorted(range(len(samples)), key=lambda index: samples[index].sample_id)
    for bucket in sorted({sample.bucket for sample in samples}):
        visits = [
            Visit(index, quantile)
            for index in ordered
            if samples[index].bucket == bucket
            for quantile in range(num_quantiles)
        ]
        batches += [
            MicroBatch(tuple(visits[start : start + micro_batch_size]), bucket, epoch=0)
            for start in range(0, len(visits), micro_batch_size)
        ]
    return batches


class Evaluator:
    """Evaluates when it is due. Every rank makes the same calls."""

    def __init__(
        self,
        config: TrainConfig,
        sets: Sequence[EvalSet],
        model: TrainableModel,
        pipeline: Pipeline,
        recorder: LossRecorder,
        processes: Processes,
    ) -> None:
        self._config = config
        self._sets = sets
        self._model = model
        self._pipeline = pipeline
        self._recorder = recorder
        self._processes = processes
        self._records: EvalRecords | None = None
        self._firsts: dict[str, Measured] = {}  # on rank 0
        self._writer: MetricsWriter | None = None

    def begin(self, run_dir: Path, step: int, writer: MetricsWriter | None) -> None:
        """Open the run's evaluations as they were at `step`; before step 1 make the first ones, where they are wanted.

        Args:
            run_dir: of the run.
            step: optimizer steps done.
            writer: takes scalars for TensorBoard; rank 0 has it.

        Raises:
            UserError: earlier evaluations do not fit what is evaluated now.
        """
        self._writer = writer

        def open_records() -> None:
            self._records = EvalRecords(run_dir, step)
            for one in self._sets:
                first = self._records.first(one.name, one.identity)
                if first is not None:
                    self._firsts[one.name] = first

        on_main(open_records)
        if step == 0 and self._config.eval_before_first_step:
            self._evaluate(step, epoch=0)

    def after_step(self, step: int, epoch: int, *, epoch_ended: bool, at_end: bool) -> None:
        """Evaluate if it is due after this step.

        Args:
            step: optimizer steps done.
            epoch: the epoch of the step, from 1.
            epoch_ended: whether it ended with the step.
            at_end: whether the run did.
        """
        config = self._config
        by_epoch, by_step = config.eval_every_n_epochs, config.eval_every_n_steps
        due = bool(by_epoch and epoch_ended and epoch % by_epoch == 0) or bool(
            by_step and step % by_step == 0
        )
        if due or (at_end and bool(by_epoch or by_step)):
            self._evaluate(step, epoch)

    def _evaluate(self, step: int, epoch: int) -> None:
        for one in self._sets:
            records = self._records
            is_there, has_first = broadcast_object(
                records is not None and (records.has(one.name, step), one.name in self._firsts)
            )
            if is_there:
                continue
            started = time.perf_counter()
            measured = self._measure(one, step, with_adapter_off=not has_first)
            seconds = time.perf_counter() - started
            on_main(lambda measured=measured, seconds=seconds: self._write(measured, epoch, seconds))  # type: ignore[misc]

    def _measure(self, one: EvalSet, step: int, *, with_adapter_off: bool) -> Measured:
        losses = self._losses(one)
        names = tuple(one.batches.describe_sample(index) for index in range(len(one.samples)))
        measured = Measured(one.name, one.identity, step, names, one.quantiles, losses)
        adapters_off = self._model.adapters_off(self._pipeline.module)
        if adapters_off is None or not with_adapter_off:
            return measured
        # Once in a run: neither the base nor the noise changes.
        with adapters_off:
            return replace(measured, adapter_off=self._losses(one))

    def _losses(self, one: EvalSet) -> np.ndarray:
        """[samples, quantiles] on every rank."""
        config, pipeline = self._config, self._pipeline
        size = config.eval_micro_batch_size_per_gpu or config.micro_batch_size_per_gpu
        everything = plan_evaluation(one.samples, len(one.quantiles), size)
        share = rank_slice(everything, pipeline.dp_rank, pipeline.dp_size)
        longest = -(-len(everything) // pipeline.dp_size)
        own: list[tuple[int, int, float]] = []
        for start in range(0, longest, _MICRO_BATCHES_IN_A_PASS):
            batches = share[start : start + _MICRO_BATCHES_IN_A_PASS]
            prepared = on_every_rank(lambda batches=batches: self._prepare(one, batches))  # type: ignore[misc]
            self._recorder.clear()
            pipeline.forward_only(prepared)
            visits = [visit for batch in batches for visit in batch.visits]
            found = self._recorder.sample_losses()
            own += [
                (v.sample_index, v.visit, loss) for v, loss in zip(visits, found, strict=pipeline.is_last)
            ]
        self._recorder.clear()
        losses = np.full((len(one.samples), len(one.quantiles)), np.nan)
        for sample, quantile, loss in (entry for shares in gather_objects(own) for entry in shares):
            losses[sample, quantile] = loss if np.isfinite(loss) else np.nan
        return losses

    def _prepare(self, one: EvalSet, batches: Sequence[MicroBatch]) -> list[PreparedBatch]:
        pipeline = self._pipeline
        return [
            one.batches.prepare(batch, 1.0, need_inputs=pipeline.is_first, need_labels=pipeline.is_last)
            for batch in batches
        ]

    # ------------------------------------------------------------------ on rank 0

    def _write(self, measured: Measured, epoch: int, seconds: float) -> None:
        assert self._records is not None, "begin opens them on rank 0"
        first = self._firsts.setdefault(measured.dataset, measured)
        row = self._records.add(measured, first, epoch, seconds)
        if self._writer is not None:
            self._writer.write_scalars(_scalars(row), row["step"])
        announce(describe_row(row))
        bad = [
            name
            for name, losses in zip(measured.samples, measured.losses, strict=True)
            if np.isnan(losses).any()
        ]
        if bad:
            more = f" and {len(bad) - _MAX_SAMPLES_NAMED} more" if len(bad) > _MAX_SAMPLES_NAMED else ""
            announce(
                f"warning: evaluation of {measured.dataset}: the loss of {', '.join(bad[:_MAX_SAMPLES_NAMED])}{more} is not "
                "finite; check these files"
            )


def describe_row(row: Mapping[str, Any]) -> str:
    """An evaluation in one line for people."""
    parts = [f"evaluation at step {row['step']}: {row['dataset']}: loss {_number(row['loss'], '.4f')}"]
    if "change" in row:
        parts.append(f"{_difference(row, 'change')} since step {row['first_step']}")
    if "adapter_effect" in row:
        parts.append(f"adapter {_difference(row, 'adapter_effect')}")
    samples = f"{row['num_samples']} sample{'s' if row['num_samples'] != 1 else ''}"
    return "; ".join(parts) + f" ({samples}, {row['seconds']:.1f} s)"


def _difference(row: Mapping[str, Any], key: str) -> str:
    ends = row[f"{key}_interval"]
    interval = "" if ends is None else f" [{ends[0]:+.4f}, {ends[1]:+.4f}]"
    return _number(row[key], "+.4f") + interval


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _scalars(row: Mapping[str, Any]) -> dict[str, float]:
    prefix = f"eval/{row['dataset']}"
    single = {key: row.get(key) for key in ("loss", "change", "loss_adapter_off", "adapter_effect")}
    named = {f"{prefix}/{key}": value for key, value in single.items()}
    named |= {f"{prefix}/loss_at_quantile_{key}": value for key, value in row["loss_by_quantile"].items()}
    return {name: value for name, value in named.items() if value is not None}
