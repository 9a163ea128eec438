"""The loop trains any model that implements `TrainableModel`: here a small one that is not Wan."""

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from utils import run as runs
from utils.checkpoint import complete_checkpoints, latest_checkpoint, read_state
from utils.config.schema import BudgetConfig, ModelConfig, OptimizerConfig, TrainConfig
from utils.data.buckets import Bucket
from utils.data.sampler import BatchPlan, MicroBatch
from utils.delta_budget import ModuleDelta
from utils.distributed import Processes, init_processes, shutdown
from utils.errors import TrainingStoppedError, UserError
from utils.layers import LayerSpec, PipelineLayer, PreparedBatch
from utils.metrics import read_metrics
from utils.optim import trainable_dtype
from utils.pipeline import Pipeline
from utils.resume import Inputs
from utils.rng import generator
from utils.run_dir import RunDir

BUCKET = Bucket(32, 32, 1)


@dataclass(frozen=True)
class ToySample:
    sample_id: int
    bucket: Bucket = BUCKET
    num_repeats: float = 1.0


class ToyLayer(PipelineLayer):
    def run(self, *wire: Tensor) -> tuple[Tensor]:
        return (torch.tanh(self.inner(wire[0])),)


class ToyHead(PipelineLayer):
    def run(self, *wire: Tensor) -> Tensor:
        return self.inner(wire[0])


class ToyModel:
    """Two linear layers that learn to repeat their input; sample `bad` has a target that is not a number."""

    def __init__(
        self, bad: int | None = None, delta: float = 0.0, width: int = 8, dtype: torch.dtype = torch.float32
    ) -> None:
        self.bad = bad
        self.delta = delta
        self.width = width
        self.dtype = dtype

    def layer_specs(self) -> list[LayerSpec]:
        def build(kind: type[PipelineLayer], name: str, device: torch.device) -> PipelineLayer:
            torch.manual_seed(len(name))
            return kind(nn.Linear(self.width, self.width, dtype=self.dtype)).to(device)

        return [
            LayerSpec("body", lambda device: build(ToyLayer, "body", device), 1.0, True, True),
            LayerSpec("top", lambda device: build(ToyHead, "top", device), 1.0, True, True),
        ]

    def prepare(
        self, batch: MicroBatch, weight: float, *, need_inputs: bool, need_labels: bool
    ) -> PreparedBatch:
        rows = []
        for visit in batch.visits:
            rows.append(
                torch.randn(self.width, generator=generator(0, "toy", visit.sample_index, visit.visit))
            )
        inputs = torch.stack(rows).to(self.dtype)
        targets = inputs.clone()
        for row, visit in enumerate(batch.visits):
            if visit.sample_index == self.bad:
                targets[row] = float("nan")
        sigma = torch.full((len(rows),), 0.55)
        indices = torch.tensor([visit.sample_index for visit in batch.visits])
        return PreparedBatch((inputs,), (targets, sigma, torch.full_like(sigma, weight), indices))

    def num_tokens(self, batch: MicroBatch) -> int:
        return len(batch.visits)

    def describe_sample(self, sample_index: int) -> str:
        return f"sample-{sample_index}"

    def export(
        self, trained: Mapping[str, Tensor], directory: Path, metadata: Mapping[str, str]
    ) -> list[Path]:
        path = directory / "toy.safetensors"
        save_file(dict(trained), path, metadata=dict(metadata))
        return [path]

    def adapters_off(self, stage: nn.Module) -> None:
        return None

    def deltas(self, parameters: Mapping[str, Tensor]) -> list[ModuleDelta]:
        return [ModuleDelta("blocks.0.x", 1, 1.0, self.delta, 1.0, self.delta, 1.0)] if self.delta else []

    def scale_adapters(self, parameters: Mapping[str, Tensor], factors: Mapping[str, float]) -> None:
        self.delta *= factors["blocks.0.x"]


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    yield init_processes(timeout_minutes=1)
    shutdown()


def make_config(**changes: object) -> TrainConfig:
    model = ModelConfig(
        type="wan",
        ckpt_path="-",
        cache_text_embeddings=False,
        train_text_encoder=True,
        freeze_transformer=True,
    )
    values = {
        "output_dir": "-",
        "dataset": "-",
        "epochs": 2,
        "micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": OptimizerConfig(lr=5e-2),
        "model": model,
    }
    return TrainConfig(**(values | changes))  # type: ignore[arg-type]


def train(
    config: TrainConfig,
    model: ToyModel,
    processes: Processes,
    run: RunDir,
    num_samples: int = 7,
) -> None:
    plan = BatchPlan(
        [ToySample(index) for index in range(num_samples)], config.micro_batch_size_per_gpu, config.seed
    )
    ready = runs.build(config, plan, model, processes, lambda text: None)
    runs.run(ready, run, Inputs({"the data": "toy"}), {"who": "toy"}, lambda text: None)


def continued(path: Path) -> RunDir:
    checkpoint = latest_checkpoint(path)
    assert checkpoint is not None
    return RunDir(path, checkpoint, read_state(checkpoint))


def test_a_toy_model_trains_saves_and_resumes(processes: Processes, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = make_config(epochs=4, checkpoint_every_n_steps=1)
    for path in (whole, parts):
        path.mkdir()
    train(config, ToyModel(), processes, RunDir(whole))
    train(make_config(max_steps=3), ToyModel(), processes, RunDir(parts))
    train(config, ToyModel(), processes, continued(parts))

    rows = read_metrics(whole)
    # 7 samples in micro-batches of 2: 4 of them an epoch, 16 in all, 2 a step
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["samples_seen"] == 28 and rows[-1]["epoch"] == 4
    losses = [row["loss"] for row in rows]
    assert sum(losses[4:]) < 0.8 * sum(losses[:4])
    assert all(set(row["loss_by_timestep"]) == {"0.5-0.6"} for row in rows)
    assert [(row["loss"], row["grad_norm"]) for row in read_metrics(parts)] == [
        (row["loss"], row["grad_norm"]) for row in rows
    ]
    final, resumed = (load_file(path / "epoch4" / "toy.safetensors") for path in (whole, parts))
    assert sorted(final) == ["body.bias", "body.weight", "top.bias", "top.weight"]
    assert all(torch.equal(final[name], resumed[name]) for name in final)
    assert [path.name for path in complete_checkpoints(whole)] == ["global_step7", "global_step8"]
    assert not list(whole.glob(".*"))


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "adamw_kahan"])
def test_every_optimizer_resumes_exactly(processes: Processes, tmp_path: Path, kind: str) -> None:
    """Wide enough (4096 weights) that the 8-bit optimizer really keeps its moments in 8 bits."""
    config = make_config(epochs=4, checkpoint_every_n_steps=1, optimizer=OptimizerConfig(type=kind, lr=1e-2))  # type: ignore[arg-type]
    model = ToyModel(width=64, dtype=trainable_dtype(config.optimizer))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for path in (whole, parts):
        path.mkdir()
    train(config, model, processes, RunDir(whole))
    train(replace(config, max_steps=3), model, processes, RunDir(parts))
    train(config, model, processes, continued(parts))
    final, resumed = (load_file(path / "epoch4" / "toy.safetensors") for path in (whole, parts))
    assert all(torch.equal(final[name], resumed[name]) for name in final)
    assert [row["loss"] for row in read_metrics(parts)] == [row["loss"] for row in read_metrics(whole)]


def test_more_epochs_after_a_short_last_step_skip_nothing(processes: Processes, tmp_path: Path) -> None:
    """5 micro-batches in windows of 2: the first run ends in a window of one, and the next begins right behind it."""
    config = make_config(epochs=1, checkpoint_every_n_steps=1)
    train(config, ToyModel(), processes, RunDir(tmp_path), num_samples=9)
    longer = continued(tmp_path)
    train(replace(config, epochs=3), ToyModel(), processes, longer, num_samples=9)
    rows = read_metrics(tmp_path)
    assert rows[2]["samples_seen"] == 9 and rows[-1]["samples_seen"] == 27
    assert [row["step"] for row in rows] == list(range(1, 9))  # 3 steps, then 10 micro-batches in 5
    assert sorted(path.parent.name for path in tmp_path.glob("epoch*/*.safetensors")) == [
        "epoch1",
        "epoch2",
        "epoch3",
    ]


def test_the_clock_and_the_steps_ask_for_checkpoints(processes: Processes, tmp_path: Path) -> None:
    """7 samples, 2 epochs: 4 steps. Without either there is one at the end."""
    cases = {
        "minutes": ({"checkpoint_every_n_minutes": 1e-9}, [1, 2, 3, 4]),
        "steps": ({"checkpoint_every_n_steps": 2}, [2, 4]),
        "epochs": ({"checkpoint_every_n_epochs": 1}, [2, 4]),
        "never": ({}, [4]),
    }
    for name, (values, steps) in cases.items():
        (tmp_path / name).mkdir()
        config = make_config(**({"checkpoint_every_n_epochs": 0, "keep_checkpoints": 9} | values))
        train(config, ToyModel(), processes, RunDir(tmp_path / name))
        found = [path.name for path in complete_checkpoints(tmp_path / name)]
        assert found == [f"global_step{step}" for step in steps], name


def test_a_short_last_step_weighs_samples_not_batches(processes: Processes, tmp_path: Path) -> None:
    """Three samples in micro-batches of 2 and windows of 4: one step whose loss is the mean over 3 samples."""
    config = make_config(epochs=1, gradient_accumulation_steps=4)
    train(config, ToyModel(), processes, RunDir(tmp_path), num_samples=3)
    (row,) = read_metrics(tmp_path)
    model = nn.Sequential(*(spec.build(torch.device("cpu")) for spec in ToyModel().layer_specs()))
    visits = BatchPlan([ToySample(index) for index in range(3)], 2, 0).epoch_batches(0)
    inputs = torch.cat([ToyModel().prepare(b, 1.0, need_inputs=True, need_labels=True).inputs[0] for b in visits])  # type: ignore[index]
    loss = (model((inputs,)) - inputs).square().mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert row["samples_seen"] == 3
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_and_names_the_sample(processes: Processes, tmp_path: Path) -> None:
    config = make_config(
        checkpoint_every_n_steps=1, epochs=1, micro_batch_size_per_gpu=1, gradient_accumulation_steps=1
    )
    plan = BatchPlan([ToySample(index) for index in range(7)], 1, 0)
    bad = plan.micro_batch(4).visits[0].sample_index
    with pytest.raises(TrainingStoppedError, match=rf"step 5: .*sample-{bad} .*global_step4"):
        train(config, ToyModel(bad=bad), processes, RunDir(tmp_path))
    assert len(read_metrics(tmp_path)) == 4
    assert (tmp_path / "latest").read_text().strip() == "global_step4"


class UnsoundExport(ToyModel):
    """Its exports are found not to be what they should be; with `has_diverged` its weights are no numbers either."""

    def __init__(self, has_diverged: bool) -> None:
        super().__init__()
        self.has_diverged = has_diverged
        self.built: list[PipelineLayer] = []

    def layer_specs(self) -> list[LayerSpec]:
        def recorded(spec: LayerSpec) -> LayerSpec:
            def build(device: torch.device) -> PipelineLayer:
                self.built.append(spec.build(device))
                return self.built[-1]

            return replace(spec, build=build)

        return [recorded(spec) for spec in super().layer_specs()]

    def export(
        self, trained: Mapping[str, Tensor], directory: Path, metadata: Mapping[str, str]
    ) -> list[Path]:
        super().export(trained, directory, metadata)
        if self.has_diverged:
            for layer in self.built:
                for parameter in layer.parameters():
                    parameter.data.fill_(torch.nan)
        raise UserError("toy.safetensors: was read again and is not sound")


@pytest.mark.parametrize("is_kept", [True, False])
def test_an_unsound_export_is_not_published_and_the_state_is_kept_where_it_is_finite(
    processes: Processes, tmp_path: Path, is_kept: bool
) -> None:
    config = make_config(max_steps=1)
    with pytest.raises(UserError, match="is not sound"):
        train(config, UnsoundExport(has_diverged=not is_kept), processes, RunDir(tmp_path))
    assert not list(tmp_path.rglob("*.safetensors.tmp")) and not list(tmp_path.glob("epoch*"))
    assert not list(tmp_path.glob(".*"))
    newest = latest_checkpoint(tmp_path)
    assert (newest is not None) == is_kept
    if newest is not None:
        assert read_state(newest).step == 1


def test_the_budget_stops_or_warns(
    processes: Processes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for action in ("warn", "stop"):
        (tmp_path / action).mkdir()
    budget = BudgetConfig(max_delta_ratio=0.05, every_n_steps=2)
    train(make_config(budget=budget), ToyModel(delta=0.06), processes, RunDir(tmp_path / "warn"))
    assert "blocks.0.x with 0.0600" in capfd.readouterr().err
    ratios = [row.get("max_delta_ratio") for row in read_metrics(tmp_path / "warn")]
    assert ratios == [None, 0.06, None, 0.06]
    stopping = BudgetConfig(max_delta_ratio=0.05, action="stop", every_n_steps=2)
    with pytest.raises(TrainingStoppedError, match=r"step 2: .*blocks\.0\.x.*budget\.action"):
        train(make_config(budget=stopping), ToyModel(delta=0.06), processes, RunDir(tmp_path / "stop"))
    train(make_config(budget=stopping), ToyModel(delta=0.05), processes, RunDir(tmp_path / "stop"))


class WatchedModel(ToyModel):
    """Remembers which micro-batches were asked for; the `fails_at`-th cannot be read."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.asked: list[MicroBatch] = []
        self.changed = threading.Condition()
        self.fails_at = fails_at

    def prepare(
        self, batch: MicroBatch, weight: float, *, need_inputs: bool, need_labels: bool
    ) -> PreparedBatch:
        with self.changed:
            self.asked.append(batch)
            self.changed.notify_all()
        if len(self.asked) == self.fails_at:
            raise UserError("item 5 is damaged")
        return super().prepare(batch, weight, need_inputs=need_inputs, need_labels=need_labels)


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read ahead")]


def test_the_next_step_is_read_while_this_one_runs_and_nothing_behind_the_last(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, steps, read_meanwhile = WatchedModel(), [], []
    train_step = Pipeline.train_step

    def watched(self: Pipeline, batches: Iterator[PreparedBatch]) -> None:
        steps.append(len(steps) + 1)
        wanted = min(len(steps) + 1, 4) * 2  # micro-batches of this step and of the next, where there is one
        with model.changed:
            assert model.changed.wait_for(lambda: len(model.asked) >= wanted, timeout=60)
            read_meanwhile.append(len(model.asked))
        train_step(self, batches)

    monkeypatch.setattr(Pipeline, "train_step", watched)
    train(make_config(max_steps=4), model, processes, RunDir(tmp_path))
    assert read_meanwhile == [4, 6, 8, 8]
    plan = BatchPlan([ToySample(index) for index in range(7)], 2, 0)
    assert model.asked == [replace(batch, turn=number // 2) for number, batch in enumerate(plan.window(0, 8))]
    assert not reading_threads()
    assert all(0 <= row["data_seconds"] <= row["step_seconds"] for row in read_metrics(tmp_path))


def test_what_cannot_be_read_ahead_is_an_error_of_its_own_step(processes: Processes, tmp_path: Path) -> None:
    """The fifth micro-batch belongs to step 3: it is read during step 2, which is done, written and saved."""
    with pytest.raises(UserError, match="item 5 is damaged"):
        train(make_config(checkpoint_every_n_steps=1), WatchedModel(fails_at=5), processes, RunDir(tmp_path))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert (tmp_path / "latest").read_text().strip() == "global_step2"
    assert not reading_threads()


def test_metrics_lines_are_plain_json(processes: Processes, tmp_path: Path) -> None:
    train(make_config(epochs=1), ToyModel(), processes, RunDir(tmp_path))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    wanted = {"step", "epoch", "loss", "loss_by_timestep", "lr", "grad_norm", "samples_seen", "step_seconds"}
    wanted |= {"data_seconds"}
    assert all(wanted | {"tokens_per_second"} <= set(json.loads(line)) for line in lines)
