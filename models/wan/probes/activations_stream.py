"""A base's activations on cached samples, block by block: one block's weights are in memory at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.wan.arch import WanArch
from models.wan.probes.logit_report import Kind
from models.wan.probes.logits import Inputs
from models.wan.stages import TextWire
from models.wan.transformer import WanBlock, WanEmbedding
from utils.errors import UserError
from utils.tensor_source import TensorSource


@dataclass
class Stream:
    """One forward pass that is under way: the state between two blocks, on the CPU.

    Attributes:
        hidden_BFHWD: residual stream, one sample.
        modulation_BT6D: of the noise level.
        text_BLD: behind the text embedding, padded to the model's number of text slots.
        num_tokens: of the caption.
        sigma: noise level.
        sample: its name.
    """

    hidden_BFHWD: Tensor
    modulation_BT6D: Tensor
    text_BLD: Tensor
    num_tokens: int
    sigma: float
    sample: str


class BaseForward:
    """Carries several streams through the blocks together, so that each block is read once."""

    def __init__(self, source: TensorSource, arch: WanArch, dtype: torch.dtype, device: torch.device) -> None:
        self._source = source
        self._arch = arch
        self._dtype = dtype
        self._device = device

    @torch.no_grad()
    def begin(self, wires: Sequence[tuple[str, float, TextWire]]) -> list[Stream]:
        """Embed each (sample, sigma, wire); the wire holds one sample."""
        with torch.device("meta"):
            embedding = WanEmbedding(self._arch, self._dtype, torch.float32)
        self._load(embedding, "")
        streams = []
        for sample, sigma, wire in wires:
            hidden, _, modulation, text = embedding.embed(
                wire.latents_BCFHW.to(self._device),
                wire.timesteps_BT.to(self._device),
                wire.text.to(self._device),
            )
            streams.append(
                Stream(hidden.cpu(), modulation.cpu(), text.cpu(), int(wire.lens_B[0]), sigma, sample)
            )
        return streams

    @torch.no_grad()
    def run_block(
        self,
        index: int,
        streams: Sequence[Stream],
        look: Callable[[Stream, Kind, Inputs], None] | None,
        kinds: Sequence[Kind],
        *,
        is_last: bool,
    ) -> None:
        """Run one block over all streams. `look` sees the inputs of its attentions; after the last block nothing is kept."""
        with torch.device("meta"):
            block = WanBlock(self._arch, self._dtype)
        self._load(block, f"blocks.{index}.")
        for stream in streams:
            hidden, text = stream.hidden_BFHWD.to(self._device), stream.text_BLD.to(self._device)
            rows = block.modulation_rows(stream.modulation_BT6D.to(self._device))
            if look is not None and "self_attn" in kinds:
                states = block.self_attn_input(hidden, rows)[0]
                look(stream, "self_attn", Inputs(states, states, block.rope(hidden), len(states)))
            if is_last and "cross_attn" not in kinds:
                continue
            hidden = block.attend_self(hidden, rows, block.rope(hidden))
            if look is not None and "cross_attn" in kinds:
                states = block.cross_attn_input(hidden)[0]
                look(stream, "cross_attn", Inputs(states, text[0], None, max(stream.num_tokens, 1)))
            if not is_last:
                stream.hidden_BFHWD = block.feed_forward(block.attend_text(hidden, text), rows).cpu()

    def _load(self, module: nn.Module, prefix: str) -> None:
        state = {}
        for name, parameter in module.named_parameters():
            tensor = self._source.get(prefix + name)
            if tensor.shape != parameter.shape:
                raise UserError(
                    f"{self._source.files[0]}: {prefix}{name} is {list(tensor.shape)}, but the model wants "
                    f"{list(parameter.shape)}"
                )
            state[name] = tensor.to(device=self._device, dtype=parameter.dtype, copy=True)
        self._source.release()
        module.load_state_dict(state, strict=True, assign=True)
        module.eval().requires_grad_(False)


def walk(
    forward: BaseForward,
    streams: Sequence[Stream],
    blocks: Sequence[int],
    kinds: Sequence[Kind],
    look: Callable[[int, Stream, Kind, Inputs], None],
) -> Iterator[int]:
    """Run up to the last of `blocks`, showing `look` the inputs of theirs; yields each block's number when it is done."""
    wanted, last = set(blocks), max(blocks)
    for index in range(last + 1):
        seen = (lambda *found, index=index: look(index, *found)) if index in wanted else None
        forward.run_block(index, streams, seen, kinds, is_last=index == last)
        yield index
