"""What each of Wan's layers keeps in memory, for the plan of the stages: weights, optimizer, activations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from models.wan import activations
from models.wan.activations import Adapters, Batch, DitPrecision
from models.wan.arch import WanArch
from models.wan.component_shapes import Umt5Sizes
from models.wan.costs import num_adapter_weights, num_weights
from utils.config.schema import ActivationCheckpointing, TrainConfig
from utils.memory import LayerMemory
from utils.number_bytes import bytes_of, state_bytes_per_weight, trained_bytes
from utils.tensor_source import Shape

_FLOAT32 = 4.0
_ID_BYTES = 8.0
# The DiT's parts before its blocks, kept in float32 but for the text embedding.
_FLOAT32_INPUT = ("patch_embedding.", "time_embedding.", "time_projection.")


@dataclass(frozen=True)
class Workload:
    """The mean sample, by which layers are weighed: video and text tokens, and timesteps that the DiT is told of it."""

    video_tokens: float
    text_tokens: float
    time_rows: float = 1.0


def batch_of(workload: Workload, samples: int) -> Batch:
    """A micro-batch of so many mean samples."""
    return Batch(
        workload.video_tokens * samples, workload.text_tokens * samples, samples, workload.time_rows * samples
    )


def recomputed_share(mode: ActivationCheckpointing) -> float:
    """Share of a block's FLOPs that run again; "selective" keeps all products, and the rest has next to none."""
    return 1.0 if mode is True or mode == "offload" else 0.0


def kept_activations(
    mode: ActivationCheckpointing, *, everything: float, selected: float, own_input: float, shared: float
) -> LayerMemory:
    """Activations of a block that has a backward pass.

    Args:
        mode: `activation_checkpointing`.
        everything: bytes that autograd saves without recomputation.
        selected: bytes that "selective" saves, the block's input among them.
        own_input: the part of the wire that the block replaces.
        shared: the part that it only reads and that wants keeping for the backward pass.
    """
    if mode is False:
        return LayerMemory(stored=everything, shared=shared)
    if mode == "selective":
        return LayerMemory(stored=selected, rebuilt=max(0.0, everything - selected), shared=shared)
    if mode == "offload":
        return LayerMemory(host_stored=own_input, rebuilt=everything + own_input, shared=shared)
    return LayerMemory(stored=own_input, rebuilt=everything, shared=shared)


class DitMemory:
    """The DiT's layers."""

    def __init__(
        self,
        config: TrainConfig,
        shapes: Mapping[str, Shape],
        arch: WanArch,
        targets: Sequence[tuple[int, str]],
        workload: Workload,
    ) -> None:
        """`targets` are the adapted modules as (block, path within it)."""
        self._config, self._shapes, self._arch = config, shapes, arch
        self._paths: dict[int, list[str]] = {}
        for index, path in targets:
            self._paths.setdefault(index, []).append(path)
        model = config.model
        self._precision = DitPrecision(
            bytes_of(model.dtype), bytes_of(model.residual_dtype), model.lean_kernels
        )
        samples = config.micro_batch_size_per_gpu
        self._batch = batch_of(workload, samples)
        self._text_trains = config.model.train_text_encoder

    @cached_property
    def _first_adapted(self) -> float:
        return min(self._paths, default=math.inf)

    def hidden_wants_gradient(self, index: int) -> bool:
        """Whether a gradient goes on from this block to the one below."""
        return index > self._first_adapted or (self._text_trains and index > 0)

    def input(self) -> LayerMemory:
        """Patch, time and text embedding."""
        weights = _FLOAT32 * num_weights(self._shapes, *_FLOAT32_INPUT)
        weights += self._precision.compute * num_weights(self._shapes, "text_embedding.")
        stored = activations.dit_input_saved(self._arch, self._batch, self._precision, text=self._text_trains)
        working = activations.dit_ends_working(self._arch, self._batch)
        return LayerMemory(weights=weights, stored=stored, working=working)

    def head(self) -> LayerMemory:
        """Norm and projection, and the loss behind them."""
        weights = _FLOAT32 * num_weights(self._shapes, "head.")
        stored = activations.dit_head_saved(self._arch, self._batch)
        working = activations.dit_ends_working(self._arch, self._batch)
        return LayerMemory(weights=weights, stored=stored, working=working)

    def block(self, index: int, *, is_swapped: bool) -> LayerMemory:
        """One block."""
        paths = self._paths.get(index, [])
        memory = self._activations(index, paths)
        if self._config.adapter is not None:
            names = [f"blocks.{index}.{path}" for path in paths]
            trained = num_adapter_weights(self._shapes, names, self._config.adapter.rank)
            memory = replace(_trained(trained, self._config), **_activations_of(memory))
        small, large = self._frozen
        if is_swapped:
            return replace(memory, weights=memory.weights + small, slot=large, host_weights=large)
        return replace(memory, weights=memory.weights + small + large)

    @cached_property
    def _frozen(self) -> tuple[float, float]:
        """Bytes of what stays on the device in any case (norms, biases, modulation, scales), and of linear weights.

        Of one block: `load_arch` has seen that all have the same shapes.
        """
        small = large = 0.0
        in_8_bits = self._config.model.transformer_dtype == "float8"
        for name, shape in self._shapes.items():
            if not name.startswith("blocks.0."):
                continue
            if len(shape) == 2:
                large += math.prod(shape) * (1 if in_8_bits else self._precision.compute)
                small += _FLOAT32 * shape[0] if in_8_bits else 0.0
            elif name.endswith("bias") and "norm" not in name:
                small += math.prod(shape) * self._precision.compute
            else:
                small += math.prod(shape) * _FLOAT32
        return small, large

    def _activations(self, index: int, paths: Sequence[str]) -> LayerMemory:
        hidden = self.hidden_wants_gradient(index)
        config, arch, batch, precision = self._config, self._arch, self._batch, self._precision
        has_backward = hidden or bool(paths) or self._text_trains
        working = activations.dit_block_working(arch, batch, precision, has_backward=has_backward)
        if not has_backward:
            return LayerMemory(working=working)
        adapter = config.adapter
        adapters = Adapters()
        if adapter is not None:
            adapters = Adapters(paths, adapter.rank, adapter.dropout > 0)
        own_input = activations.dit_hidden_bytes(arch, batch, precision)
        kept = kept_activations(
            config.activation_checkpointing,
            everything=activations.dit_block_saved(
                arch,
                batch,
                precision,
                adapters,
                hidden_wants_gradient=hidden,
                text_wants_gradient=self._text_trains,
            ),
            selected=activations.dit_block_selected(arch, batch, precision, adapters),
            own_input=own_input,
            shared=activations.dit_text_bytes(arch, batch, precision),
        )
        if config.activation_checkpointing is True and hidden and precision.kept_stream == precision.residual:
            # The recomputed block's first norm keeps the very input that is stored already.
            kept = replace(kept, rebuilt=kept.rebuilt - own_input)
        return replace(kept, working=working)


class TextMemory:
    """UMT5's layers."""

    def __init__(
        self, config: TrainConfig, shapes: Mapping[str, Shape], sizes: Umt5Sizes, workload: Workload
    ) -> None:
        self._config, self._shapes, self._sizes = config, shapes, sizes
        self._compute = bytes_of(config.model.dtype)
        samples = config.micro_batch_size_per_gpu
        self._batch = batch_of(workload, samples)

    def table(self) -> LayerMemory:
        """The token table; where it trains it keeps the ids."""
        trained = self._config.model.train_token_embedding
        weights = self._weights("token_embedding.", trained=trained)
        return replace(weights, stored=self._batch.text_tokens * _ID_BYTES) if trained else weights

    def norm(self) -> LayerMemory:
        """The final norm: its input, normalised and not, and what the zeros of padding are multiplied with."""
        stored = 2 * self._batch.text_tokens * self._sizes.d_model * _FLOAT32
        return replace(self._weights("norm.", trained=True), stored=stored)

    def block(self, *, trained: bool, has_backward: bool, is_first_trained: bool) -> LayerMemory:
        """One block. Into the first one that trains come states in the compute dtype."""
        weights = self._kept(self._of_a_block[0], trained=trained)
        if not has_backward:
            return weights
        stored = trained_bytes(self._config.optimizer) if trained else self._compute
        kept = kept_activations(
            self._config.activation_checkpointing,
            everything=activations.umt5_block_saved(
                self._sizes, self._batch, self._compute, stored, trained=trained
            ),
            selected=activations.umt5_block_selected(self._sizes, self._batch, self._compute, stored),
            own_input=self._batch.text_tokens
            * self._sizes.d_model
            * (self._compute if is_first_trained else stored),
            shared=0.0,
        )
        return replace(weights, **_activations_of(kept) | {"working": self._working if trained else 0.0})

    @cached_property
    def _of_a_block(self) -> tuple[int, int]:
        """Weights of one block, and of its largest tensor; `text_encoder_sizes` has seen that all blocks are alike."""
        sizes = [math.prod(shape) for name, shape in self._shapes.items() if name.startswith("blocks.0.")]
        return sum(sizes), max(sizes)

    @property
    def _working(self) -> float:
        """The gradient of the largest weight before it is added, where autocast cast that weight in both precisions."""
        own = trained_bytes(self._config.optimizer)
        return float(self._of_a_block[1] * (own + (self._compute if own != self._compute else 0)))

    def _weights(self, prefix: str, *, trained: bool) -> LayerMemory:
        return self._kept(num_weights(self._shapes, prefix), trained=trained)

    def _kept(self, number: int, *, trained: bool) -> LayerMemory:
        if not trained:
            return LayerMemory(weights=float(number * self._compute))
        return _trained(number, self._config)


def _trained(number: float, config: TrainConfig) -> LayerMemory:
    """Trained weights, their gradients (of the same size) and the optimizer's state."""
    own = float(trained_bytes(config.optimizer))
    state = number * state_bytes_per_weight(config.optimizer)
    return LayerMemory(weights=number * own, gradients=number * own, state=state)


def _activations_of(memory: LayerMemory) -> dict[str, float]:
    names = ("stored", "rebuilt", "working", "shared", "host_stored")
    return {name: getattr(memory, name) for name in names}
