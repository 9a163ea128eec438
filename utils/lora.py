"""LoRA adapters: putting them in, starting from a file, and writing one. The only importer of peft."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.config.schema import AdapterConfig
from utils.errors import UserError
from utils.files import atomic_write_text
from utils.lean_lora import add_low_rank
from utils.lora_names import AdapterFile, adapter_key, kohya_aliases, read_adapter
from utils.rng import generator

_ADAPTER_NAME = "default"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def add_lora(
    block: nn.Module,
    block_index: int,
    paths: Sequence[str],
    adapter: AdapterConfig,
    dtype: torch.dtype,
    seed: int,
    lean: bool = False,
) -> None:
    """Put adapters on the linear layers `paths` of one block, in place, and freeze everything else in it.

    B starts at zero, so the block computes what it did before. A is drawn by the module's name, so it does not depend
    on which stage builds the block.

    Args:
        block: holds the layers.
        block_index: its number in the model.
        paths: of the layers in the block.
        adapter: rank, scale and dropout.
        dtype: of A and B.
        seed: of the run.
        lean: compute in the dtype of the layer's input by `lean_lora.py`, or else as PEFT does, in that of A and B.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=scale_of(adapter) * adapter.rank,
        lora_dropout=adapter.dropout,
        target_modules=list(paths),
    )
    inject_adapter_in_model(config, block, adapter_name=_ADAPTER_NAME)
    for path in paths:
        module = block.get_submodule(path)
        if lean:
            module.__class__ = _lean_linear()
        down = module.get_submodule(f"lora_A.{_ADAPTER_NAME}")
        up = module.get_submodule(f"lora_B.{_ADAPTER_NAME}")
        random = generator(seed, "lora_A", f"blocks.{block_index}.{path}")
        with torch.no_grad():
            initial = torch.empty(down.get_parameter("weight").shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(initial, a=math.sqrt(5), generator=random)
            down.weight = nn.Parameter(initial.to(dtype))
            up.weight = nn.Parameter(torch.zeros(up.get_parameter("weight").shape, dtype=dtype))


@cache
def _lean_linear() -> type[nn.Module]:
    """PEFT's adapted linear layer with another forward: everything that it keeps, names and switches stays PEFT's.

    One class for all layers, because a compiler shares code between modules of one class alone.
    """
    from peft.tuners.lora import Linear

    class LeanLinear(Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self.disable_adapters or self.merged:
                return super().forward(x)
            return add_low_rank(
                self.base_layer(x),
                self.lora_dropout[_ADAPTER_NAME](x),
                self.lora_A[_ADAPTER_NAME].weight,
                self.lora_B[_ADAPTER_NAME].weight,
                self.scaling[_ADAPTER_NAME],
            )

    return LeanLinear


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Let everything inside `module` compute what it does without its adapters, for the body."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)  # which also makes the adapters want gradients again


def scale_of(adapter: AdapterConfig) -> float:
    """alpha / rank; 1 where alpha is not given."""
    return 1.0 if adapter.alpha is None else adapter.alpha / adapter.rank


def parameter_names(module: str) -> tuple[str, str]:
    """Names of A and B of one adapted module among the model's parameters."""
    return f"{module}.lora_A.{_ADAPTER_NAME}.weight", f"{module}.lora_B.{_ADAPTER_NAME}.weight"


def load_initial_adapter(
    path: Path, targets: Sequence[str], adapter: AdapterConfig, named_by: str = "adapter.init_from_existing ="
) -> dict[str, Tensor]:
    """Read an adapter to start from: {parameter name: tensor}, its scale folded into B for this run's scale.

    Messages say `named_by` before the path.

    Raises:
        UserError: other targets or another rank than this run's.
    """
    existing: AdapterFile = read_adapter(path, kohya_aliases(targets))
    missing = [name for name in targets if name not in existing.modules]
    extra = [name for name in existing.modules if name not in set(targets)]
    if missing or extra:
        raise UserError(
            f"{named_by} {str(path)!r}: its targets are not this run's "
            f"(missing there: {missing[:3]}, only there: {extra[:3]}); use the same include and train_blocks_range"
        )
    parameters = {}
    for name in targets:
        pair = existing.modules[name]
        if pair.down.shape[0] != adapter.rank:
            raise UserError(
                f"{named_by} {str(path)!r}: {name} has rank {pair.down.shape[0]}, adapter.rank is "
                f"{adapter.rank}"
            )
        down_name, up_name = parameter_names(name)
        parameters[down_name] = pair.down.float()
        parameters[up_name] = pair.up.float() * (pair.scale / scale_of(adapter))
    return parameters


def save_adapter(
    trained: Mapping[str, Tensor],
    targets: Sequence[str],
    adapter: AdapterConfig,
    directory: Path,
    metadata: Mapping[str, str],
) -> list[Path]:
    """Write `adapter_model.safetensors` and `adapter_config.json` into `directory`.

    Keys are `diffusion_model.<module>.lora_A.weight` and `lora_B`. The scale is folded into B and alpha set to the
    rank, because loaders disagree on what a missing or different alpha means; at scale 1 they all agree.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    tensors = {}
    for module in targets:
        down_name, up_name = parameter_names(module)
        tensors[adapter_key(module, "A")] = trained[down_name].contiguous()
        tensors[adapter_key(module, "B")] = (trained[up_name] * scale_of(adapter)).contiguous()
    weights = directory / ADAPTER_WEIGHTS
    save_file(tensors, weights, metadata=dict(metadata))
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.rank, target_modules=list(targets)).to_dict()
    config["inference_mode"] = True
    description = directory / ADAPTER_CONFIG
    atomic_write_text(description, json.dumps(config, indent=2, sort_keys=True, default=_plain) + "\n")
    return [weights, description]


def _plain(value: object) -> object:
    """JSON form of the sets and enumerations in a PEFT config."""
    return sorted(value) if isinstance(value, set) else str(value)
