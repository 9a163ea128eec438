"""Adapters put on layers that are already built, and taken off again: several at once, each with a weight.

Nothing is merged, so a small adapter loses nothing to the rounding of a bfloat16 weight, and the layers without adapters
compute bit for bit what they did.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.lora_names import AdapterPair


@dataclass(frozen=True)
class WeightedAdapter:
    """The adapters of some modules, by official module path, and the factor on what they add."""

    modules: Mapping[str, AdapterPair]
    weight: float = 1.0


class _WithLora(nn.Module):
    """base(x) + sum of factor * up(down(x)); the adapters compute in float32, as in training."""

    def __init__(self, base: nn.Module, pairs: Sequence[tuple[Tensor, Tensor, float]]) -> None:
        super().__init__()
        self.base = base
        self._pairs = pairs

    def forward(self, states: Tensor) -> Tensor:
        result: Tensor = self.base(states)
        added: Tensor | float = 0.0
        for down, up, factor in self._pairs:
            if isinstance(self.base, nn.Conv3d):
                low = F.conv3d(states.float(), down, stride=self.base.stride, padding=self.base.padding)
                high = F.conv3d(low, up.flatten(1)[:, :, None, None, None])
            else:
                high = F.linear(F.linear(states.float(), down.flatten(1)), up.flatten(1))
            added = added + factor * high
        return (result + added).to(result.dtype)


@contextmanager
def adapters_added(
    layers: Mapping[str, nn.Module], adapters: Sequence[WeightedAdapter], device: torch.device
) -> Iterator[int]:
    """Put adapters on for the body; yields on how many modules.

    Args:
        layers: modules by the prefix of the paths in them: `{"": input, "blocks.0": block, "head": head}`. Modules of other
            layers, which live in another process, are passed over.
        adapters: summed up.
        device: of the layers.
    """
    pairs: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
    for adapter in adapters:
        for module, pair in adapter.modules.items():
            down, up = (tensor.to(device, torch.float32) for tensor in (pair.down, pair.up))
            pairs.setdefault(module, []).append((down, up, adapter.weight * pair.scale))
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for module, own in pairs.items():
            place = _find(layers, module)
            if place is None:
                continue
            parent, name = place
            base = parent.get_submodule(name)
            setattr(parent, name, _WithLora(base, own))
            replaced.append((parent, name, base))
        yield len(replaced)
    finally:
        for parent, name, base in replaced:
            setattr(parent, name, base)


def _find(layers: Mapping[str, nn.Module], module: str) -> tuple[nn.Module, str] | None:
    """The parent of a module and its name there; None where no layer has it. The longest prefix is the module's layer."""
    prefixes = [prefix for prefix in layers if not prefix or module.startswith(f"{prefix}.")]
    if not prefixes:
        return None
    prefix = max(prefixes, key=len)
    path = module.removeprefix(f"{prefix}.") if prefix else module
    parent, _, name = path.rpartition(".")
    try:
        layers[prefix].get_submodule(path)
    except AttributeError:
        return None
    return layers[prefix].get_submodule(parent), name
