"""What is known of a layer before it is built: its work and its memory. No torch: a plan needs no tensor."""

from dataclasses import dataclass
from typing import Protocol

from utils.memory import NO_MEMORY, LayerMemory


class LayerFacts(Protocol):
    """What splitting layers over stages depends on: `PlannedLayer`, and `utils.layers.LayerSpec`, which can be built too."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def forward_flops(self) -> float: ...  # noqa: D102

    @property
    def trainable(self) -> bool: ...  # noqa: D102

    @property
    def trains_weights(self) -> bool: ...  # noqa: D102

    @property
    def recompute(self) -> float: ...  # noqa: D102

    @property
    def memory(self) -> LayerMemory: ...  # noqa: D102

    @property
    def backward_flops(self) -> float | None: ...  # noqa: D102


@dataclass(frozen=True)
class PlannedLayer:
    """A layer by its facts alone.

    Attributes:
        name: global name; parameters are called `<name>.<name inside inner>` in checkpoints.
        forward_flops: multiply-adds times two of one forward pass at the dataset's mean sample.
        backward_flops: the same of its backward pass where a gradient comes, without what is recomputed. None: as many
            as forward, and as many again where `trains_weights`.
        trainable: whether any of its parameters trains.
        trains_weights: whether its full weights train (not only an adapter), which adds a weight-gradient pass.
        recompute: share of its forward pass that runs again in the backward pass.
        memory: what it keeps in memory.
    """

    name: str
    forward_flops: float
    trainable: bool = False
    trains_weights: bool = False
    recompute: float = 0.0
    memory: LayerMemory = NO_MEMORY
    backward_flops: float | None = None
