"""One frozen DiT block at its real size, counted by the rule of counting.py: nothing is computed, so any machine can."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models.wan.arch import WanArch
from models.wan.rope import rope_table
from models.wan.transformer import WanBlock
from scripts.bench.counting import KernelCount, fused_rms_norm, saved_bytes, weights_of
from scripts.bench.dit_sides import Precision
from utils.config.schema import AdapterConfig
from utils.lora import add_lora

# Of 4,096 tokens, as frames, rows and columns.
GRID = (4, 32, 32)
TOKENS = GRID[0] * GRID[1] * GRID[2]
GPU, CPU = RMS = ("as on a GPU", "as on a CPU")
# `model.lean_kernels` on, and off; and the peer.
OURS, PLAIN, PEER = "ours", "ours_plain", "diffusers"
# Who computes the adapters of our block.
LEAN_ADAPTERS, PEFT_ADAPTERS = "lean_lora", "peft"
ADAPTER_RANK = 16


@dataclass(frozen=True)
class Counted:
    """What one block costs. Traffic in units of one [L, D] bfloat16 tensor, forward and backward."""

    side: str
    precision: str
    rms: str
    kernels: tuple[int, int]
    units: tuple[float, float]
    saved_kib: float

    @property
    def traffic(self) -> float:
        """Both passes together."""
        return sum(self.units)

    def shown(self) -> dict[str, Any]:
        """A row of the table."""
        return {
            "side": self.side,
            "precision": self.precision,
            "rms_norm": self.rms,
            "kernels_forward": self.kernels[0],
            "kernels_backward": self.kernels[1],
            "traffic_forward": round(self.units[0], 1),
            "traffic_backward": round(self.units[1], 1),
            "traffic": round(self.traffic, 1),
            "saved_kib_per_token": round(self.saved_kib, 1),
        }


def count_block(
    side: str, arch: WanArch, precision: Precision, rms: str, grid: tuple[int, int, int] = GRID
) -> Counted:
    """Count one frozen block whose input wants a gradient.

    Args:
        side: `OURS`, `PLAIN`, or `PEER`, whose residual stream has the dtype of its products.
        arch: sizes; one sample with `text_len` rows of text and one timestep.
        precision: of the block.
        rms: one of `RMS`: `rms_norm` as one kernel, or as the several that a CPU runs.
        grid: tokens.
    """
    builders: dict[str, Callable[..., Built]] = {
        OURS: partial(_ours, lean=True),
        PLAIN: partial(_ours, lean=False),
        PEER: _diffusers,
    }
    return _count(side, partial(builders[side], arch, precision, grid), arch, precision, rms, grid)


def count_adapters(
    paths: Sequence[str],
    arch: WanArch,
    precision: Precision,
    grid: tuple[int, int, int] = GRID,
    *,
    lean: bool,
) -> Counted:
    """Count our lean block with adapters, their gradients too; `rms_norm` of which it has none is as on a GPU.

    Args:
        paths: adapted layers; none is the frozen block.
        arch: as of `count_block`.
        precision: of the block; adapters are float32.
        grid: tokens.
        lean: adapters by `utils.lean_lora`, or as PEFT computes them.
    """
    # Before tensors are fake: PEFT moves its layers in a way that fake ones do not know.
    with torch.device("meta"):
        block = WanBlock(arch, precision.compute).requires_grad_(False)
    if paths:
        add_lora(block, 0, paths, AdapterConfig(rank=ADAPTER_RANK), torch.float32, 0, lean)

    def build() -> Built:
        for module in block.modules():
            for name, one in module.named_parameters(recurse=False):
                fake = torch.empty(one.shape, dtype=one.dtype)
                setattr(module, name, nn.Parameter(fake, one.requires_grad))
        return block, _step_of(block, arch, precision, grid)

    side = "frozen" if not paths else LEAN_ADAPTERS if lean else PEFT_ADAPTERS
    return _count(side, build, arch, precision, GPU, grid)


def _count(
    side: str,
    build: Callable[[], "Built"],
    arch: WanArch,
    precision: Precision,
    rms: str,
    grid: tuple[int, int, int],
) -> Counted:
    tokens = grid[0] * grid[1] * grid[2]
    # The table of the grid is kept between calls: a fake one must not outlive this, nor a real one come in.
    rope_table.cache_clear()
    try:
        with FakeTensorMode(), fused_rms_norm() if rms == GPU else nullcontext():
            block, run = build()
            weights = weights_of(block)
            saved = saved_bytes(run, weights)
            with KernelCount(weights) as forward:
                output = run()
            gradient = torch.empty_like(output)
            with KernelCount(weights) as backward:
                output.backward(gradient)
    finally:
        rope_table.cache_clear()
    unit = tokens * arch.dim * torch.bfloat16.itemsize
    return Counted(
        side,
        precision.name,
        rms,
        (len(forward.kernels), len(backward.kernels)),
        (forward.bytes / unit, backward.bytes / unit),
        saved / tokens / 1024,
    )


Built = tuple[nn.Module, Callable[[], Tensor]]


def _ours(arch: WanArch, precision: Precision, grid: tuple[int, int, int], *, lean: bool) -> Built:
    block = WanBlock(arch, precision.compute, lean).requires_grad_(False)
    return block, _step_of(block, arch, precision, grid)


def _step_of(
    block: WanBlock, arch: WanArch, precision: Precision, grid: tuple[int, int, int]
) -> Callable[[], Tensor]:
    """The forward pass of one sample whose hidden state wants a gradient."""
    hidden = torch.empty(1, *grid, arch.dim, dtype=precision.residual, requires_grad=True)
    modulation = torch.empty(1, 1, 6, arch.dim)
    text = torch.empty(1, arch.text_len, arch.dim, dtype=precision.compute)
    block.rope(hidden)  # made once for a grid, not once for a block
    return lambda: block(hidden, modulation, text)


def _diffusers(arch: WanArch, precision: Precision, grid: tuple[int, int, int]) -> Built:
    from scripts.bench.peers import build_peer_block

    block = build_peer_block(arch, precision.compute)
    tokens = grid[0] * grid[1] * grid[2]
    hidden = torch.empty(1, tokens, arch.dim, dtype=precision.compute, requires_grad=True)
    modulation = torch.empty(1, 6, arch.dim, dtype=precision.compute)
    text = torch.empty(1, arch.text_len, arch.dim, dtype=precision.compute)
    table = (torch.empty(1, tokens, 1, arch.head_dim), torch.empty(1, tokens, 1, arch.head_dim))
    return block, lambda: block(hidden, text, modulation, table)
