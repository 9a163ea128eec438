"""Attention logits of a DiT before and after a change, from the same inputs; and norms of its keys and values.

Blocks are streamed: of the base one block is in memory at a time, beside it what the change makes of its attention. Both
see the hidden state that the unchanged blocks before have made, so a ratio says what the change does in this block, not
what earlier ones send on. Everything is float32, forward only; queries and keys are made by the model's own modules.

With random inputs only the probed attention of the probed blocks is read.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from models.wan.arch import WanArch
from models.wan.attention import WanAttention
from models.wan.probes.comparison import Comparison
from models.wan.probes.logit_result import AttentionKind, HeadLogits, LogitResult, StateNorms
from models.wan.transformer import WanBlock, WanEmbedding
from utils.errors import UserError
from utils.logit_stats import LogitStats, logit_stats
from utils.lora_names import AdapterFile
from utils.rng import generator
from utils.tensor_source import TensorSource

OnBlock = Callable[[int], None]
# Latent frames, rows and columns of the tokens of random inputs.
SYNTHETIC_GRID = (2, 8, 8)
# What lies between a block's hidden state and the queries of an attention.
_PARTS: dict[AttentionKind, tuple[str, ...]] = {
    "cross_attn": ("norm3.", "cross_attn."),
    "self_attn": ("modulation", "self_attn."),
}


class Change(Protocol):
    """What becomes of a weight."""

    def __call__(self, name: str, base: Tensor) -> Tensor:
        """The changed tensor `name` (such as `blocks.3.cross_attn.k.weight`), float32; `base` itself if it stays."""


@dataclass(frozen=True)
class AdapterChange:
    """An adapter merged in float32: W + scale * B A."""

    adapter: AdapterFile

    def __call__(self, name: str, base: Tensor) -> Tensor:
        """See `Change`."""
        pair = self.adapter.modules.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if pair is None:
            return base
        down, up = (tensor.to(base.device, torch.float32).flatten(1) for tensor in (pair.down, pair.up))
        return base + pair.scale * (up @ down)


@dataclass(frozen=True)
class CheckpointChange:
    """Another checkpoint's weights."""

    source: TensorSource

    def __call__(self, name: str, base: Tensor) -> Tensor:
        """See `Change`."""
        changed = self.source.get(name).to(base.device, torch.float32, copy=True)
        self.source.release()
        return changed


@dataclass(frozen=True)
class LogitInput:
    """One noisy sample: what the DiT sees, [1, C, F, H, W], [1, 1], [1, L, D], and its noise level."""

    latents_BCFHW: Tensor
    timesteps_BT: Tensor
    text_BLD: Tensor
    sigma: float


@dataclass(frozen=True)
class _State:
    """Where an input is between two blocks; the hidden state waits on the CPU."""

    hidden_BFHWD: Tensor
    modulation_BT6D: Tensor
    text_BLD: Tensor
    num_text_tokens: int
    sigma: float | None


def measure_streamed(
    comparison: Comparison,
    inputs: Sequence[LogitInput],
    attentions: Sequence[AttentionKind],
    blocks: Sequence[int],
    device: torch.device,
    on_block: OnBlock,
) -> LogitResult:
    """Measure on noisy samples that run through the base, up to the last of `blocks`.

    Args:
        comparison: the base and what is held against it.
        inputs: at least one.
        attentions: which of the two attentions.
        blocks: indices of existing blocks, ascending.
        device: where it is computed.
        on_block: called with the number of blocks that are done, after each.

    Raises:
        UserError: weights that are read hold values that are not finite.
    """
    arch, tally, change = comparison.arch, _Tally(), change_of(comparison)
    with torch.no_grad():
        states = _embedded(comparison.base, arch, inputs, device)
        for index in range(blocks[-1] + 1):
            block = load_block(comparison.base, arch, index, device)
            if index in blocks:
                changed = changed_block(block, index, arch, attentions, change)
            for number, state in enumerate(states):
                hidden = state.hidden_BFHWD.to(device)
                rows = block.modulation_rows(state.modulation_BT6D)
                if index in blocks and "self_attn" in attentions:
                    tally.add("self_attn", index, state, *_look_at_self(block, changed, hidden, state))
                hidden = block.attend_self(hidden, rows)
                if index in blocks and "cross_attn" in attentions:
                    tally.add("cross_attn", index, state, *_look_at_text(block, changed, hidden, state))
                if index < blocks[-1]:
                    hidden = block.feed_forward(block.attend_text(hidden, state.text_BLD), rows)
                    states[number] = _moved_on(state, hidden)
            on_block(index + 1)
            block = changed = None  # type: ignore[assignment]  # before the next one comes
    return tally.result(is_synthetic=False, num_inputs=len(inputs))


def measure_synthetic(
    comparison: Comparison,
    num_inputs: int,
    attentions: Sequence[AttentionKind],
    blocks: Sequence[int],
    seed: int,
    device: torch.device,
    on_block: OnBlock,
) -> LogitResult:
    """The same on random inputs: hidden and text states of independent standard normal numbers, drawn for each block.

    The timestep's part of the modulation is zero. Raises as `measure_streamed`.
    """
    arch, tally, change = comparison.arch, _Tally(), change_of(comparison)
    parts = tuple(part for attention in attentions for part in _PARTS[attention])
    with torch.no_grad():
        for done, index in enumerate(blocks, start=1):
            block = load_block(comparison.base, arch, index, device, parts)
            changed = changed_block(block, index, arch, attentions, change)
            for number in range(num_inputs):
                state = _random_state(arch, seed, index, number, device)
                hidden = state.hidden_BFHWD
                if "self_attn" in attentions:
                    tally.add("self_attn", index, state, *_look_at_self(block, changed, hidden, state))
                if "cross_attn" in attentions:
                    tally.add("cross_attn", index, state, *_look_at_text(block, changed, hidden, state))
            on_block(done)
            block = changed = None  # type: ignore[assignment]  # before the next one comes
    return tally.result(is_synthetic=True, num_inputs=num_inputs)


def change_of(comparison: Comparison) -> Change:
    """What a comparison does to weights."""
    if comparison.adapter is not None:
        return AdapterChange(comparison.adapter)
    assert comparison.other is not None
    return CheckpointChange(comparison.other)


def load_block(
    source: TensorSource, arch: WanArch, index: int, device: torch.device, parts: tuple[str, ...] = ("",)
) -> WanBlock:
    """One block in float32; only those of its tensors are read whose names begin with one of `parts`."""
    block = _empty_block(arch)
    names = [name for name, _ in block.named_parameters() if name.startswith(parts)]
    state = {name: _read(source, f"blocks.{index}.{name}", device) for name in names}
    source.release()
    return _filled(block, state)


def changed_block(
    block: WanBlock, index: int, arch: WanArch, attentions: Iterable[AttentionKind], change: Change
) -> WanBlock:
    """What `change` makes of a block's attentions and of what leads to them; what stays shares the block's memory."""
    parts = tuple(part for attention in attentions for part in _PARTS[attention])
    state = {
        name: change(f"blocks.{index}.{name}", parameter.detach())
        for name, parameter in block.named_parameters()
        if name.startswith(parts)
    }
    return _filled(_empty_block(arch), state)


def _empty_block(arch: WanArch) -> WanBlock:
    with torch.device("meta"):
        return WanBlock(arch, torch.float32)


def _filled(block: WanBlock, state: dict[str, Tensor]) -> WanBlock:
    block.load_state_dict(state, strict=False, assign=True)
    block.requires_grad_(False)
    return block


def _read(source: TensorSource, name: str, device: torch.device) -> Tensor:
    """A tensor in float32 and in memory of its own, so that the file's pages can be let go of."""
    return source.get(name).to(device, torch.float32, copy=True)


def _embedded(
    source: TensorSource, arch: WanArch, inputs: Sequence[LogitInput], device: torch.device
) -> list[_State]:
    with torch.device("meta"):
        embedding = WanEmbedding(arch, torch.float32, torch.float32)
    state = {name: _read(source, name, device) for name, _ in embedding.named_parameters()}
    source.release()
    embedding.load_state_dict(state, strict=True, assign=True)
    states = []
    for one in inputs:
        tensors = (one.latents_BCFHW, one.timesteps_BT, one.text_BLD)
        hidden, _, modulation, text = embedding.embed(*(tensor.to(device) for tensor in tensors))
        states.append(_State(hidden.cpu(), modulation, text, one.text_BLD.shape[1], one.sigma))
    return states


def _moved_on(state: _State, hidden_BFHWD: Tensor) -> _State:
    return _State(
        hidden_BFHWD.cpu(), state.modulation_BT6D, state.text_BLD, state.num_text_tokens, state.sigma
    )


def _random_state(arch: WanArch, seed: int, index: int, number: int, device: torch.device) -> _State:
    random = generator(seed, "logit_probe", index, number)
    hidden = torch.randn(1, *SYNTHETIC_GRID, arch.dim, generator=random)
    text = torch.randn(1, arch.text_len, arch.dim, generator=random)
    modulation = torch.zeros(1, 1, 6, arch.dim, device=device)
    return _State(hidden.to(device), modulation, text.to(device), arch.text_len, None)


_Looked = tuple[LogitStats, LogitStats, dict[str, tuple[float, float]]]


def _look_at_text(base: WanBlock, changed: WanBlock, hidden: Tensor, state: _State) -> _Looked:
    """Cross-attention: logits over all rows of the text, as the model sees it; norms over those of the caption."""
    stats = [
        logit_stats(*block.cross_attn.queries_and_keys(block.cross_attn_input(hidden), state.text_BLD, None))
        for block in (base, changed)
    ]
    caption = state.text_BLD[:, : state.num_text_tokens]
    return stats[0], stats[1], _norms(base.cross_attn, changed.cross_attn, caption, caption)


def _look_at_self(base: WanBlock, changed: WanBlock, hidden: Tensor, state: _State) -> _Looked:
    """Self-attention: logits and norms over all video tokens."""
    inputs = [
        block.self_attn_input(hidden, block.modulation_rows(state.modulation_BT6D))
        for block in (base, changed)
    ]
    table = base.rope(hidden)
    stats = [
        logit_stats(*block.self_attn.queries_and_keys(states, states, table))
        for block, states in zip((base, changed), inputs, strict=True)
    ]
    return stats[0], stats[1], _norms(base.self_attn, changed.self_attn, *inputs)


def _norms(
    base: WanAttention, changed: WanAttention, base_source: Tensor, source: Tensor
) -> dict[str, tuple[float, float]]:
    """Mean norms of the keys before `norm_k` and of the values, before and after."""

    def mean_norm(states: Tensor) -> float:
        return states.norm(dim=-1).mean().item()

    return {
        "k": (mean_norm(base.k(base_source)), mean_norm(changed.k(source))),
        "v": (mean_norm(base.v(base_source)), mean_norm(changed.v(source))),
    }


@dataclass
class _Tally:
    """Sums over inputs: a few numbers for each head, whatever the size of the model."""

    logits: dict[tuple[AttentionKind, int, float | None], list[tuple[LogitStats, LogitStats]]] = field(
        default_factory=dict
    )
    norms: dict[tuple[AttentionKind, int, str], list[tuple[float, float]]] = field(default_factory=dict)

    def add(
        self,
        attention: AttentionKind,
        index: int,
        state: _State,
        before: LogitStats,
        after: LogitStats,
        norms: dict[str, tuple[float, float]],
    ) -> None:
        """Add what was seen of one input in one block."""
        for stats, whose in ((before, "base"), (after, "changed")):
            if not (stats.std_N.isfinite().all() and stats.entropy_N.isfinite().all()):
                raise UserError(
                    f"blocks.{index}.{attention}: the logits of the {whose} model are not finite; its weights (or the cached "
                    "samples) hold NaN, infinite or absurdly large values, so use another file"
                )
        self.logits.setdefault((attention, index, state.sigma), []).append((before, after))
        for what, pair in norms.items():
            self.norms.setdefault((attention, index, what), []).append(pair)

    def result(self, *, is_synthetic: bool, num_inputs: int) -> LogitResult:
        """Means over inputs."""
        heads = []
        for (attention, index, sigma), pairs in sorted(
            self.logits.items(), key=lambda item: (*item[0][:2], item[0][2] or 0.0)
        ):
            columns = [
                torch.stack([getattr(pair[side], name) for pair in pairs]).mean(0).tolist()
                for name in ("std_N", "entropy_N")
                for side in (0, 1)
            ]
            heads += [
                HeadLogits(attention, index, sigma, head, *numbers)
                for head, numbers in enumerate(zip(*columns, strict=True))
            ]
        norms = [
            StateNorms(attention, index, "k" if what == "k" else "v", *_means(pairs))
            for (attention, index, what), pairs in sorted(self.norms.items())
        ]
        return LogitResult(tuple(heads), tuple(norms), is_synthetic, num_inputs)


def _means(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(pair[0] for pair in pairs) / len(pairs), sum(pair[1] for pair in pairs) / len(pairs)
