"""The DiT as training and measuring run it: the zero padding of the text, up to 512 rows, taken as one row.

The official model attends to every padding row, and they are all alike: one row whose attention logit is raised by
log(how many there are) is the same sum. With captions of ten tokens that is a tenth of the work.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.wan.transformer import WanBlock, WanTransformer, timestep_sinusoid


def velocity(
    model: WanTransformer, latents_BCFHW: Tensor, timesteps_BT: Tensor, text_BLD: Tensor, lens_B: Tensor
) -> Tensor:
    """What `model(latents, timesteps, text)` answers, up to rounding.

    Args:
        model: a transformer in float32.
        latents_BCFHW: noisy latents.
        timesteps_BT: 0 to 1000.
        text_BLD: text states, zero behind each caption's end.
        lens_B: true lengths.
    """
    hidden = model.patch_embedding(latents_BCFHW).permute(0, 2, 3, 4, 1).contiguous()
    time_BTD = model.time_embedding(timestep_sinusoid(timesteps_BT, model.arch.freq_dim))
    modulation = model.time_projection(time_BTD).unflatten(-1, (6, model.arch.dim))
    text = model.text_embedding(F.pad(text_BLD, (0, 0, 0, 1)))
    bias = padding_bias(lens_B, text_BLD.shape[1], model.arch.text_len)
    for block in model.blocks:
        assert isinstance(block, WanBlock)
        rows = block.modulation_rows(modulation)
        hidden = _attend_text(block, block.attend_self(hidden, rows, block.rope(hidden)), text, bias)
        hidden = block.feed_forward(hidden, rows)
    return model.head(hidden, time_BTD)


def padding_bias(lens_B: Tensor, length: int, text_len: int) -> Tensor:
    """Additive attention mask [B, 1, 1, length + 1]: 0 on tokens, log(number of padding rows) on the last, else -inf."""
    positions = torch.arange(length + 1)
    bias = torch.full((len(lens_B), length + 1), -math.inf)
    bias[positions[None, :] < lens_B[:, None]] = 0.0
    bias[:, -1] = (text_len - lens_B).double().log().float()
    return bias[:, None, None, :]


def _attend_text(block: WanBlock, hidden_BFHWD: Tensor, text_BLD: Tensor, bias: Tensor) -> Tensor:
    attention = block.cross_attn
    query, key = attention.queries_and_keys(block.cross_attn_input(hidden_BFHWD), text_BLD, None)
    value = attention.v(text_BLD).unflatten(-1, (attention.num_heads, -1))
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=bias
    )
    return hidden_BFHWD + attention.o(mixed.transpose(1, 2).flatten(2)).view_as(hidden_BFHWD)


class CompactDit:
    """A DiT that is called like `WanTransformer`, for the sampler; lengths are read off the text's zero rows."""

    def __init__(self, model: WanTransformer) -> None:
        self._model = model

    def __call__(self, latents_BCFHW: Tensor, timesteps_BT: Tensor, text_BLD: Tensor) -> Tensor:
        """Velocity [B, C, F, H, W]."""
        lens_B = (text_BLD != 0).any(dim=2).sum(dim=1)
        return velocity(self._model, latents_BCFHW, timesteps_BT, text_BLD, lens_B)
