"""Running a layer so that its backward pass computes what it needs again: the ways of `activation_checkpointing`.

true        keep the layer's inputs, recompute everything else
"selective" keep the outputs of attention and of matrix products too, so that only cheap operations run again
"offload"   as true, but the first input, which is this layer's own, waits in host memory

The same operations run in the same order in all of them, so the numbers are those of a run without any.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from utils.config.schema import ActivationCheckpointing

_aten = torch.ops.aten
# Each by name: which attention runs depends on device, dtype and mask.
_KEPT = frozenset(
    operation.default
    for operation in (
        _aten.mm,
        _aten.addmm,
        _aten.bmm,
        _aten.baddbmm,
        _aten._scaled_mm,
        _aten._scaled_dot_product_flash_attention,
        _aten._scaled_dot_product_flash_attention_for_cpu,
        _aten._scaled_dot_product_efficient_attention,
        _aten._scaled_dot_product_cudnn_attention,
        _aten._scaled_dot_product_fused_attention_overrideable,
    )
)


# Attention of the packages flash-attn 2 and 3, whose operations are there only where they are installed.
_KEPT_NAMESPACES = ("flash_attn", "flash_attn_3")


def is_wanted(wire: tuple[Tensor, ...], module: nn.Module) -> bool:
    """Whether a backward pass through this module will come, so that something would be stored."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor.requires_grad for tensor in wire) or any(p.requires_grad for p in module.parameters())


def run_again_later(mode: ActivationCheckpointing, run: Callable[..., Any], wire: tuple[Tensor, ...]) -> Any:
    """`run(*wire)`, keeping for the backward pass only what `mode` (not False) keeps."""
    # Layers that draw random numbers seed their draw themselves, so there is no state to put back.
    again = partial(checkpoint, run, *wire, use_reentrant=False, preserve_rng_state=False)
    if mode == "selective":
        return again(context_fn=partial(create_selective_checkpoint_contexts, _policy))
    if mode == "offload":
        # The hooks are those in force while the checkpoint saves its inputs; inside it, it has its own.
        with parked(wire[0]):
            return again()
    return again()


def parked(tensor: Tensor) -> AbstractContextManager[None]:
    """For the body: where autograd saves this tensor, it waits in host memory until the backward pass wants it."""
    # By its place and not by itself: what is saved keeps the hooks, and they would keep the tensor on the device.
    own = (tensor.data_ptr(), tensor.shape)
    return torch.autograd.graph.saved_tensors_hooks(partial(_pack, own), _unpack)


def _policy(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    is_kept = operation in _KEPT or operation.namespace in _KEPT_NAMESPACES
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


class _Parked:
    """A tensor in host memory, and its way back. On a CPU the same with ordinary memory and no streams."""

    def __init__(self, tensor: Tensor) -> None:
        self._device = tensor.device
        self._back: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._is_taken = False
        # Weakly, or each tensor would keep all that were ever parked before it.
        self._before = _newest
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._device.type == "cuda")
        if self._device.type != "cuda":
            self._host.copy_(tensor)
            return
        stream = _copy_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
        # Its memory may be used anew only after the copy.
        tensor.record_stream(stream)

    def fetch(self) -> None:
        """Begin the way back; the copy stream keeps it behind the way out."""
        if self._is_taken or self._back is not None:
            return
        if self._device.type != "cuda":
            self._back = self._host.clone()
            return
        stream = _copy_stream(self._device)
        with torch.cuda.stream(stream):
            self._back = self._host.to(self._device, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(stream)

    def take(self) -> Tensor:
        """The tensor on its device again. The one that was parked before it, which is wanted next, begins its way back."""
        self._is_taken = False
        self.fetch()
        tensor, self._back, self._is_taken = self._back, None, True
        assert tensor is not None
        if self._arrived is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._arrived)
            tensor.record_stream(stream)
        before = None if self._before is None else self._before()
        if before is not None:
            before.fetch()
        return tensor


_newest: "weakref.ref[_Parked] | None" = None
_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def _pack(own: tuple[int, torch.Size], tensor: Tensor) -> "Tensor | _Parked":
    """Park the layer's own input, given by address and shape; what else the wire carries is shared with other layers."""
    global _newest
    if (tensor.data_ptr(), tensor.shape) != own:
        return tensor
    parked = _Parked(tensor)
    _newest = weakref.ref(parked)
    return parked


def _unpack(kept: "Tensor | _Parked") -> Tensor:
    return kept.take() if isinstance(kept, _Parked) else kept
