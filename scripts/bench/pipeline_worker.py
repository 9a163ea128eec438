"""Times one layout of a small DiT for scripts/bench/pipeline.py, which starts it, alone or under a launcher.

`single` measures everything that one process can, taking turns between the things that are compared; `steps` times
whole steps of a pipeline of one or more stages. Both print one line of JSON on the first rank.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.wan.arch import WanArch, load_arch
from models.wan.checkpoint import open_transformer
from models.wan.layer_memory import Workload
from models.wan.layers import dit_layers
from models.wan.stages import TextWire
from utils.checkpoint_writer import CheckpointWriter
from utils.cli import end_process
from utils.config.schema import AdapterConfig, BudgetConfig, ModelConfig, OptimizerConfig, TrainConfig
from utils.distributed import Processes, init_processes
from utils.layers import LayerSpec, PreparedBatch, global_names, table_names
from utils.lora_targets import linear_modules, resolve_targets
from utils.loss_recorder import LossRecorder
from utils.optim import build_optimizer
from utils.pipeline import Pipeline, build_pipeline
from utils.stage_plan import StagePlan, make_plan
from utils.timing import take_turns
from utils.trainer import initial_state

Clock = Callable[[], float]
WARM_UP = 2
TEXT_TOKENS = 16


@dataclass(frozen=True)
class Setup:
    """The model's files, the shape of a micro-batch (latent frames, rows, columns), and where it runs."""

    root: Path
    grid: tuple[int, int, int]
    processes: Processes

    @property
    def arch(self) -> WanArch:
        """Sizes of the model."""
        return load_arch(self.root / "config.json", open_transformer(self.root).shapes)

    @property
    def tokens(self) -> int:
        """Video tokens of one micro-batch."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def config(
        self,
        first_block: int,
        *,
        stages: int = 1,
        micro_batches: int = 1,
        recompute: bool = False,
        rank: int = 16,
    ) -> TrainConfig:
        """LoRA from `first_block` up."""
        blocks = (first_block, self.arch.num_layers - 1)
        return TrainConfig(
            output_dir="unused",
            dataset="unused",
            pipeline_stages=stages,
            gradient_accumulation_steps=micro_batches,
            activation_checkpointing=recompute,
            model=ModelConfig(
                type="wan",
                ckpt_path=str(self.root),
                dtype="bfloat16" if self.processes.device.type == "cuda" else "float32",
                cache_text_embeddings=True,
                train_text_encoder=False,
                freeze_transformer=True,
            ),
            adapter=AdapterConfig(rank=rank, train_blocks_range=blocks),
            optimizer=OptimizerConfig(lr=1e-5),
        )

    def specs(self, config: TrainConfig) -> list[LayerSpec]:
        """All layers, not built."""
        source = open_transformer(self.root)
        assert config.adapter is not None
        targets = resolve_targets(linear_modules(source.shapes), config.adapter, BudgetConfig())
        workload = Workload(float(self.tokens), float(TEXT_TOKENS))
        return dit_layers(config, source, self.arch, targets, {}, workload)

    def batches(self, number: int, dtype: str) -> list[PreparedBatch]:
        """Micro-batches of one sample, on the device."""
        arch, device = self.arch, self.processes.device
        frames, rows, columns = self.grid
        random = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(device)

        made = []
        for index in range(number):
            text = draw(1, TEXT_TOKENS, arch.text_dim).to(getattr(torch, dtype))
            lens, seed = torch.tensor([TEXT_TOKENS], device=device), torch.tensor([index], device=device)
            latents = draw(1, arch.in_dim, frames, 2 * rows, 2 * columns)
            time_B = torch.full((1, 1), 500.0, device=device)
            target = draw(1, arch.out_dim, frames, 2 * rows, 2 * columns)
            weight = torch.ones(1, device=device)
            labels = (target, weight * 0.5, weight, torch.zeros(1, dtype=torch.int64, device=device))
            made.append(PreparedBatch(tuple(TextWire(text, lens, latents, time_B, seed)), labels))
        return made


class Engine:
    """A pipeline that is stepped on the same micro-batches again and again."""

    def __init__(self, setup: Setup, config: TrainConfig) -> None:
        self.config, self._recorder = config, LossRecorder()
        specs = setup.specs(config)
        self.plan: StagePlan = make_plan(specs, config, None)
        self.pipeline: Pipeline = build_pipeline(
            specs,
            self.plan.bounds,
            self._recorder,
            lambda trainables, tables, _: build_optimizer(trainables, config.optimizer, tables),
            micro_batch_size=1,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            gradient_clipping=1.0,
            processes=setup.processes,
        )
        self._batches = setup.batches(config.gradient_accumulation_steps, config.model.dtype)

    def step(self) -> None:
        """One optimizer step."""
        self._recorder.clear()
        self.pipeline.train_step(iter(self._batches))


class PlainLoop:
    """The same layers, loss, clipping and optimizer in a loop of nothing but torch."""

    def __init__(self, setup: Setup, config: TrainConfig) -> None:
        specs = setup.specs(config)
        self.layers = [spec.build(setup.processes.device) for spec in specs]
        parameters: dict[str, nn.Parameter] = {}
        tables: set[str] = set()
        for spec, layer in zip(specs, self.layers, strict=True):
            parameters |= global_names(spec.name, layer)
            tables |= table_names(spec.name, layer)
        self.known = {p.untyped_storage().data_ptr() for p in parameters.values()}
        self._trainables = {name: p for name, p in parameters.items() if p.requires_grad}
        self._model = nn.Sequential(*self.layers).train()
        self._optimizer = build_optimizer(self._trainables, config.optimizer, tables)
        self.recorder = LossRecorder()
        self.batches = setup.batches(config.gradient_accumulation_steps, config.model.dtype)

    def step(self) -> None:
        """One optimizer step."""
        self.recorder.clear()
        for batch in self.batches:
            loss = self.recorder(self._model(batch.inputs), batch.labels or ())
            (loss / len(self.batches)).backward()
        nn.utils.clip_grad_norm_(list(self._trainables.values()), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def saved_bytes(self) -> int:
        """Storages that autograd keeps of one micro-batch, weights not counted."""
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.known:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        batch = self.batches[0]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.recorder(self._model(batch.inputs), batch.labels or ())
        total = sum(saved.values())
        del loss
        self.recorder.clear()
        return total

    def layer_seconds(self, wait: Callable[[], None], clock: Clock) -> list[float]:
        """Time of each layer's forward and backward, one after the other on its own."""
        wires: list[Any] = [self.batches[0].inputs]
        seconds = []
        boundaries = []
        for layer in self.layers:
            # A layer's graph ends at its input, so that its backward can be timed alone.
            wire = tuple(t.detach().requires_grad_(t.requires_grad) for t in wires[-1])
            wait()
            started = clock()
            output = layer(wire)
            wait()
            seconds.append(clock() - started)
            boundaries.append((wire, output))
            wires.append(output if isinstance(output, tuple) else (output,))
        gradient: list[Tensor] | None = None
        for index in reversed(range(len(self.layers))):
            wire, output = boundaries[index]
            outputs = [t for t in (output if isinstance(output, tuple) else (output,)) if t.requires_grad]
            if not outputs:
                break
            given = [torch.ones_like(t) for t in outputs] if gradient is None else gradient
            wait()
            started = clock()
            torch.autograd.backward(outputs, given)
            wait()
            seconds[index] += clock() - started
            gradient = [torch.zeros_like(t) if t.grad is None else t.grad for t in wire if t.requires_grad]
        self._optimizer.zero_grad(set_to_none=True)
        return seconds


def clock_for(device: torch.device) -> Clock:
    """What a step in one process is timed with.

    On a CPU the process's own seconds, so that other programs on the same cores disturb as little as possible; the
    process has one thread and nothing to wait for. On a GPU time as it passes.
    """
    return time.perf_counter if device.type == "cuda" else time.process_time


def waiter(device: torch.device) -> Callable[[], None]:
    """What makes a clock right: on a GPU, wait for it."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def timed(step: Callable[[], None], wait: Callable[[], None], clock: Clock) -> float:
    """Seconds of one call."""
    wait()
    started = clock()
    step()
    wait()
    return clock() - started


def seconds_of(
    variants: dict[str, Callable[[], None]], rounds: int, wait: Callable[[], None], clock: Clock
) -> dict[str, tuple[float, ...]]:
    """Seconds of each variant, taking turns."""
    taken = take_turns(variants, rounds, warmup=WARM_UP, wait=wait, clock=clock)
    return {name: timing.seconds for name, timing in taken.items()}


def measure_single(setup: Setup, rounds: int, small: tuple[int, int, int]) -> dict[str, Any]:
    """Band against all blocks, layers' shares, the engine against a plain loop, and saving."""
    wait, clock = waiter(setup.processes.device), clock_for(setup.processes.device)
    num_blocks = setup.arch.num_layers
    first = num_blocks - num_blocks // 3
    band, everything = Engine(setup, setup.config(first)), Engine(setup, setup.config(0))
    times = seconds_of({"band": band.step, "all": everything.step}, rounds, wait, clock)
    flops = {
        "band": sum(band.plan.partition.stage_costs),
        "all": sum(everything.plan.partition.stage_costs),
    }
    saved = {
        name: PlainLoop(setup, engine.config).saved_bytes()
        for name, engine in (("band", band), ("all", everything))
    }
    found = {"times": times, "flops": flops, "saved": saved, "first_block": first}
    del band, everything

    config = setup.config(first, recompute=True)
    loop = PlainLoop(setup, config)
    loop.layer_seconds(wait, clock)
    layer_times = [loop.layer_seconds(wait, clock) for _ in range(rounds)]
    specs = setup.specs(config)
    costs = make_plan(specs, config, None).partition.layer_costs
    two = make_plan(specs, setup.config(first, stages=2, recompute=True), None)
    found["layers"] = {
        "names": [spec.name or "input" for spec in specs],
        "seconds": layer_times,
        "costs": [cost.total for cost in costs],
        "bounds": list(two.bounds),
    }
    del loop

    brief = Setup(setup.root, small, setup.processes)
    config = brief.config(first)
    engine, plain = Engine(brief, config), PlainLoop(brief, config)
    found["overhead"] = seconds_of({"engine": engine.step, "plain": plain.step}, 4 * rounds, wait, clock)
    found["saving"] = measure_saving(everything_of(setup), rounds, wait)
    return found


def everything_of(setup: Setup) -> Pipeline:
    """A pipeline with large adapters on every block, after a step, so that there is optimizer state."""
    engine = Engine(setup, setup.config(0, rank=setup.arch.dim))
    engine.step()
    return engine.pipeline


def measure_saving(pipeline: Pipeline, rounds: int, wait: Callable[[], None]) -> dict[str, Any]:
    """How long a checkpoint holds training up, and how long copying the same tensors to host memory takes."""
    tensors = [p.detach() for p in pipeline.trainables.values()]
    for p in pipeline.trainables.values():
        tensors += [v for v in pipeline.optimizer.state.get(p, {}).values() if isinstance(v, Tensor)]
    homes = [torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for t in tensors]

    def copy() -> None:
        for home, tensor in zip(homes, tensors, strict=True):
            home.copy_(tensor, non_blocking=True)

    times: dict[str, list[float]] = {"save": [], "copy": []}
    with tempfile.TemporaryDirectory() as directory:
        writer = CheckpointWriter(Path(directory), pipeline, 2)
        for step in range(1, WARM_UP + rounds + 1):
            stall = writer.save(replace(initial_state(1), step=step)).stall
            writer.finish()  # not part of the stall: the disk works beside training
            copying = timed(copy, wait, time.perf_counter)
            if step > WARM_UP:
                times["save"].append(stall)
                times["copy"].append(copying)
    return {"times": times, "bytes": sum(tensor.nbytes for tensor in tensors)}


def measure_steps(setup: Setup, stages: int, micro_batches: int, rounds: int) -> dict[str, Any]:
    """Times of whole steps of a pipeline of so many stages, adapters on every block."""
    engine = Engine(setup, setup.config(0, stages=stages, micro_batches=micro_batches))
    times = seconds_of({"step": engine.step}, rounds, waiter(setup.processes.device), time.perf_counter)
    return {"times": times["step"], "bound": engine.plan.timing.speedup, "bounds": list(engine.plan.bounds)}


def grid_of(text: str) -> tuple[int, int, int]:
    """`4x8x8` as three numbers."""
    frames, rows, columns = map(int, text.split("x"))
    return frames, rows, columns


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("single", "steps"))
    parser.add_argument("--root", type=Path, required=True, help="directory of the DiT")
    parser.add_argument("--grid", type=grid_of, required=True, help="tokens of a micro-batch, e.g. 4x8x8")
    parser.add_argument("--small", type=grid_of, default=(1, 8, 8), help="the same for the short steps")
    parser.add_argument("--rounds", type=int, required=True, help="times each thing is measured")
    parser.add_argument("--stages", type=int, default=1, help="steps: number of stages")
    parser.add_argument("--micro_batches", type=int, default=8, help="steps: micro-batches per step")
    parser.add_argument("--local_rank", type=int, default=None, help="passed by launchers")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    processes = init_processes(timeout_minutes=10)
    setup = Setup(arguments.root, arguments.grid, processes)
    if arguments.what == "single":
        found = measure_single(setup, arguments.rounds, arguments.small)
    else:
        found = measure_steps(setup, arguments.stages, arguments.micro_batches, arguments.rounds)
    found["device"] = str(processes.device)
    if processes.is_main:
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    end_process(main())
