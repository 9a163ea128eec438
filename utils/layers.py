"""What a model has to offer so that the loop can train it: a list of layers, micro-batches and an export.

The loop and the engine know models only through this module; any model that implements `TrainableModel` trains.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from utils.config.schema import ActivationCheckpointing
from utils.data.sampler import MicroBatch
from utils.delta_budget import ModuleDelta
from utils.memory import NO_MEMORY, LayerMemory
from utils.planned_layer import PlannedLayer
from utils.recompute import is_wanted, run_again_later

Wire = tuple[Tensor, ...]


class PipelineLayer(nn.Module):
    """One layer of the pipeline: a wire (tuple of tensors) in, a wire (or, for the last layer, a tensor) out.

    Parameters live in `self.inner`, so that their global name is the layer's name plus the name inside `inner`.
    Subclasses implement `run`. `recompute` says which activations inside `run` are recomputed in the backward pass;
    with "offload" the first tensor of the wire, which is what a block replaces, waits in host memory.
    """

    def __init__(self, inner: nn.Module, recompute: ActivationCheckpointing = False) -> None:
        super().__init__()
        self.inner = inner
        self.recompute = recompute

    def forward(self, wire: Wire) -> Any:
        """Run the layer. Where no gradient is wanted nothing is recomputed, because nothing is stored."""
        if self.recompute and is_wanted(wire, self.inner):
            return run_again_later(self.recompute, self.run, wire)
        return self.run(*wire)

    def run(self, *wire: Tensor) -> Any:
        """The layer's computation."""
        raise NotImplementedError


@dataclass(frozen=True)
class LayerSpec:
    """A layer that is not built yet: the facts of `PlannedLayer`, and how it is built.

    `build` makes the layer with its weights on the given device; only the stage that owns it calls it.
    """

    name: str
    build: Callable[[torch.device], PipelineLayer]
    forward_flops: float
    trainable: bool = False
    trains_weights: bool = False
    recompute: float = 0.0
    memory: LayerMemory = NO_MEMORY
    backward_flops: float | None = None

    @classmethod
    def of(cls, facts: PlannedLayer, build: Callable[[torch.device], PipelineLayer]) -> "LayerSpec":
        """A planned layer with the function that builds it."""
        values = {field.name: getattr(facts, field.name) for field in fields(facts)}
        return cls(build=build, **values)


def global_names(spec_name: str, layer: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a built layer by global name."""
    prefix = f"{spec_name}." if spec_name else ""
    return {prefix + name.removeprefix("inner."): parameter for name, parameter in layer.named_parameters()}


def table_names(spec_name: str, layer: nn.Module) -> set[str]:
    """Global names of a built layer's lookup tables (embeddings, relative position biases)."""
    tables = {id(module.weight) for module in layer.modules() if isinstance(module, nn.Embedding)}
    return {name for name, parameter in global_names(spec_name, layer).items() if id(parameter) in tables}


@dataclass(frozen=True)
class PreparedBatch:
    """One micro-batch as tensors on the CPU.

    Attributes:
        inputs: the first layer's wire; None on ranks whose stage is not the first.
        labels: (target, sigma_B, weight_B, sample_index_B), and behind them mask_BFHW where not all of it counts;
            None on ranks whose stage is not the last.
    """

    inputs: Wire | None
    labels: Wire | None


class TrainableModel(Protocol):
    """A model as the loop sees it."""

    def layer_specs(self) -> Sequence[LayerSpec]:
        """All layers, first to last, without building any."""
        ...

    def prepare(
        self, batch: MicroBatch, weight: float, *, need_inputs: bool, need_labels: bool
    ) -> PreparedBatch:
        """Read one micro-batch and noise it. `weight` multiplies each sample's loss."""
        ...

    def num_tokens(self, batch: MicroBatch) -> int:
        """Tokens that the model processes for this micro-batch (for tokens per second)."""
        ...

    def describe_sample(self, sample_index: int) -> str:
        """A sample's name for messages, e.g. its file."""
        ...

    def export(
        self, trained: Mapping[str, Tensor], directory: Path, metadata: Mapping[str, str]
    ) -> list[Path]:
        """Write what other programs load (adapter or encoder) into `directory`.

        Args:
            trained: every trained parameter by global name.
            directory: exists and is empty; it becomes visible only after this returns.
            metadata: goes into each file.
        """
        ...

    def adapters_off(self, stage: nn.Module) -> AbstractContextManager[None] | None:
        """A context in which a stage's layers compute what they do without adapters; None for a model without."""
        ...

    def deltas(self, parameters: Mapping[str, Tensor]) -> list[ModuleDelta]:
        """How far each adapted module among one stage's parameters moves its weight; empty without an adapter."""
        ...

    def scale_adapters(self, parameters: Mapping[str, Tensor], factors: Mapping[str, float]) -> None:
        """Multiply what adapters add, in place.

        Args:
            parameters: by global name; modules whose parameters are not among them are left alone.
            factors: by module, as `deltas` names them.
        """
        ...
