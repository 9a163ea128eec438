"""FLOPs of each layer's passes (a multiply-add counts as two) and numbers of weights, for splitting over stages.

Linear layers cost 2 * rows * in * out; attention 4 * queries * keys * width (both products). The per-block sum agrees
with torch's FlopCounterMode for both model sizes.
"""

import math
from collections.abc import Collection, Iterable, Mapping

from models.wan.arch import PATCH_SIZE, WanArch
from models.wan.checkpoint import Umt5Sizes

# Five products for two: the scores again, and the gradients of scores, queries, keys and values.
_ATTENTION_BACKWARD = 2.5


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
    return linear + 4 * tokens * (tokens + arch.text_len) * dim


def dit_block_backward_flops(
    arch: WanArch,
    video_tokens: float,
    adapted: Collection[str],
    *,
    hidden_wants_gradient: bool,
    text_wants_gradient: bool,
) -> float:
    """Gradients inside one frozen DiT block, from its end down to what wants one; adapters themselves are not counted.

    A frozen linear layer costs the gradient of its input, where that is wanted. In the first block that has
    adapters nothing below them is.

    Args:
        arch: sizes.
        video_tokens: of a sample.
        adapted: paths of adapted layers, such as `cross_attn.k`.
        hidden_wants_gradient: whether the block's input does.
        text_wants_gradient: whether the text does (encoder_ft).
    """
    square, wide = 2 * arch.dim * arch.dim, 2 * arch.dim * arch.ffn_dim
    hidden, tokens, text, flops = hidden_wants_gradient, video_tokens, arch.text_len, 0.0

    def attention(name: str, keys: float, wanted: Mapping[str, tuple[bool, float]]) -> bool:
        """Adds one attention; `wanted` says per projection whether its input wants a gradient, and its rows."""
        nonlocal flops
        flops += sum(square * rows for wants, rows in wanted.values() if wants)
        inside = any(wants or f"{name}.{one}" in adapted for one, (wants, _) in wanted.items())
        if inside:
            flops += _ATTENTION_BACKWARD * 4 * tokens * keys * arch.dim + square * tokens
        return inside or f"{name}.o" in adapted

    hidden |= attention("self_attn", tokens, dict.fromkeys("qkv", (hidden, tokens)))
    from_text = (text_wants_gradient, text)
    hidden |= attention("cross_attn", text, {"q": (hidden, tokens), "k": from_text, "v": from_text})
    flops += wide * tokens * (hidden + (hidden or "ffn.0" in adapted))
    return flops


def dit_input_flops(arch: WanArch, video_tokens: float, time_rows: float = 1.0) -> float:
    """Patch embedding, text embedding over `text_len` rows, time embedding of each timestep."""
    volume = PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]
    patches = 2 * video_tokens * arch.in_dim * volume * arch.dim
    text = 2 * arch.text_len * (arch.text_dim * arch.dim + arch.dim * arch.dim)
    time = 2 * time_rows * (arch.freq_dim * arch.dim + 7 * arch.dim * arch.dim)
    return patches + text + time


def dit_text_flops(arch: WanArch) -> float:
    """What of a pass depends on the text alone: its embedding, and its keys and values in every block."""
    embedding = arch.text_len * (arch.text_dim * arch.dim + arch.dim * arch.dim)
    return 2 * (embedding + arch.num_layers * arch.text_len * 2 * arch.dim * arch.dim)


def dit_head_flops(arch: WanArch, video_tokens: float) -> float:
    """Projection to patches."""
    volume = PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]
    return 2 * video_tokens * arch.dim * arch.out_dim * volume


def umt5_block_flops(sizes: Umt5Sizes, text_tokens: float) -> float:
    """One UMT5 encoder block."""
    inner = sizes.num_heads * sizes.d_kv
    linear = 2 * text_tokens * (4 * sizes.d_model * inner + 3 * sizes.d_model * sizes.d_ff)
    return linear + 4 * text_tokens * text_tokens * inner


def umt5_block_backward_flops(sizes: Umt5Sizes, text_tokens: float, *, trained: bool) -> float:
    """Gradients of the input of one UMT5 block and, where it trains, of its weights."""
    attention = 4 * text_tokens * text_tokens * sizes.num_heads * sizes.d_kv
    linear = umt5_block_flops(sizes, text_tokens) - attention
    return linear * (1 + trained) + _ATTENTION_BACKWARD * attention
