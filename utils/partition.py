"""Which stage gets which layers: balanced by the work that a training step really does in each layer."""

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

from utils.config.schema import TrainConfig
from utils.errors import UserError
from utils.memory import RunningMemory
from utils.planned_layer import LayerFacts
from utils.schedule import in_flight

# What is left is for transfer buffers, the loss, kernels' own memory and the allocator.
USABLE_SHARE = 0.8
SizeOf = Callable[[int, int, int], float]


@dataclass(frozen=True)
class LayerCost:
    """FLOPs of one layer in a training step at the dataset's mean sample; `backward` includes what is recomputed."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both passes."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Partition:
    """Layer boundaries (stage i owns layers bounds[i] .. bounds[i+1] - 1) and each layer's cost."""

    bounds: tuple[int, ...]
    layer_costs: tuple[LayerCost, ...]

    @property
    def stage_costs(self) -> tuple[float, ...]:
        """Cost of each stage in FLOPs per sample."""
        return tuple(sum(cost.total for cost in self.layer_costs[a:b]) for a, b in pairwise(self.bounds))


def training_costs(specs: Sequence[LayerFacts]) -> tuple[LayerCost, ...]:
    """FLOPs of one training step in each layer.

    Before the first trainable layer only the forward pass runs. From it on, the backward pass is: what the layer
    recomputes of its forward, and what the layer says of its own; by default the gradient of the input (one
    forward) and for fully trained weights the gradient of the weights (one forward more).
    """
    costs = []
    has_backward = False
    for spec in specs:
        has_backward = has_backward or spec.trainable
        backward = 0.0
        if has_backward:
            backward = spec.forward_flops * (1.0 + spec.trains_weights)
            if spec.backward_flops is not None:
                backward = spec.backward_flops
            backward += spec.recompute * spec.forward_flops
        costs.append(LayerCost(spec.forward_flops, backward))
    return tuple(costs)


def plan_stages(
    specs: Sequence[LayerFacts],
    config: TrainConfig,
    device_bytes: float | None = None,
    copies: int = 1,
) -> Partition:
    """Split the layers over `pipeline_stages` by `partition_method`.

    Args:
        specs: all layers.
        config: the run.
        device_bytes: memory of one device, where it bounds what a stage may hold ("cost" only): a split in which
            every stage stays under 80 % of it, activations counted, is preferred to one that is better balanced.
        copies: data-parallel copies of the model; with `zero_stage = 1` each keeps its share of the optimizer's state.

    Raises:
        UserError: more stages than layers, or a `partition_split` that does not fit the layers.
    """
    num_stages, num_layers = config.pipeline_stages, len(specs)
    if num_stages > num_layers:
        raise UserError(
            f"pipeline_stages = {num_stages}: the model has only {num_layers} layers; use fewer stages"
        )
    costs = training_costs(specs)
    if config.partition_method == "manual":
        bounds = (0, *config.partition_split, num_layers)
        if any(a >= b for a, b in pairwise(bounds)):
            raise UserError(
                f"partition_split = {list(config.partition_split)}: every stage needs at least one of the {num_layers} "
                f"layers (0 .. {num_layers - 1}), in rising order"
            )
        return Partition(bounds, costs)
    if num_stages == 1:
        return Partition((0, num_layers), costs)
    if config.partition_method == "uniform":
        return Partition(balanced_bounds((1.0,) * num_layers, num_stages), costs)
    weights = tuple(cost.total for cost in costs)
    if device_bytes is None:
        return Partition(balanced_bounds(weights, num_stages), costs)
    share = state_share(config, copies)
    size_of = _stage_sizes(specs, num_stages, config.gradient_accumulation_steps, share)
    return Partition(balanced_bounds(weights, num_stages, size_of, device_bytes * USABLE_SHARE), costs)


def state_share(config: TrainConfig, copies: int) -> float:
    """Share of a stage's optimizer state that one process keeps."""
    return 1 / copies if config.zero_stage else 1.0


def _stage_sizes(
    specs: Sequence[LayerFacts], num_stages: int, num_micro_batches: int, share: float
) -> SizeOf:
    """(start, end, stage) -> bytes on the device of a stage that owns these layers."""
    totals: dict[tuple[int, int], RunningMemory] = {}
    for start in range(len(specs)):
        running = RunningMemory()
        for end in range(start + 1, len(specs) + 1):
            running.add(specs[end - 1].memory)
            totals[start, end] = copy(running)

    def size_of(start: int, end: int, stage: int) -> float:
        return totals[start, end].at(in_flight(stage, num_stages, num_micro_batches), share).device

    return size_of


def balanced_bounds(
    weights: tuple[float, ...],
    num_parts: int,
    size_of: SizeOf | None = None,
    size_limit: float = math.inf,
) -> tuple[int, ...]:
    """Boundaries of the contiguous split whose heaviest part is as light as possible, no part empty.

    Exact, by dynamic programming over prefixes; at most about 70 layers here. Among equally good splits the one
    whose parts have the smallest sum of squares wins, so that the lighter parts are even too. Before all that, the
    parts' sizes, `size_of(start, end, part)`, exceed `size_limit` by as little as possible in sum, which is 0 where it
    can be met.
    """
    prefix = [0.0, *accumulate(weights)]

    @cache
    def best(start: int, parts: int) -> tuple[float, float, float, tuple[int, ...]]:
        options: list[tuple[float, float, float, tuple[int, ...]]] = []
        ends = [len(weights)] if parts == 1 else range(start + 1, len(weights) - parts + 2)
        for end in ends:
            load = prefix[end] - prefix[start]
            excess = 0.0
            if size_of is not None:
                excess = max(0.0, size_of(start, end, num_parts - parts) - size_limit)
            if parts == 1:
                options.append((excess, load, load * load, ()))
                continue
            more_excess, heaviest, squares, cuts = best(end, parts - 1)
            options.append((excess + more_excess, max(load, heaviest), squares + load * load, (end, *cuts)))
        return min(options)

    return (0, *best(0, num_parts)[3], len(weights))
