"""What layers and stages keep in memory, by arithmetic: the records, and adding layers up to a stage."""

from collections.abc import Iterable
from dataclasses import dataclass

# A block in use and the one that is being copied.
NUM_SWAP_SLOTS = 2


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer.

    Attributes:
        weights: weights that stay on the device.
        gradients: of what trains.
        state: of the optimizer.
        stored: activations kept between forward and backward, per micro-batch, on the device; 0 without a backward.
        rebuilt: what exists for a moment only, while this layer's backward recomputes its forward.
        working: what its operations hold besides, at the largest moment: intermediate results, and gradients of them.
        shared: the part of the wire that is kept per micro-batch too, once for all layers of a stage that read it.
        slot: weights that visit the device (`blocks_to_swap`); a stage has room for two such blocks.
        host_weights: weights that live in host memory.
        host_stored: activations kept in host memory, per micro-batch.
    """

    weights: float = 0.0
    gradients: float = 0.0
    state: float = 0.0
    stored: float = 0.0
    rebuilt: float = 0.0
    working: float = 0.0
    shared: float = 0.0
    slot: float = 0.0
    host_weights: float = 0.0
    host_stored: float = 0.0


NO_MEMORY = LayerMemory()


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage, activations for all micro-batches in flight.

    Attributes:
        weights: on the device, with the room for swapped blocks.
        optimizer: gradients and optimizer state.
        activations: between forward and backward, and what exists for a moment only, of the largest layer.
        host: weights and activations in host memory.
    """

    weights: float
    optimizer: float
    activations: float
    host: float

    @property
    def resident(self) -> float:
        """What is there during the whole run."""
        return self.weights + self.optimizer

    @property
    def device(self) -> float:
        """All of it on the device, at the peak."""
        return self.resident + self.activations


class RunningMemory:
    """Sums and maxima over the layers of a stage, layer by layer."""

    def __init__(self) -> None:
        self._weights = self._gradients = self._state = self._stored = self._momentary = self._peak = (
            self._shared
        ) = 0.0
        self._host_weights = self._host_stored = 0.0
        self._slots: list[float] = []

    def __copy__(self) -> "RunningMemory":
        """As `copy.copy` makes it, in a third of the time: a plan of many stages asks for some ten thousand."""
        other = object.__new__(RunningMemory)
        other.__dict__.update(self.__dict__)
        return other

    def add(self, layer: LayerMemory) -> None:
        """One more layer."""
        self._weights += layer.weights
        self._gradients += layer.gradients
        self._state += layer.state
        self._stored += layer.stored
        self._host_weights += layer.host_weights
        self._host_stored += layer.host_stored
        momentary = layer.rebuilt + layer.working
        self._momentary = max(self._momentary, momentary)
        # The backward pass comes from the last layer: what the layers above this one stored is gone by then.
        self._peak = max(self._peak, self._stored + momentary)
        self._shared = max(self._shared, layer.shared)
        if layer.slot:
            # Slots are as large as the largest block that visits, and no more than there are such blocks.
            largest = max([layer.slot, *self._slots])
            self._slots = [largest] * min(NUM_SWAP_SLOTS, len(self._slots) + 1)

    def at(self, in_flight: int, state_share: float = 1.0) -> StageMemory:
        """The stage with this many micro-batches between forward and backward, and this share of the optimizer's state.

        The share is below 1 where data-parallel copies divide the state among them.
        """
        kept = self._stored + self._shared
        activations = (in_flight - 1) * kept + self._shared + self._peak if in_flight else self._momentary
        return StageMemory(
            weights=self._weights + sum(self._slots),
            optimizer=self._gradients + state_share * self._state,
            activations=activations,
            host=self._host_weights + in_flight * self._host_stored,
        )


def stage_memory(layers: Iterable[LayerMemory], in_flight: int, state_share: float = 1.0) -> StageMemory:
    """Memory of a stage that owns these layers; see `RunningMemory.at`."""
    total = RunningMemory()
    for layer in layers:
        total.add(layer)
    return total.at(in_flight, state_share)


def evenly_spread(num_chosen: int, num_blocks: int) -> list[int]:
    """Which blocks to swap: spread evenly, so that each copy has blocks to hide behind."""
    return [(2 * index + 1) * num_blocks // (2 * num_chosen) for index in range(num_chosen)]
