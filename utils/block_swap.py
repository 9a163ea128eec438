"""Blocks whose frozen weights live in host memory and visit the device: two slots, filled ahead of use.

A block's weights lie behind each other in pinned host memory and are copied together, on a stream of their own, while the block before computes. Nothing is copied back, because nothing changes. Which block comes next is
what came next the last time, so that the order of both directions, of several micro-batches, and of evaluation is
found out and not prescribed. A wrong guess costs the time of a copy and nothing else.

On a CPU the same code copies from memory to memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from utils.memory import NUM_SWAP_SLOTS

# More than any kernel asks of its operands.
_ALIGNMENT = 256
# torch rounds pinned memory up to a power of two. In pieces of this size that costs next to nothing.
_PIECE_BYTES = 1 << 26


@dataclass(frozen=True)
class _Access:
    """A block at work, in the forward or (also when it recomputes) in the backward pass."""

    block: int
    in_backward: bool


@dataclass(frozen=True)
class SwappedTensor:
    """One weight of a block that visits."""

    swap: "BlockSwap"
    block: int
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def get(self) -> Tensor:
        """The weight on the device; valid until another block's is asked for."""
        num_bytes = prod(self.shape) * self.dtype.itemsize
        slot = self.swap.slot_with(self.block)
        return slot[self.offset : self.offset + num_bytes].view(self.dtype).view(self.shape)


class _Home:
    """One block's weights in host memory, as bytes behind each other, in pieces."""

    def __init__(self, num_bytes: int, is_pinned: bool) -> None:
        self.num_bytes = num_bytes
        self._pieces = [
            torch.empty(min(_PIECE_BYTES, num_bytes - start), dtype=torch.uint8, pin_memory=is_pinned)
            for start in range(0, num_bytes, _PIECE_BYTES)
        ]

    def write(self, offset: int, values: Tensor) -> None:
        """Put bytes where they belong."""
        done = 0
        while done < values.numel():
            number, start = divmod(offset + done, _PIECE_BYTES)
            count = min(_PIECE_BYTES - start, values.numel() - done)
            self._pieces[number][start : start + count].copy_(values[done : done + count])
            done += count

    def copy_to(self, slot: Tensor) -> None:
        """Copy everything; on a GPU this only queues the copies."""
        for number, piece in enumerate(self._pieces):
            start = number * _PIECE_BYTES
            slot[start : start + piece.numel()].copy_(piece, non_blocking=True)


class BlockSwap:
    """The swapped blocks of one stage.

    Attributes:
        num_copies: blocks copied to the device so far.
        num_late: those of them that a block had to wait for, because another one had been expected.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._homes: list[_Home] = []
        self._slots: list[Tensor] = []
        self._holds: list[int | None] = []
        self._filled: list[torch.cuda.Event | None] = []
        self._stream: torch.cuda.Stream | None = None
        self._current = 0
        self._last: _Access | None = None
        self._next: dict[_Access, _Access] = {}
        self.num_copies = 0
        self.num_late = 0

    def add_block(self, weights: Sequence[Tensor]) -> list[SwappedTensor]:
        """Move one block's weights to host memory. All blocks are added before the first is used."""
        assert not self._slots, "blocks are added before the first one is used"
        offsets, end = [], 0
        for weight in weights:
            offsets.append(end)
            end += -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT
        home = _Home(end, self._device.type == "cuda")
        block = len(self._homes)
        self._homes.append(home)
        for weight, offset in zip(weights, offsets, strict=True):
            home.write(offset, weight.detach().contiguous().view(-1).view(torch.uint8))
        return [
            SwappedTensor(self, block, offset, tuple(weight.shape), weight.dtype)
            for weight, offset in zip(weights, offsets, strict=True)
        ]

    def slot_with(self, block: int) -> Tensor:
        """The slot that holds this block; the block that is expected next begins its way into the other one."""
        # Inside a backward pass there is a graph task. torch's own checkpointing tells by the same call.
        access = _Access(block, torch._C._current_graph_task_id() != -1)
        if access != self._last:
            self._turn_to(access)
        return self._slots[self._current]

    def _turn_to(self, access: _Access) -> None:
        if not self._slots:
            self._make_slots()
        if self._last is not None:
            self._next[self._last] = access
        self._last = access
        if access.block not in self._holds:
            self._current = (self._current + 1) % len(self._slots)
            self._copy(access.block, self._current)
            self.num_late += 1
        else:
            self._current = self._holds.index(access.block)
        filled = self._filled[self._current]
        if filled is not None:
            torch.cuda.current_stream(self._device).wait_event(filled)
        expected = self._expected_after(access)
        if expected is not None and expected not in self._holds:
            self._copy(expected, (self._current + 1) % len(self._slots))

    def _expected_after(self, access: _Access) -> int | None:
        if access in self._next:
            return self._next[access].block
        neighbour = access.block + (-1 if access.in_backward else 1)
        return neighbour if 0 <= neighbour < len(self._homes) else None

    def _make_slots(self) -> None:
        size = max(home.num_bytes for home in self._homes)
        number = min(NUM_SWAP_SLOTS, len(self._homes))
        self._slots = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(number)]
        self._holds = [None] * number
        self._filled = [None] * number

    def _copy(self, block: int, slot: int) -> None:
        home = self._homes[block]
        self._holds[slot] = block
        self.num_copies += 1
        if self._device.type != "cuda":
            home.copy_to(self._slots[slot])
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        # Whatever still reads the slot has been queued before.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            home.copy_to(self._slots[slot])
            event = torch.cuda.Event()
            event.record(self._stream)
        self._filled[slot] = event
