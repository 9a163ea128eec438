"""The DiT's layers where both of A14B's experts are in the pipeline: each layer holds the two, and a sample goes through one.

Which one, its timestep says: from the boundary up it is the high-noise expert's. So training steps, whose samples all lie on
one side, run one expert whole, and an evaluation may hold samples of both. Shapes as in `models/wan/stages.py`.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from models.wan.compiled import RunBlock, compiled_block
from models.wan.stages import TextWire
from models.wan.transformer import WanBlock
from utils.config.experts import EXPERTS
from utils.config.schema import ActivationCheckpointing
from utils.layers import PipelineLayer
from utils.sigma_law import NUM_TRAIN_TIMESTEPS

Tensors = tuple[Tensor, ...]


class PairWire(NamedTuple):
    """What travels between the layers of a pair: the fields of `DitWire`, and whose each sample is, bool [B]."""

    hidden_BFHWD: Tensor
    time_BTD: Tensor
    modulation_BT6D: Tensor
    text_BLD: Tensor
    seed: Tensor
    is_high_B: Tensor


def pair_of(high: PipelineLayer, low: PipelineLayer) -> nn.ModuleDict:
    """The modules of the two experts' layers of one place."""
    return nn.ModuleDict(dict(zip(EXPERTS, (high.inner, low.inner), strict=True)))


def by_expert(
    is_high_B: Tensor, pair: nn.Module, call: Callable[[nn.Module, Tensors], Tensors], tensors: Tensors
) -> Tensors:
    """`call(expert, tensors)`, each sample with its own expert; every tensor has the samples as its first axis."""
    high, low = (cast(nn.ModuleDict, pair)[expert] for expert in EXPERTS)
    if bool(is_high_B.all()):
        return call(high, tensors)
    if not bool(is_high_B.any()):
        return call(low, tensors)
    rows = [is_high_B.nonzero().squeeze(1), (~is_high_B).nonzero().squeeze(1)]
    parts = [
        call(expert, tuple(tensor[own] for tensor in tensors))
        for expert, own in zip((high, low), rows, strict=True)
    ]
    order = torch.cat(rows).argsort()
    return tuple(torch.cat(pieces)[order] for pieces in zip(*parts, strict=True))


class PairedInputLayer(PipelineLayer):
    """Patches, timestep and text into either DiT."""

    def __init__(self, inner: nn.ModuleDict, boundary: float) -> None:
        super().__init__(inner)
        self._first_high = boundary * NUM_TRAIN_TIMESTEPS

    def run(self, *wire: Tensor) -> PairWire:
        """TextWire -> PairWire."""
        text = TextWire(*wire)
        is_high_B = text.timesteps_BT[:, -1] >= self._first_high
        hidden, time, modulation, embedded = by_expert(
            is_high_B,
            self.inner,
            lambda expert, tensors: expert.embed(*tensors),  # type: ignore[operator]
            (text.latents_BCFHW, text.timesteps_BT, text.text),
        )
        return PairWire(hidden, time, modulation, embedded, text.seed, is_high_B)


class PairedBlockLayer(PipelineLayer):
    """One block of either DiT. `is_compiled` as of `DitBlockLayer`."""

    def __init__(
        self, inner: nn.ModuleDict, recompute: ActivationCheckpointing, is_compiled: bool = False
    ) -> None:
        super().__init__(inner, False if is_compiled else recompute)
        blocks = [cast(WanBlock, block) for block in inner.values()]
        # By identity: a module is its own key.
        self._run_block: dict[nn.Module, RunBlock] = {
            block: compiled_block(block, recompute) if is_compiled else block for block in blocks
        }

    def run(self, *wire: Tensor) -> PairWire:
        """hidden_BFHWD -> hidden_BFHWD."""
        pair = PairWire(*wire)
        (hidden,) = by_expert(
            pair.is_high_B,
            self.inner,
            lambda expert, tensors: (self._run_block[expert](*tensors),),
            (pair.hidden_BFHWD, pair.modulation_BT6D, pair.text_BLD),
        )
        return pair._replace(hidden_BFHWD=hidden)


class PairedHeadLayer(PipelineLayer):
    """Hidden state to velocity."""

    def run(self, *wire: Tensor) -> Tensor:
        """PairWire -> velocity_BCFHW, float32."""
        pair = PairWire(*wire)
        (velocity,) = by_expert(
            pair.is_high_B,
            self.inner,
            lambda expert, tensors: (expert(*tensors),),
            (pair.hidden_BFHWD, pair.time_BTD),
        )
        return velocity
