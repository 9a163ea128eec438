"""FLOPs of each layer's forward pass (a multiply-add counts as two) and bytes it keeps, for splitting over stages.

Linear layers cost 2 * rows * in * out; attention 4 * queries * keys * width (both products). The per-block sum agrees
with torch's FlopCounterMode for both model sizes.
"""

import math
from collections.abc import Iterable, Mapping

from models.wan.arch import PATCH_SIZE, WanArch
from models.wan.checkpoint import Umt5Sizes


def num_weights(shapes: Mapping[str, tuple[int, ...]], *prefixes: str) -> int:
    """Weights of all tensors whose name starts with one of the prefixes."""
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefixes))


def num_adapter_weights(shapes: Mapping[str, tuple[int, ...]], targets: Iterable[str], rank: int) -> int:
    """Weights of the adapters on these modules: rank times (in + out) each."""
    return sum(rank * sum(shapes[f"{target}.weight"]) for target in targets)


def dit_block_flops(arch: WanArch, video_tokens: float) -> float:
    """One DiT block: self-attention, cross-attention to `text_len` tokens, feed-forward."""
    dim, tokens = arch.dim, video_tokens
    linear = 2 * (tokens * (6 * dim * dim + 2 * dim * arch.ffn_dim) + arch.text_len * 2 * dim * dim)
    return linear + dit_attention_flops(arch, video_tokens)


def dit_attention_flops(arch: WanArch, video_tokens: float) -> float:
    """The products of both attentions of one DiT block."""
    return 4 * video_tokens * (video_tokens + arch.text_len) * arch.dim


def dit_input_flops(arch: WanArch, video_tokens: float) -> float:
    """Patch embedding, text embedding over `text_len` rows, time embedding of one row."""
    volume = PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]
    patches = 2 * video_tokens * arch.in_dim * volume * arch.dim
    text = 2 * arch.text_len * (arch.text_dim * arch.dim + arch.dim * arch.dim)
    time = 2 * (arch.freq_dim * arch.dim + 7 * arch.dim * arch.dim)
    return patches + text + time


def dit_head_flops(arch: WanArch, video_tokens: float) -> float:
    """Projection to patches."""
    volume = PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]
    return 2 * video_tokens * arch.dim * arch.out_dim * volume


def umt5_block_flops(sizes: Umt5Sizes, text_tokens: float) -> float:
    """One UMT5 encoder block."""
    inner = sizes.num_heads * sizes.d_kv
    linear = 2 * text_tokens * (4 * sizes.d_model * inner + 3 * sizes.d_model * sizes.d_ff)
    return linear + umt5_attention_flops(sizes, text_tokens)


def umt5_attention_flops(sizes: Umt5Sizes, text_tokens: float) -> float:
    """The products of attention of one UMT5 block."""
    return 4 * text_tokens * text_tokens * sizes.num_heads * sizes.d_kv
