"""DiT blocks whose arithmetic is compiled: norms, modulation, gates and rotary embedding fuse, products stay as they are.

Shapes as in `models/wan/transformer.py`. What is compiled does not see the grid of tokens, only their number: the rotary
table comes from outside, and [B, F, H, W, D] is passed as [B, T, 1, F * H * W / T, D], over which a modulation per sample or per frame
broadcasts alike. So a new bucket compiles nothing, once there have been two.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

from torch import Tensor

from models.wan.transformer import WanBlock
from utils.compiled import compiled
from utils.config.schema import ActivationCheckpointing
from utils.recompute import is_wanted, parked, run_again_later

RunBlock = Callable[[Tensor, Tensor, Tensor], Tensor]


def compiled_block(block: WanBlock, recompute: ActivationCheckpointing = False) -> RunBlock:
    """What computes `block(hidden_BFHWD, modulation_BT6D, text_BLD)` compiled; blocks of one structure share the code.

    Recomputation is compiled with the block, where it belongs. Around it, "selective" would not see what is inside: torch (2.13)
    then gives wrong gradients, and says nothing. And what runs again may be another variant than what ran, which keeps
    other tensors.

    Args:
        block: the block; its adapters may be switched on and off. Its weights do not come and go (`blocks_to_swap`).
        recompute: as of `PipelineLayer`, which is then to do nothing about it.
    """

    def call(hidden_BFHWD: Tensor, modulation_BT6D: Tensor, text_BLD: Tensor) -> Tensor:
        batch, _, _, _, dim = hidden_BFHWD.shape
        rows = hidden_BFHWD.reshape(batch, modulation_BT6D.shape[1], 1, -1, dim)
        if not rows.requires_grad:
            rows = rows.detach()  # a view's guards would look at the grid of what it is a view of
        wire = (rows, modulation_BT6D, text_BLD, *block.rope(hidden_BFHWD))
        now = recompute if is_wanted(wire, block) else False
        with parked(rows) if now == "offload" else nullcontext():
            found = _compiled_with(True if now == "offload" else now)(block, *wire)
        return found.view_as(hidden_BFHWD)

    return call


@cache
def _compiled_with(recompute: ActivationCheckpointing) -> Callable[..., Tensor]:
    def run(block: WanBlock, *tensors: Tensor) -> Tensor:
        def body(hidden: Tensor, modulation: Tensor, text: Tensor, *table: Tensor) -> Tensor:
            return block.body(hidden, modulation, text, (table[0], table[1]))

        return run_again_later(recompute, body, tensors) if recompute else body(*tensors)

    return compiled(run)
