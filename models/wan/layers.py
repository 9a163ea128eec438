"""Building Wan's pipeline layers: which there are, what they cost, and loading each from the checkpoint's files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.wan import costs
from models.wan.arch import WanArch
from models.wan.checkpoint import TensorSource, text_encoder_sizes
from models.wan.names import umt5_to_official
from models.wan.stages import (
    DitBlockLayer,
    DitHeadLayer,
    DitInputLayer,
    TextBlockLayer,
    TextNormLayer,
    TokenLayer,
)
from models.wan.text_encoder import build_umt5_block, build_umt5_norm, umt5_config
from models.wan.transformer import WanBlock, WanEmbedding, WanHead
from utils.config.schema import TrainConfig
from utils.layers import LayerSpec, PipelineLayer
from utils.lora import add_lora, parameter_names
from utils.lora_targets import split_block_path
from utils.optim import bytes_per_trained_weight, state_bytes_per_weight, trainable_dtype

Build = Callable[[torch.device], PipelineLayer]
TEXT_PREFIX = "text_encoder."
# The DiT's parts before its blocks, kept in float32 but for the text embedding.
_AROUND_BLOCKS = ("patch_embedding.", "text_embedding.", "time_embedding.", "time_projection.")
_TOKENS = f"{TEXT_PREFIX}shared"
_TEXT_NORM = f"{TEXT_PREFIX}encoder.final_layer_norm"


@dataclass(frozen=True)
class Workload:
    """The mean sample, by which layers are weighed: video and text tokens."""

    video_tokens: float
    text_tokens: float


def text_layers(config: TrainConfig, source: TensorSource, workload: Workload) -> list[LayerSpec]:
    """UMT5's layers for encoder_ft: token table, blocks, final norm; trained from the first trained block up.

    Trained weights are stored in the optimizer's precision (float32 but for Kahan), frozen ones in `model.dtype`.
    """
    builder = _TextBuilder(config, source)
    model, sizes = config.model, text_encoder_sizes(source.shapes)
    table_trained = model.train_token_embedding
    flops = costs.umt5_block_flops(sizes, workload.text_tokens)

    def spec(name: str, build: Build, trained: bool, official: str, **values: Any) -> LayerSpec:
        each = bytes_per_trained_weight(config.optimizer) if trained else builder.frozen_bytes
        num_weights = costs.num_weights(source.shapes, official)
        return LayerSpec(
            name,
            build,
            trainable=trained,
            trains_weights=trained,
            resident_bytes=each * num_weights,
            state_bytes=state_bytes_per_weight(config.optimizer) * num_weights if trained else 0.0,
            **values,
        )

    specs = [spec(_TOKENS, builder.tokens, table_trained, "token_embedding.", forward_flops=0.0)]
    for index in range(sizes.num_layers):
        specs.append(
            spec(
                f"{TEXT_PREFIX}encoder.block.{index}",
                partial(builder.block, index),
                index >= builder.first_trained,
                f"blocks.{index}.",
                forward_flops=flops,
                recompute=config.activation_checkpointing,
            )
        )
    specs.append(spec(_TEXT_NORM, builder.norm, True, "norm.", forward_flops=0.0))
    return specs


def dit_layers(
    config: TrainConfig,
    source: TensorSource,
    arch: WanArch,
    targets: Sequence[str],
    initial: Mapping[str, Tensor],
    workload: Workload,
) -> list[LayerSpec]:
    """The DiT's layers: input, blocks, head; frozen, with adapters on `targets` (none in encoder_ft).

    Args:
        config: the run.
        source: the DiT's weights under official names.
        arch: its sizes.
        targets: adapted modules, e.g. `blocks.3.cross_attn.k`.
        initial: adapter values to start from instead of zero, by parameter name; may be empty.
        workload: the mean sample.
    """
    builder = _DitBuilder(config, source, arch, targets, initial)
    tokens, shapes = workload.video_tokens, source.shapes
    block_flops = costs.dit_block_flops(arch, tokens)
    around = 4.0 * costs.num_weights(shapes, *_AROUND_BLOCKS), 4.0 * costs.num_weights(shapes, "head.")
    specs = [LayerSpec("", builder.input, costs.dit_input_flops(arch, tokens), resident_bytes=around[0])]
    for index in range(arch.num_layers):
        adapted = [target for target in targets if split_block_path(target)[0] == index]
        kept = builder.frozen_bytes * costs.num_weights(shapes, f"blocks.{index}.")
        trained = 0.0
        if config.adapter is not None:
            trained = costs.num_adapter_weights(shapes, adapted, config.adapter.rank)
            kept += trained * bytes_per_trained_weight(config.optimizer)
        specs.append(
            LayerSpec(
                f"blocks.{index}",
                partial(builder.block, index),
                block_flops,
                trainable=bool(adapted),
                recompute=config.activation_checkpointing,
                resident_bytes=kept,
                state_bytes=trained * state_bytes_per_weight(config.optimizer),
            )
        )
    specs.append(
        LayerSpec("head", builder.head, costs.dit_head_flops(arch, tokens), resident_bytes=around[1])
    )
    return specs


class _TextBuilder:
    """Builds UMT5 layers with their weights."""

    def __init__(self, config: TrainConfig, source: TensorSource) -> None:
        self._source = source
        self._sizes = text_encoder_sizes(source.shapes)
        self._model = config.model
        self._recompute = config.activation_checkpointing
        self._compute_dtype: torch.dtype = getattr(torch, config.model.dtype)
        self._trained_dtype = trainable_dtype(config.optimizer)
        self.frozen_bytes = self._compute_dtype.itemsize
        wanted = config.model.text_train_blocks
        self.first_trained = 0 if wanted == 0 else self._sizes.num_layers - wanted

    def tokens(self, device: torch.device) -> PipelineLayer:
        """The token table."""
        with torch.device("meta"):
            table = nn.Embedding(self._sizes.vocab_size, self._sizes.d_model)
        self._load(table, "shared", device, trained=self._model.train_token_embedding)
        return TokenLayer(table)

    def block(self, index: int, device: torch.device) -> PipelineLayer:
        """One block; dropout only where it trains."""
        trained = index >= self.first_trained
        dropout = self._model.text_encoder_dropout if trained else 0.0
        with torch.device("meta"):
            block = build_umt5_block(self._umt5(dropout), index)
        self._load(block, f"encoder.block.{index}", device, trained=trained)
        name = f"{TEXT_PREFIX}encoder.block.{index}"
        return TextBlockLayer(block, name, self._compute_dtype, self._recompute, dropout)

    def norm(self, device: torch.device) -> PipelineLayer:
        """The final norm; it lies above every trained block, so it trains with them."""
        with torch.device("meta"):
            norm = build_umt5_norm(self._umt5(0.0))
        self._load(norm, "encoder.final_layer_norm", device, trained=True)
        return TextNormLayer(norm)

    def _umt5(self, dropout: float) -> Any:
        return umt5_config(self._sizes, self._model.text_attn_implementation, dropout)

    def _load(self, module: nn.Module, prefix: str, device: torch.device, *, trained: bool) -> None:
        dtype = self._trained_dtype if trained else self._compute_dtype
        state = {
            name: _owned(self._source.get(umt5_to_official(f"{prefix}.{name}")), device, dtype)
            for name, _ in module.named_parameters()
        }
        module.load_state_dict(state, strict=True, assign=True)
        module.requires_grad_(trained)


class _DitBuilder:
    """Builds DiT layers with their weights and adapters. Each parameter's dtype is the module's own choice."""

    def __init__(
        self,
        config: TrainConfig,
        source: TensorSource,
        arch: WanArch,
        targets: Sequence[str],
        initial: Mapping[str, Tensor],
    ) -> None:
        self._config = config
        self._source = source
        self._arch = arch
        self._targets = [split_block_path(target) for target in targets]
        self._initial = initial
        self._compute_dtype: torch.dtype = getattr(torch, config.model.dtype)
        self._residual_dtype: torch.dtype = getattr(torch, config.model.residual_dtype)
        self.frozen_bytes = self._compute_dtype.itemsize

    def input(self, device: torch.device) -> PipelineLayer:
        """Patch, time and text embedding."""
        with torch.device("meta"):
            module = WanEmbedding(self._arch, self._compute_dtype, self._residual_dtype)
        self._load(module, "", device)
        return DitInputLayer(module)

    def block(self, index: int, device: torch.device) -> PipelineLayer:
        """One block, with its adapters."""
        with torch.device("meta"):
            block = WanBlock(self._arch, self._compute_dtype)
        self._load(block, f"blocks.{index}.", device)
        adapter = self._config.adapter
        paths = [path for number, path in self._targets if number == index]
        dropout = 0.0
        if adapter is not None and paths:
            dtype = trainable_dtype(self._config.optimizer)
            add_lora(block, index, paths, adapter, dtype, self._config.seed)
            block.to(device)
            self._start_from_initial(block, index, paths)
            dropout = adapter.dropout
        return DitBlockLayer(block, f"blocks.{index}", self._config.activation_checkpointing, dropout)

    def head(self, device: torch.device) -> PipelineLayer:
        """Norm, modulation and projection to velocity."""
        with torch.device("meta"):
            head = WanHead(self._arch)
        self._load(head, "head.", device)
        return DitHeadLayer(head)

    def _start_from_initial(self, block: nn.Module, index: int, paths: Sequence[str]) -> None:
        for path in paths:
            for name in parameter_names(path):
                initial = self._initial.get(f"blocks.{index}.{name}")
                if initial is not None:
                    with torch.no_grad():
                        block.get_parameter(name).copy_(initial)

    def _load(self, module: nn.Module, prefix: str, device: torch.device) -> None:
        state = {
            name: _owned(self._source.get(prefix + name), device, parameter.dtype)
            for name, parameter in module.named_parameters()
        }
        module.load_state_dict(state, strict=True, assign=True)
        module.requires_grad_(False)


def _owned(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of a file's tensor in memory of its own: the file may change, and mapped memory is not aligned alike."""
    return tensor.to(device=device, dtype=dtype, copy=True)
