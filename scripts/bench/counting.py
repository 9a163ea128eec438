"""What a computation does on any device, counted and not timed: kernels, bytes that they move, bytes that autograd keeps.

The rule of the count. A kernel is an operation that reaches torch's dispatcher, without views and without allocations. It reads
every distinct tensor that it is given and writes every tensor that it returns; an operand that is repeated by broadcasting is
read once, as it lies in memory; what `copy_`, filling and `out=` overwrite is not read. Weights (and their biases) count nothing:
activations only. What a kernel keeps on chip, as fused attention does with its scores, is not seen and not counted.

On fake tensors: shapes are real, there is no memory behind them, and nothing is computed, so that the real size can be counted
on a laptop. They stand on a CPU, which runs `rms_norm` as 6 and about 11 kernels, where CUDA has one for each direction;
`fused_rms_norm` counts it so. No GPU was used to check the count.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OWN = "wan_bench"
# Views that are not marked as such, and what only makes room.
_NO_KERNEL = frozenset(
    (
        "detach",
        "_unsafe_view",
        "alias",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
    )
)
_OVERWRITES = frozenset(
    ("copy_", "zero_", "fill_", "zeros_like", "ones_like", "zeros", "ones", "full", "full_like")
)


@dataclass(frozen=True)
class Kernel:
    """One operation and the bytes that it moves."""

    name: str
    read: int
    written: int


class KernelCount(TorchDispatchMode):
    """Records the kernels that run inside it.

    Args:
        weights: tensors that count nothing.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._weights = {_storage(tensor) for tensor in weights}
        self.kernels: list[Kernel] = []

    @property
    def bytes(self) -> int:
        """Read and written."""
        return sum(kernel.read + kernel.written for kernel in self.kernels)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if func.namespace in ("aten", _OWN) and not func.is_view and name not in _NO_KERNEL:
            named = kwargs or {}
            outs = {one.name for one in func._schema.arguments if one.is_out}
            given = _tensors((args, {key: value for key, value in named.items() if key not in outs}))
            read = given[1:] if name == "copy_" else [] if name in _OVERWRITES else given
            written = _tensors(result)
            shared = {_storage(tensor) for tensor in given}
            # An operation that gives back what it was given (such as `contiguous` of what is) does nothing.
            in_place = name.endswith("_") or bool(outs)
            if in_place or any(_storage(tensor) not in shared for tensor in written):
                self.kernels.append(Kernel(name, self._moved(read), self._moved(written)))
        return result

    def _moved(self, tensors: Iterable[Tensor]) -> int:
        distinct = {id(tensor): tensor for tensor in tensors if _storage(tensor) not in self._weights}
        return sum(
            min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
            for tensor in distinct.values()
        )


def saved_bytes(work: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Bytes of all storages that autograd keeps of a forward pass, without those of the weights."""
    known = {_storage(tensor) for tensor in weights}
    # The tensors too, or a storage's address could come again.
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            kept[_storage(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return total


def weights_of(module: nn.Module) -> list[Tensor]:
    """Parameters of a module."""
    return list(module.parameters())


@contextmanager
def fused_rms_norm() -> Iterator[None]:
    """Run `rms_norm` as one kernel in each direction, for the body: what CUDA's own does, with the same operands."""
    with _RmsNormMode():
        yield


class _RmsNormMode(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (F.rms_norm, torch.rms_norm):
            return func(*args, **(kwargs or {}))
        return _one_rms_norm(*args, **(kwargs or {}))


def _one_rms_norm(
    input: Tensor, normalized_shape: Iterable[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    assert len(list(normalized_shape)) == 1 and weight is not None, "as Wan's norms are"
    result: Tensor = _RmsNorm.apply(input, weight, torch.finfo(torch.float32).eps if eps is None else eps)
    return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _rms_forward(states, weight, eps)
        ctx.save_for_backward(states, weight, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _rms_backward(gradients[0], *ctx.saved_tensors), None, None


@torch.library.custom_op(f"{_OWN}::rms_norm", mutates_args=())
def _rms_forward(states: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normed states in their dtype, and the float32 scale of each row."""
    wide = states.float()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight.float()).to(states.dtype), scale


@_rms_forward.register_fake
def _(states: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(states), states.new_empty((*states.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op(f"{_OWN}::rms_norm_backward", mutates_args=())
def _rms_backward(gradient: Tensor, states: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The gradient of the states; the weight is frozen."""
    normed, pulled = states.float() * scale, gradient.float() * weight.float()
    return (scale * (pulled - normed * (pulled * normed).mean(-1, keepdim=True))).to(states.dtype)


@_rms_backward.register_fake
def _(gradient: Tensor, states: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(states)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
