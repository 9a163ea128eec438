"""Which stage gets which layers: balanced by the work that a training step really does in each layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

from utils.config.schema import TrainConfig
from utils.errors import UserError
from utils.layers import LayerSpec

# What is left is for activations, transfer buffers and the allocator.
_RESIDENT_SHARE = 0.8


@dataclass(frozen=True)
class StagePlan:
    """Layer boundaries (stage i owns layers bounds[i] .. bounds[i+1] - 1), each layer's cost in FLOPs and resident bytes."""

    bounds: tuple[int, ...]
    layer_costs: tuple[float, ...]
    layer_bytes: tuple[float, ...]

    @property
    def stage_bytes(self) -> tuple[float, ...]:
        """Weights, gradients and optimizer state of each stage in bytes."""
        return tuple(sum(self.layer_bytes[a:b]) for a, b in pairwise(self.bounds))

    @property
    def stage_costs(self) -> tuple[float, ...]:
        """Cost of each stage in FLOPs per sample."""
        return tuple(sum(self.layer_costs[a:b]) for a, b in pairwise(self.bounds))


def training_costs(specs: Sequence[LayerSpec]) -> tuple[float, ...]:
    """FLOPs of one training step in each layer.

    Before the first trainable layer only the forward pass runs. From it on: forward, the same again if the layer
    recomputes, the gradient of the input (about one forward), and for fully trained weights the gradient of the
    weights (about one forward more).
    """
    costs = []
    backward = False
    for spec in specs:
        backward = backward or spec.trainable
        passes = 1.0
        if backward:
            passes += 1.0 + (1.0 if spec.recompute else 0.0) + (1.0 if spec.trains_weights else 0.0)
        costs.append(spec.forward_flops * passes)
    return tuple(costs)


def plan_stages(
    specs: Sequence[LayerSpec], config: TrainConfig, device_bytes: float | None = None, copies: int = 1
) -> StagePlan:
    """Split the layers over `pipeline_stages` by `partition_method`.

    Args:
        specs: all layers.
        config: the run.
        device_bytes: memory of one device, where it bounds what a stage may hold ("cost" only): a split in which
            every stage's resident bytes stay under 80 % of it is preferred to one that is better balanced.
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
    elsewhere = 1 - 1 / copies if config.zero_stage else 0.0
    sizes = tuple(spec.resident_bytes - elsewhere * spec.state_bytes for spec in specs)
    if config.partition_method == "manual":
        bounds = (0, *config.partition_split, num_layers)
        if any(a >= b for a, b in pairwise(bounds)):
            raise UserError(
                f"partition_split = {list(config.partition_split)}: every stage needs at least one of the {num_layers} "
                f"layers (0 .. {num_layers - 1}), in rising order"
            )
        return StagePlan(bounds, costs, sizes)
    if config.partition_method == "uniform":
        return StagePlan(balanced_bounds((1.0,) * num_layers, num_stages), costs, sizes)
    limit = math.inf if device_bytes is None else device_bytes * _RESIDENT_SHARE
    return StagePlan(balanced_bounds(costs, num_stages, sizes, limit), costs, sizes)


def balanced_bounds(
    weights: tuple[float, ...],
    num_parts: int,
    sizes: tuple[float, ...] | None = None,
    size_limit: float = math.inf,
) -> tuple[int, ...]:
    """Boundaries of the contiguous split whose heaviest part is as light as possible, no part empty.

    Exact, by dynamic programming over prefixes; at most about 70 layers here. Among equally good splits the one
    whose parts have the smallest sum of squares wins, so that the lighter parts are even too. Before all that, the
    parts' sizes exceed `size_limit` by as little as possible in sum, which is 0 where it can be met.
    """
    prefix = [0.0, *accumulate(weights)]
    size_prefix = [0.0, *accumulate(sizes or (0.0,) * len(weights))]

    @cache
    def best(start: int, parts: int) -> tuple[float, float, float, tuple[int, ...]]:
        options: list[tuple[float, float, float, tuple[int, ...]]] = []
        ends = [len(weights)] if parts == 1 else range(start + 1, len(weights) - parts + 2)
        for end in ends:
            load = prefix[end] - prefix[start]
            excess = max(0.0, size_prefix[end] - size_prefix[start] - size_limit)
            if parts == 1:
                options.append((excess, load, load * load, ()))
                continue
            more_excess, heaviest, squares, cuts = best(end, parts - 1)
            options.append((excess + more_excess, max(load, heaviest), squares + load * load, (end, *cuts)))
        return min(options)

    return (0, *best(0, num_parts)[3], len(weights))
