"""Ours and diffusers' DiT with the same weights, adapters and input, ready to be stepped in turns.

A block gets a hidden state that wants a gradient, as in training from the second block up; a whole model gets latents, which
want none. Both carry LoRA on their cross-attention's keys and values, with B away from zero.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.wan.arch import WanArch, expected_shapes
from models.wan.compiled import compiled_block
from models.wan.transformer import WanTransformer
from scripts.bench.peers import build_peer_dit
from scripts.bench.random_weights import RandomSource
from utils.bench import check_agreement
from utils.config.schema import AdapterConfig
from utils.frozen_linear import FrozenLinear, quantise, replace_frozen_linears
from utils.lora import add_lora, parameter_names

RANK = 16
# e4m3 has 3 bits after the point: 0.03 of each product on either side (docs/numerics.md), and a model of several blocks more.
FLOAT8_TOLERANCE = 0.2
_OURS, _THEIRS = ("cross_attn.k", "cross_attn.v"), ("attn2.to_k", "attn2.to_v")
_TEXT_TOKENS = 40
_UP_STD = 0.02


@dataclass(frozen=True)
class Precision:
    """Dtypes of products and of the residual stream, and how far two sides may lie apart in them."""

    name: str
    compute: torch.dtype
    residual: torch.dtype
    tolerance: float


@dataclass(frozen=True)
class Case:
    """What is compared: `block` or `model`, its sizes, precision, grid of tokens, device.

    `compile`: both sides by blocks. `float8`: our side stores and multiplies its frozen weights in 8 bits.
    `lean`: as `model.lean_kernels`, our side's adapters too.
    """

    subject: str
    arch: WanArch
    precision: Precision
    grid: tuple[int, int, int]
    device: torch.device
    compile: bool = False
    float8: bool = False
    lean: bool = True

    @property
    def tolerance(self) -> float:
        """Largest relative error between the sides."""
        return FLOAT8_TOLERANCE if self.float8 else self.precision.tolerance

    def __str__(self) -> str:
        tokens = self.grid[0] * self.grid[1] * self.grid[2]
        how = (
            ("" if self.lean else ", plain")
            + (", 8 bits against bfloat16" if self.float8 else "")
            + (", compiled" if self.compile else "")
        )
        return f"{self.subject}, {self.precision.name}, {tokens:,} tokens{how}"


class Side:
    """One of the two: a forward pass, and one with its backward pass.

    Args:
        run: the forward pass.
        direction: the gradient of its output.
        wanted: what gets gradients, in the same order on both sides: adapters, and a block's hidden state.
    """

    def __init__(self, run: Callable[[], Tensor], direction: Tensor, wanted: list[Tensor]) -> None:
        self._run, self._direction, self._wanted = run, direction, wanted

    def forward(self) -> Tensor:
        """The output, without a graph."""
        with torch.no_grad():
            return self._run()

    def both(self) -> tuple[Tensor, list[Tensor]]:
        """Output and gradients."""
        output = self._run()
        gradients = torch.autograd.grad(
            output.flatten(), self._wanted, self._direction.flatten().to(output.dtype)
        )
        return output, list(gradients)


@dataclass(frozen=True)
class Pair:
    """Both sides of a case."""

    case: Case
    ours: Side
    peer: Side

    def check(self) -> list[dict[str, Any]]:
        """Compare outputs and gradients; returns the errors.

        Raises:
            UserError: they disagree.
        """
        tolerance = self.case.tolerance
        (output, gradients), (other, others) = self.ours.both(), self.peer.both()
        error = check_agreement(f"{self.case}: output", output.flatten(), other.flatten(), tolerance)
        # As one vector: the gradient of a single small adapter may be mostly rounding in bfloat16.
        mine, theirs = (torch.cat([one.flatten().float() for one in group]) for group in (gradients, others))
        pulled = check_agreement(f"{self.case}: gradients", mine, theirs, tolerance)
        return [{"what": str(self.case), "output": error, "gradients": pulled, "tolerance": tolerance}]


def build_pair(case: Case) -> Pair:
    """Both sides, frozen but for their adapters."""
    if case.subject == "block":
        case = replace(case, arch=replace(case.arch, num_layers=1))
    source = RandomSource(expected_shapes(case.arch), case.device)
    state = {name: source.get(name) for name in source.shapes}
    ours = build_ours(case.arch, case.precision, state, case.lean)
    peer = build_peer_dit(case.arch, state, case.precision.compute, case.device)
    wanted = adapt(ours.blocks, peer.blocks, case.device, case.lean)
    if case.float8:

        def in_8_bits(_: str, linear: nn.Linear) -> FrozenLinear:
            return FrozenLinear(*quantise(linear.weight), linear.bias, case.precision.compute, True)

        replace_frozen_linears(ours.blocks, in_8_bits)
    if case.compile:
        for mine, theirs in zip(ours.blocks, peer.blocks, strict=True):
            mine.forward = compiled_block(mine)  # type: ignore[arg-type]
            theirs.compile()
    return (
        _block_pair(case, ours, peer, wanted)
        if case.subject == "block"
        else _model_pair(case, ours, peer, wanted)
    )


def build_ours(
    arch: WanArch, precision: Precision, state: Mapping[str, Tensor], lean: bool = True
) -> WanTransformer:
    """Our DiT with these weights, frozen."""
    with torch.device("meta"):
        model = WanTransformer(arch, precision.compute, precision.residual, lean)
    typed = {name: state[name].to(one.dtype, copy=True) for name, one in model.named_parameters()}
    model.load_state_dict(typed, strict=True, assign=True)
    return model.requires_grad_(False)


def adapt(
    ours: nn.ModuleList, peer: nn.ModuleList, device: torch.device, lean: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Put equal adapters on the blocks of both; returns A and B of each, in the same order."""
    adapter = AdapterConfig(rank=RANK)
    wanted: tuple[list[Tensor], list[Tensor]] = ([], [])
    random = torch.Generator(device).manual_seed(1)
    for index, (mine, theirs) in enumerate(zip(ours, peer, strict=True)):
        add_lora(mine, index, _OURS, adapter, torch.float32, 0, lean)
        add_lora(theirs, index, _THEIRS, adapter, torch.float32, 0)
        mine.to(device)
        theirs.to(device)
        for path, other in zip(_OURS, _THEIRS, strict=True):
            down, up = (mine.get_parameter(name) for name in parameter_names(path))
            with torch.no_grad():
                up.normal_(std=_UP_STD, generator=random)
            pair = tuple(theirs.get_parameter(name) for name in parameter_names(other))
            for here, there in zip((down, up), pair, strict=True):
                with torch.no_grad():
                    there.copy_(here)
                wanted[0].append(here)
                wanted[1].append(there)
    return wanted


def _block_pair(
    case: Case, ours: WanTransformer, peer: Any, wanted: tuple[list[Tensor], list[Tensor]]
) -> Pair:
    arch, precision, device = case.arch, case.precision, case.device
    frames, rows, columns = case.grid
    random = torch.Generator(device).manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    # Both get the same numbers: what the peer has in bfloat16 is rounded on our side too.
    hidden = draw(1, frames, rows, columns, arch.dim).to(precision.compute)
    modulation = (draw(1, 6, arch.dim) / arch.dim**0.5).to(precision.compute)
    text = draw(1, arch.text_len, arch.dim).to(precision.compute)
    direction = draw(1, frames * rows * columns, arch.dim)
    mine = hidden.to(precision.residual).requires_grad_()
    theirs = hidden.flatten(1, 3).clone().requires_grad_()
    rotary = peer.rope(torch.empty(1, 1, frames, 2 * rows, 2 * columns, device=device))
    block = ours.blocks[0]
    return Pair(
        case,
        Side(lambda: block(mine, modulation.float().unsqueeze(1), text), direction, [*wanted[0], mine]),
        Side(lambda: peer.blocks[0](theirs, text, modulation, rotary), direction, [*wanted[1], theirs]),
    )


def _model_pair(
    case: Case, ours: WanTransformer, peer: Any, wanted: tuple[list[Tensor], list[Tensor]]
) -> Pair:
    arch, device = case.arch, case.device
    frames, rows, columns = case.grid
    random = torch.Generator(device).manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    latents = draw(1, arch.in_dim, frames, 2 * rows, 2 * columns)
    text = torch.zeros(1, arch.text_len, arch.text_dim, device=device)
    text[:, :_TEXT_TOKENS] = draw(1, _TEXT_TOKENS, arch.text_dim)
    text = text.to(case.precision.compute)
    direction = draw(1, arch.out_dim, frames, 2 * rows, 2 * columns)
    # Exact in bfloat16, which the peer would round others to.
    timestep = torch.tensor([512.0], device=device)
    given = latents.to(case.precision.compute)
    return Pair(
        case,
        Side(lambda: ours(given.float(), timestep.unsqueeze(1), text), direction, wanted[0]),
        Side(lambda: peer(given, timestep, text, return_dict=False)[0], direction, wanted[1]),
    )
