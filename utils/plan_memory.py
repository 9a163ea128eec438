"""Bytes of each stage, told apart by what they are for, with the buffers of what crosses stage boundaries."""

from collections.abc import Sequence
from dataclasses import dataclass

from utils.memory import stage_memory
from utils.partition import training_costs
from utils.planned_layer import LayerFacts
from utils.schedule import in_flight


@dataclass(frozen=True)
class WireSize:
    """Bytes of a micro-batch behind a layer.

    Attributes:
        own: of the tensor that layers replace.
        others: of what travels along.
        gradient: of what comes back, where a gradient does.
    """

    own: float
    others: float
    gradient: float

    @property
    def sent(self) -> float:
        """All that goes on."""
        return self.own + self.others


@dataclass(frozen=True)
class StageBytes:
    """One stage on its device, and in host memory.

    Attributes:
        weights: frozen, with the room for swapped blocks.
        trainables: weights that train.
        gradients: of these.
        optimizer: this process's part of the optimizer's state.
        activations: for all micro-batches in flight, and what operations hold at the largest moment.
        transfers: what was received and is to be sent, and gradients of it.
        host: weights and activations in host memory.
    """

    weights: float
    trainables: float
    gradients: float
    optimizer: float
    activations: float
    transfers: float
    host: float

    @property
    def device(self) -> float:
        """All of it on the device, at the peak."""
        resident = self.weights + self.trainables + self.gradients + self.optimizer
        return resident + self.activations + self.transfers


def stage_bytes(
    layers: Sequence[LayerFacts],
    wires: Sequence[WireSize],
    bounds: Sequence[int],
    num_micro_batches: int,
    state_share: float,
) -> list[StageBytes]:
    """Every stage's bytes.

    Args:
        layers: all layers, their memory for the micro-batch in question.
        wires: behind each layer but the last.
        bounds: stage i owns layers bounds[i] .. bounds[i+1] - 1.
        num_micro_batches: per step and copy.
        state_share: of the optimizer's state that one process keeps.
    """
    num_stages = len(bounds) - 1
    has_backward = [cost.backward > 0 for cost in training_costs(layers)]
    found = []
    for stage in range(num_stages):
        own = layers[bounds[stage] : bounds[stage + 1]]
        flying = (
            in_flight(stage, num_stages, num_micro_batches)
            if any(has_backward[bounds[stage] : bounds[stage + 1]])
            else 0
        )
        memory = stage_memory((layer.memory for layer in own), flying, state_share)
        gradients = sum(layer.memory.gradients for layer in own)
        found.append(
            StageBytes(
                weights=memory.weights - gradients,
                trainables=gradients,  # a gradient has the precision of what it is of
                gradients=gradients,
                optimizer=memory.optimizer - gradients,
                activations=memory.activations,
                transfers=_transfers(wires, has_backward, bounds, stage, flying),
                host=memory.host,
            )
        )
    return found


def _transfers(
    wires: Sequence[WireSize], has_backward: Sequence[bool], bounds: Sequence[int], stage: int, flying: int
) -> float:
    """What comes in is held once (kept inputs are activations); what went out as long as its gradient is awaited."""
    first, end = bounds[stage], bounds[stage + 1]
    total = 0.0
    if first > 0:
        before = wires[first - 1]
        total += before.sent + (before.gradient if has_backward[first - 1] else 0.0)
    if end < bounds[-1]:
        behind = wires[end - 1]
        if has_backward[end - 1]:
            total += flying * behind.own + behind.others + behind.gradient
        else:
            total += behind.sent
    return total
