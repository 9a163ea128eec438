"""The pipeline: DeepSpeed's schedule and process grid, with a wire that says which tensors want a gradient.

The only module that imports DeepSpeed. What is kept of it: process grid, 1F1B schedule, `train_batch`, data-parallel
all-reduce. What is replaced, and why, is listed at `BandEngine`; `docs/engine.md` has the traps that led here.
"""

import contextlib
import gc
import io
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

if not torch.cuda.is_available():
    # DeepSpeed reads this while it is imported; without it, it warns that it found no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
import torch.distributed as dist
from deepspeed.pipe import LayerSpec as DeepSpeedLayerSpec
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import p2p, schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout

from utils.distributed import Processes, on_every_rank
from utils.layers import LayerSpec, PreparedBatch, global_names, table_names

_HEADER_INT64S = 256
# DeepSpeed calls our gradient hook only where clipping is on; the threshold itself is applied by us.
_ALWAYS_CALL_CLIPPING = 1e30
_NO_CLIPPING = float("inf")


class NonFiniteGradientsError(Exception):
    """The gradient norm of a step is not finite. Raised on every rank before the weights are touched."""


def _tensors(wire: Any) -> tuple[Tensor, ...]:
    return wire if isinstance(wire, tuple) else (wire,)


class BandEngine(PipelineEngine):
    """A pipeline engine that computes and sends no gradient that nothing needs.

    Each tensor travels behind a header with its dtype, shape and `requires_grad`. A gradient comes back only for
    tensors that ask for one; a stage whose outputs ask for none keeps no graph and skips its backward pass. Shapes
    and dtypes may differ between micro-batches. The stock engine forces a gradient on every received float,
    walks the graph once per output tensor, and reuses receive buffers across dtypes.

    The gradient norm is taken over all stages, one norm per parameter summed in the order of global names, so that
    it has the same bits in every layout (stock: only stage 0 counts).
    """

    max_gradient_norm: float
    last_gradient_norm: float
    _norm_slots: dict[str, int]
    _named_trainables: dict[str, nn.Parameter]

    def watch_gradients(self, trainables: dict[str, nn.Parameter], max_norm: float) -> None:
        """Tell the engine this stage's trainable parameters by global name, and where to clip (0 = nowhere)."""
        self._named_trainables = trainables
        self.max_gradient_norm = max_norm if max_norm > 0 else _NO_CLIPPING
        self.last_gradient_norm = 0.0
        names: list[Any] = [None] * self.num_stages
        dist.all_gather_object(names, sorted(trainables), group=self.grid.get_pipe_parallel_group())
        everything = sorted(name for stage_names in names for name in stage_names)
        self._norm_slots = {name: slot for slot, name in enumerate(everything)}

    def _broadcast_model(self) -> None:
        """Nothing to do: every rank has read the same weights and made the same adapters from the same seed."""

    def zero_grad(self) -> None:
        """Drop the gradients of what trains; nothing else has any (stock: a walk over all parameters in every step)."""
        for parameter in self._named_trainables.values():
            parameter.grad = None

    def clip_fp32_gradients(self) -> None:
        """Measure the global gradient norm and clip to `max_gradient_norm`.

        Raises:
            NonFiniteGradientsError: on every rank alike: the norm is over all stages of a copy, and the copies have
                averaged their gradients before.
        """
        norms = torch.zeros(max(len(self._norm_slots), 1), device=self.device, dtype=torch.float64)
        gradients = []
        for name, parameter in self._named_trainables.items():
            if parameter.grad is not None:
                gradients.append(parameter.grad)
                norms[self._norm_slots[name]] = parameter.grad.float().norm()
        if self.num_stages > 1:
            dist.all_reduce(norms, group=self.grid.get_pipe_parallel_group())
        norm = norms.square().sum().sqrt()
        self.last_gradient_norm = norm.item()
        if not torch.isfinite(norm):
            raise NonFiniteGradientsError
        if self.last_gradient_norm > self.max_gradient_norm and gradients:
            torch._foreach_mul_(gradients, self.max_gradient_norm / (self.last_gradient_norm + 1e-6))

    def forward_only(self, batches: Iterator[tuple[Any, Any]], count: int) -> None:
        """Send `count` micro-batches through the stages without gradients and with dropout off.

        `loss_fn` sees each on the last stage. (Stock `eval_batch` adds a barrier over all copies, which may have
        different numbers of micro-batches here, and reductions of which nothing is needed.)
        """
        was_training = self.module.training
        self.module.eval()
        self._compute_loss = True
        self.set_dataiterator(batches)
        try:
            with torch.no_grad():
                self._exec_schedule(
                    schedule.InferenceSchedule(
                        micro_batches=count, stages=self.num_stages, stage_id=self.stage_id
                    )
                )
        finally:
            self.set_dataiterator(None)
            self.module.train(was_training)
            self.total_loss, self.loss = None, None
            self.fwd_outputs: list[Tensor] = []
            for buffers in self.pipe_buffers.values():
                buffers[:] = [None] * len(buffers)

    def _exec_send_activations(self, buffer_id: int) -> None:
        outputs = self.pipe_buffers["outputs"][buffer_id]
        tensors = _tensors(outputs)
        header = [int(isinstance(outputs, tuple)), len(tensors)]
        for tensor in tensors:
            header += [self.DTYPE_TO_ID[tensor.dtype], int(tensor.requires_grad), tensor.dim(), *tensor.shape]
        header += [0] * (_HEADER_INT64S - len(header))
        p2p.send(torch.tensor(header, device=self.device), self.next_stage)
        for tensor in tensors:
            p2p.send(_as_bytes_if_bool(tensor.detach().contiguous()), self.next_stage)
        if not any(tensor.requires_grad for tensor in tensors):
            # No gradient will come back: a frozen stage keeps nothing of micro-batches in flight.
            self.pipe_buffers["outputs"][buffer_id] = self.pipe_buffers["inputs"][buffer_id] = None

    def _exec_recv_activations(self, buffer_id: int) -> None:
        header = torch.empty(_HEADER_INT64S, dtype=torch.int64, device=self.device)
        p2p.recv(header, self.prev_stage)
        fields = iter(header.tolist())
        is_tuple, count = next(fields), next(fields)
        received = []
        for _ in range(count):
            dtype, wants_gradient, dim = self.ID_TO_DTYPE[next(fields)], bool(next(fields)), next(fields)
            tensor = torch.empty([next(fields) for _ in range(dim)], dtype=dtype, device=self.device)
            p2p.recv(_as_bytes_if_bool(tensor), self.prev_stage)
            received.append(tensor.requires_grad_(wants_gradient))
        self.pipe_buffers["inputs"][buffer_id] = tuple(received) if is_tuple else received[0]

    def _exec_recv_grads(self, buffer_id: int) -> None:
        outputs = self.pipe_buffers["outputs"][buffer_id]
        wanting = [] if outputs is None else [tensor for tensor in _tensors(outputs) if tensor.requires_grad]
        self.grad_layer = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in wanting
        ]
        for gradient in self.grad_layer:
            p2p.recv(gradient, self.next_stage)

    def _exec_backward_pass(self, buffer_id: int) -> None:
        if self.is_last_stage():
            super()._exec_backward_pass(buffer_id)
            return
        outputs = self.pipe_buffers["outputs"][buffer_id]
        wanting = [] if outputs is None else [tensor for tensor in _tensors(outputs) if tensor.requires_grad]
        if wanting:
            # One walk of the graph for all outputs. The flag tells DeepSpeed's hooks that this backward is ours.
            self._running_engine_backward = True
            try:
                torch.autograd.backward(wanting, self.grad_layer)
            finally:
                self._running_engine_backward = False
        self.grad_layer = []
        self.pipe_buffers["outputs"][buffer_id] = None

    def _exec_send_grads(self, buffer_id: int) -> None:
        inputs = self.pipe_buffers["inputs"][buffer_id]
        for tensor in () if inputs is None else _tensors(inputs):
            if tensor.requires_grad:
                gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                p2p.send(gradient.contiguous(), self.prev_stage)
        self.pipe_buffers["inputs"][buffer_id] = None

    # The engine looks instructions up here, not by method name, so overriding the methods alone would do nothing.
    _INSTRUCTION_MAP = {  # noqa: RUF012
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.SendActivation: _exec_send_activations,
        schedule.RecvActivation: _exec_recv_activations,
        schedule.RecvGrad: _exec_recv_grads,
        schedule.BackwardPass: _exec_backward_pass,
        schedule.SendGrad: _exec_send_grads,
    }


def _as_bytes_if_bool(tensor: Tensor) -> Tensor:
    """Not every backend sends bool; uint8 has the same bytes."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


class _LazyLayer(DeepSpeedLayerSpec):
    """DeepSpeed's idea of a layer that is not built yet, around one that is, or that another stage owns."""

    def __init__(self, built: nn.Module | None) -> None:
        super().__init__(nn.Module)
        self._built = built

    def build(self, log: bool = False) -> nn.Module:
        assert self._built is not None, "asked of the stage that owns the layer only"
        return self._built


class _SplitModule(PipelineModule):
    """A PipelineModule with the boundaries it is given; stock methods build every layer on every rank to count."""

    def __init__(self, layers: list[_LazyLayer], bounds: Sequence[int], **arguments: Any) -> None:
        self.__dict__["_bounds"] = list(
            bounds
        )  # nn.Module allows plain attributes only after its own __init__
        super().__init__(layers=layers, **arguments)

    def train(self, mode: bool = True) -> "_SplitModule":
        """Stock calls this in every step, and torch then visits every module, also where nothing changes."""
        if mode != self.training:
            super().train(mode)
        return self

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self._bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(self.parts[stage], self.parts[stage + 1])


class Pipeline:
    """This process's stage of the model, ready to train."""

    def __init__(self, engine: BandEngine, parameters: dict[str, nn.Parameter]) -> None:
        self.engine = engine
        self.parameters = parameters

    @property
    def trainables(self) -> dict[str, nn.Parameter]:
        """This stage's trainable parameters by global name."""
        return {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}

    @property
    def stage_id(self) -> int:
        """Index of this process's stage."""
        return int(self.engine.stage_id)

    @property
    def num_stages(self) -> int:
        """Number of stages of one copy of the model."""
        return int(self.engine.num_stages)

    @property
    def dp_rank(self) -> int:
        """Index of this process's copy of the model."""
        return int(self.engine.grid.get_data_parallel_rank())

    @property
    def dp_size(self) -> int:
        """Number of copies of the model."""
        return int(self.engine.dp_world_size)

    @property
    def is_first(self) -> bool:
        """True where the pipeline takes inputs."""
        return bool(self.engine.is_first_stage())

    @property
    def is_last(self) -> bool:
        """True where the loss is computed."""
        return bool(self.engine.is_last_stage())

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """This stage's optimizer."""
        return self.engine.basic_optimizer

    @property
    def gradient_norm(self) -> float:
        """Global gradient norm of the last step, before clipping."""
        return self.engine.last_gradient_norm

    @property
    def module(self) -> nn.Module:
        """This stage's layers."""
        return self.engine.module

    def forward_only(self, batches: Sequence[PreparedBatch]) -> None:
        """Send micro-batches through the stages of this copy, without gradients and with dropout off.

        The loss function sees each on the last stage. All stages of a copy call it with as many micro-batches; there may
        be none.
        """
        if batches:
            self.engine.forward_only(_as_deepspeed_batches(iter(batches)), len(batches))

    def train_step(self, batches: Iterator[PreparedBatch]) -> None:
        """One optimizer step over the accumulation window that `batches` yields.

        Raises:
            NonFiniteGradientsError: on every rank; the weights are those of before the step.
        """
        self.engine.train_batch(_as_deepspeed_batches(batches))

    def close(self) -> None:
        """Give the engine's groups back and let go of the layers, so that another pipeline can be built in this process.

        Every rank must call it; afterwards nothing of this object works. What the caller still refers to stays.
        """
        engine = self.engine
        held = [
            engine.module.world_group,
            *vars(engine.grid).values(),
            *(getattr(p2p, "_groups", None) or ()),
        ]
        groups = [one for one in held if isinstance(one, dist.ProcessGroup)]
        engine.destroy()
        self.parameters = {}
        # Hooks on tensors refer to the engine from where the garbage collector does not see them.
        engine.__dict__.clear()
        del self.engine, engine, held
        p2p._groups, p2p._grid = None, None
        for group in dict.fromkeys(groups):
            dist.destroy_process_group(group)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _as_deepspeed_batches(batches: Iterator[PreparedBatch]) -> Iterator[tuple[Any, Any]]:
    for batch in batches:
        yield batch.inputs, batch.labels


def build_pipeline(
    specs: Sequence[LayerSpec],
    bounds: Sequence[int],
    loss_fn: Callable[[Tensor, tuple[Tensor, ...]], Tensor],
    make_optimizer: Callable[[dict[str, nn.Parameter], Collection[str], Any], torch.optim.Optimizer],
    *,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    gradient_clipping: float,
    processes: Processes,
) -> Pipeline:
    """Build this process's layers on its device and the engine around them. Every rank must call it.

    Args:
        specs: all layers of the model, first to last.
        bounds: stage i owns layers bounds[i] .. bounds[i+1] - 1.
        loss_fn: called on the last stage with its output and labels.
        make_optimizer: gets this stage's trainable parameters by global name, of which there may be none, the names
            of those that are lookup tables, and the process group of the copies of this stage.
        micro_batch_size: samples per micro-batch.
        gradient_accumulation_steps: micro-batches per step and data-parallel rank.
        gradient_clipping: largest global gradient norm; 0 is off.
        processes: this process's place.

    Raises:
        UserError: a layer's weights cannot be read; on every rank.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Compiled with a C++ compiler on first use on CPU, and serves inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    num_stages = len(bounds) - 1
    dp_size = processes.world_size // num_stages
    config = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "train_batch_size": micro_batch_size * gradient_accumulation_steps * dp_size,
        "gradient_clipping": _ALWAYS_CALL_CLIPPING,
        "steps_per_print": 10**9,
        # Copies average their gradients in float32, whatever the gradients' own precision.
        "communication_data_type": "fp32",
    }
    topology = PipeDataParallelTopology(num_pp=num_stages, num_dp=dp_size)
    stage = topology.get_coord(processes.rank).pipe
    # Before DeepSpeed's constructors, which exchange messages: a file that one rank cannot read must not leave the
    # others waiting in them.
    own = on_every_rank(lambda: _build_layers(specs, bounds[stage], bounds[stage + 1], processes.device))
    trainables = {name: parameter for name, parameter in own.parameters.items() if parameter.requires_grad}
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its topology with bare prints
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        lazy = [_LazyLayer(own.layers.get(index)) for index in range(len(specs))]
        module = _SplitModule(lazy, bounds, topology=topology, loss_fn=loss_fn)
        engine = BandEngine(
            args=None,
            model=module,
            optimizer=lambda _: make_optimizer(
                trainables, own.tables, module.mpu().get_data_parallel_group()
            ),
            model_parameters=list(trainables.values()),
            mpu=module.mpu(),
            config=config,
            config_class=DeepSpeedConfig(config, module.mpu()),
        )
    # With one copy of the model there is nothing to reduce, and the stock reduction would copy every gradient.
    engine.pipeline_enable_backward_allreduce = dp_size > 1
    for group in (engine.grid.get_pipe_parallel_group(), engine.grid.get_data_parallel_group()):
        # DeepSpeed makes its groups with the backend's default, which is not the configured one.
        _set_pg_timeout(timedelta(minutes=processes.timeout_minutes), group)
    engine.watch_gradients(trainables, gradient_clipping)
    return Pipeline(engine, own.parameters)


@dataclass(frozen=True)
class _OwnLayers:
    """One stage's built layers by index, their parameters by global name, and which of these are lookup tables."""

    layers: dict[int, nn.Module]
    parameters: dict[str, nn.Parameter]
    tables: set[str]


def _build_layers(specs: Sequence[LayerSpec], start: int, stop: int, device: torch.device) -> _OwnLayers:
    built = _OwnLayers({}, {}, set())
    for index in range(start, stop):
        layer = specs[index].build(device)
        built.layers[index] = layer
        built.parameters.update(global_names(specs[index].name, layer))
        built.tables.update(table_names(specs[index].name, layer))
    return built
