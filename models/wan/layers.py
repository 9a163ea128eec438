"""Building Wan's pipeline layers: which there are, what they cost, and loading each from the checkpoint's files."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.wan.arch import WanArch
from models.wan.checkpoint import TensorSource, text_encoder_sizes
from models.wan.kernels import attend_of
from models.wan.layer_memory import Workload
from models.wan.layer_plan import (
    TEXT_PREFIX,
    first_trained_block,
    plan_dit_layers,
    plan_text_layers,
    swapped_blocks,
)
from models.wan.names import umt5_to_official
from models.wan.paired_layers import PairedBlockLayer, PairedHeadLayer, PairedInputLayer, pair_of
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
from utils.block_swap import BlockSwap
from utils.config.schema import TrainConfig
from utils.frozen_linear import FrozenLinear, move_out, quantise, replace_frozen_linears
from utils.layers import LayerSpec, PipelineLayer
from utils.lora import add_lora, parameter_names
from utils.lora_targets import split_block_path
from utils.optim import trainable_dtype
from utils.planned_layer import PlannedLayer

Build = Callable[[torch.device], PipelineLayer]


def text_layers(config: TrainConfig, source: TensorSource, workload: Workload) -> list[LayerSpec]:
    """UMT5's layers for encoder_ft: token table, blocks, final norm; trained from the first trained block up.

    Trained weights are stored in the optimizer's precision (float32 but for Kahan), frozen ones in `model.dtype`.
    """
    builder = _TextBuilder(config, source)
    facts = plan_text_layers(config, source.shapes, workload)
    blocks = [partial(builder.block, index) for index in range(len(facts) - 2)]
    return _buildable(facts, [builder.tokens, *blocks, builder.norm])


def dit_layers(
    config: TrainConfig,
    source: TensorSource,
    arch: WanArch,
    targets: Sequence[str],
    initial: Mapping[str, Tensor],
    workload: Workload,
    second: TensorSource | None = None,
) -> list[LayerSpec]:
    """The DiT's layers: input, blocks, head; frozen, with adapters on `targets` (none in encoder_ft).

    Args:
        config: the run.
        source: the DiT's weights under official names.
        arch: its sizes.
        targets: adapted modules, e.g. `blocks.3.cross_attn.k`.
        initial: adapter values to start from instead of zero, by parameter name; may be empty.
        workload: the mean sample.
        second: weights of the low-noise expert where `source` has those of the high-noise one and both take part.
    """
    builder = _DitBuilder(config, source, arch, targets, initial)
    facts = plan_dit_layers(config, source.shapes, arch, targets, workload)
    if second is not None:
        return _buildable(facts, _paired(builder, _DitBuilder(config, second, arch, targets, initial)))
    blocks = [partial(builder.block, index) for index in range(arch.num_layers)]
    return _buildable(facts, [builder.input, *blocks, builder.head])


def _paired(high: "_DitBuilder", low: "_DitBuilder") -> list[Build]:
    """Every layer with the modules of both experts."""
    boundary = high.arch.variant.boundary
    assert boundary is not None, "only a variant with experts has two"

    def block(index: int, device: torch.device) -> PipelineLayer:
        pair = pair_of(high.block(index, device), low.block(index, device))
        return PairedBlockLayer(pair, high.recompute, high.is_compiled(index))

    return [
        lambda device: PairedInputLayer(pair_of(high.input(device), low.input(device)), boundary),
        *(partial(block, index) for index in range(high.arch.num_layers)),
        lambda device: PairedHeadLayer(pair_of(high.head(device), low.head(device))),
    ]


def _buildable(facts: Sequence[PlannedLayer], builds: Sequence[Build]) -> list[LayerSpec]:
    return [LayerSpec.of(one, build) for one, build in zip(facts, builds, strict=True)]


class _TextBuilder:
    """Builds UMT5 layers with their weights."""

    def __init__(self, config: TrainConfig, source: TensorSource) -> None:
        self._source = source
        self._sizes = text_encoder_sizes(source.shapes)
        self._model = config.model
        self._recompute = config.activation_checkpointing
        self._compute_dtype: torch.dtype = getattr(torch, config.model.dtype)
        self._trained_dtype = trainable_dtype(config.optimizer)
        self.first_trained = first_trained_block(config, self._sizes.num_layers)

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
        self._source.release()
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
        self.arch = arch
        self.recompute = config.activation_checkpointing
        self.targets = [split_block_path(target) for target in targets]
        self.swapped = swapped_blocks(config, arch)
        self._swap: BlockSwap | None = None
        self._in_8_bits = config.model.transformer_dtype == "float8"
        self._computes_in_8_bits = config.model.transformer_compute == "float8"
        self._initial = initial
        self._compute_dtype: torch.dtype = getattr(torch, config.model.dtype)
        self._residual_dtype: torch.dtype = getattr(torch, config.model.residual_dtype)

    def input(self, device: torch.device) -> PipelineLayer:
        """Patch, time and text embedding."""
        with torch.device("meta"):
            module = WanEmbedding(self.arch, self._compute_dtype, self._residual_dtype)
        self._load(module, "", device)
        return DitInputLayer(module)

    def block(self, index: int, device: torch.device) -> PipelineLayer:
        """One block, with its adapters."""
        with torch.device("meta"):
            block = WanBlock(self.arch, self._compute_dtype, self._config.model.lean_kernels)
        self._load(block, f"blocks.{index}.", device)
        block.self_attn.attend = block.cross_attn.attend = attend_of(self._config, device)
        adapter = self._config.adapter
        paths = [path for number, path in self.targets if number == index]
        dropout = 0.0
        if adapter is not None and paths:
            dtype = trainable_dtype(self._config.optimizer)
            add_lora(block, index, paths, adapter, dtype, self._config.seed, self._config.model.lean_kernels)
            block.to(device)
            self._start_from_initial(block, index, paths)
            dropout = adapter.dropout
        self._store_frozen(block, index, device)
        return DitBlockLayer(block, f"blocks.{index}", self.recompute, dropout, self.is_compiled(index))

    def is_compiled(self, index: int) -> bool:
        """Whether a block is; one whose weights come and go is not, because no compiler can follow them."""
        return self._config.compile and index not in self.swapped

    def head(self, device: torch.device) -> PipelineLayer:
        """Norm, modulation and projection to velocity."""
        with torch.device("meta"):
            head = WanHead(self.arch)
        self._load(head, "head.", device)
        return DitHeadLayer(head)

    def _store_frozen(self, block: nn.Module, index: int, device: torch.device) -> None:
        """Put frozen weights into 8 bits, or into host memory, or both, as configured. Adapters stay as they are."""
        is_swapped = index in self.swapped
        if not self._in_8_bits and not is_swapped:
            return

        def store(path: str, linear: nn.Linear) -> FrozenLinear:
            weight, scale = linear.weight.detach(), None
            if self._in_8_bits:
                weight, scale = self._read_in_8_bits(f"blocks.{index}.{path}.weight", device)
            return FrozenLinear(weight, scale, linear.bias, self._compute_dtype, self._computes_in_8_bits)

        replace_frozen_linears(block, store)
        if is_swapped:
            if self._swap is None:
                self._swap = BlockSwap(device)
            move_out(block, self._swap)

    def _read_in_8_bits(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Values and scales of a weight: those of the file where it has them, so that nothing is rounded twice."""
        stored = self._source.stored_in_8_bits(name)
        if stored is None:
            values, scale = quantise(self._source.get(name).to(device))
        else:
            values, scale = (tensor.to(device) for tensor in stored)
        self._source.release()
        return values, scale.expand(values.shape[0], 1).contiguous()

    def _start_from_initial(self, block: nn.Module, index: int, paths: Sequence[str]) -> None:
        for path in paths:
            for name in parameter_names(path):
                initial = self._initial.get(f"blocks.{index}.{name}")
                if initial is not None:
                    with torch.no_grad():
                        block.get_parameter(name).copy_(initial)

    def _load(self, module: nn.Module, prefix: str, device: torch.device) -> None:
        state = {}
        for name, parameter in module.named_parameters():
            if self._in_8_bits and isinstance(module, WanBlock) and parameter.dim() == 2:
                # Of the right shape, and nothing behind it: `_store_frozen` reads this weight by itself.
                state[name] = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
            else:
                state[name] = _owned(self._source.get(prefix + name), device, parameter.dtype)
        self._source.release()
        module.load_state_dict(state, strict=True, assign=True)
        module.requires_grad_(False)


def _owned(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of a file's tensor in memory of its own: the file may change, and mapped memory is not aligned alike."""
    return tensor.to(device=device, dtype=dtype, copy=True)
