"""Which stage gets which layers: balanced by the work that a training step really does in each layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from utils.config.schema import TrainConfig
from utils.errors import UserError
from utils.layers import LayerSpec


@dataclass(frozen=True)
class StagePlan:
    """Layer boundaries (stage i owns layers bounds[i] .. bounds[i+1] - 1) and the cost of each layer in FLOPs."""

    bounds: tuple[int, ...]
    layer_costs: tuple[float, ...]

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


def plan_stages(specs: Sequence[LayerSpec], config: TrainConfig) -> StagePlan:
    """Split the layers over `pipeline_stages` by `partition_method`.

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
        return StagePlan(bounds, costs)
    weights = costs if config.partition_method == "cost" else (1.0,) * num_layers
    return StagePlan(balanced_bounds(tuple(weights), num_stages), costs)


def balanced_bounds(weights: tuple[float, ...], num_parts: int) -> tuple[int, ...]:
    """Boundaries of the contiguous split whose heaviest part is as light as possible, no part empty.

    Exact, by dynamic programming over prefixes; at most about 70 layers here. Among equally good splits the one
    whose parts have the smallest sum of squares wins, so that the lighter parts are even too.
    """
    prefix = [0.0]
    for weight in weights:
        prefix.append(prefix[-1] + weight)

    @cache
    def best(start: int, parts: int) -> tuple[float, float, tuple[int, ...]]:
        if parts == 1:
            load = prefix[-1] - prefix[start]
            return load, load * load, ()
        options = []
        for end in range(start + 1, len(weights) - parts + 2):
            load = prefix[end] - prefix[start]
            heaviest, squares, cuts = best(end, parts - 1)
            options.append((max(load, heaviest), squares + load * load, (end, *cuts)))
        return min(options)

    return (0, *best(0, num_parts)[2], len(weights))
