"""Bytes that autograd keeps of each layer between forward and backward, for one micro-batch, by arithmetic.

Counted are the tensors that the layer's own operations save: inputs of norms (of a DiT block in float32, or with
`model.lean_kernels` in the dtype that they have), queries, keys, values and output of attention, inputs of activation
functions, and, where weights or adapters train, inputs of linear layers. A frozen linear layer saves nothing but its
weight. tests/models/wan/test_activations.py compares with what autograd saves.

Shapes: S video tokens, L text tokens, both of the whole micro-batch; D width, F width of the feed-forward, N heads.
"""

from collections.abc import Collection
from dataclasses import dataclass

from models.wan.arch import PATCH_SIZE, WanArch
from models.wan.checkpoint import Umt5Sizes

_FLOAT32 = 4
# One tensor is the input of all of them.
_READ_BY_THREE = frozenset(f"self_attn.{name}" for name in "qkv")


@dataclass(frozen=True)
class Adapters:
    """The adapters of one block: paths such as `cross_attn.k`, rank, and whether their input is dropped out."""

    paths: Collection[str] = ()
    rank: int = 0
    dropout: bool = False


@dataclass(frozen=True)
class Batch:
    """One micro-batch: tokens of video in all, of text in all (UMT5 and the DiT pad differently), samples, timesteps."""

    video_tokens: float
    text_tokens: float
    samples: int
    time_rows: float


@dataclass(frozen=True)
class DitPrecision:
    """Bytes of one number: in matrix products, and in the residual stream; and `model.lean_kernels`."""

    compute: int
    residual: int
    lean: bool = True

    @property
    def kept_stream(self) -> int:
        """Bytes of a number of the residual stream as a norm keeps it."""
        return self.residual if self.lean else _FLOAT32

    @property
    def kept_projection(self) -> int:
        """The same of the output of a projection to queries or keys."""
        return self.compute if self.lean else _FLOAT32

    @property
    def kept_by_adapter(self) -> int:
        """The same of the inputs of A and B, and of what they give."""
        return self.compute if self.lean else _FLOAT32


def dit_block_saved(
    arch: WanArch,
    batch: Batch,
    precision: DitPrecision,
    adapters: Adapters,
    *,
    hidden_wants_gradient: bool,
    text_wants_gradient: bool,
) -> float:
    """What one DiT block keeps without recomputation; 0 where nothing in it wants a gradient.

    Args:
        arch: sizes.
        batch: the micro-batch.
        precision: of the block.
        adapters: of the block.
        hidden_wants_gradient: whether the block's input does.
        text_wants_gradient: whether the text does (encoder_ft).
    """
    video, text = batch.video_tokens, batch.samples * arch.text_len
    stream, projected = arch.dim * precision.kept_stream, arch.dim * precision.kept_projection
    narrow, paths = arch.dim * precision.compute, set(adapters.paths)
    scores = video * arch.num_heads * _FLOAT32
    hidden = hidden_wants_gradient
    saved = video * stream if hidden else 0.0  # input of norm1
    time_rows = 6 + hidden  # the modulation, and what each modulated norm is multiplied by

    wants = {name: hidden or f"self_attn.{name}" in paths for name in "qkv"}
    saved += video * projected * (wants["q"] + wants["k"])  # inputs of the norms of query and key
    if any(wants.values()):
        saved += 4 * video * narrow + scores
    hidden = hidden or any(wants.values()) or "self_attn.o" in paths

    saved += video * stream if hidden else 0.0  # input of norm3
    wants = {name: text_wants_gradient or f"cross_attn.{name}" in paths for name in "kv"}
    wants["q"] = hidden or "cross_attn.q" in paths
    saved += (video * wants["q"] + text * wants["k"]) * projected
    if any(wants.values()):
        saved += 2 * (video + text) * narrow + scores
    hidden = hidden or any(wants.values()) or "cross_attn.o" in paths

    saved += video * stream if hidden else 0.0  # input of norm2
    time_rows += hidden
    if hidden or "ffn.0" in paths:
        saved += video * arch.ffn_dim * precision.compute
    if hidden or paths:
        saved += time_rows * batch.time_rows * arch.dim * _FLOAT32
    return saved + _adapters_saved(arch, batch, precision, adapters)


def dit_block_selected(arch: WanArch, batch: Batch, precision: DitPrecision, adapters: Adapters) -> float:
    """What one DiT block keeps with "selective": its input, and the outputs of attention and of linear layers."""
    video, text = batch.video_tokens, batch.samples * arch.text_len
    outputs = 9 * video * arch.dim + 2 * text * arch.dim + video * arch.ffn_dim
    saved = outputs * precision.compute + 2 * video * arch.num_heads * _FLOAT32
    for path in adapters.paths:
        rows, _, width = _linear_sizes(arch, batch, path)
        saved += rows * (adapters.rank + width) * precision.kept_by_adapter
    return saved + dit_hidden_bytes(arch, batch, precision)


def dit_block_working(arch: WanArch, batch: Batch, precision: DitPrecision, *, has_backward: bool) -> float:
    """What the operations of one DiT block hold at the largest moment, besides what is saved.

    Which tensors these are follows from the order of operations in `WanBlock`: forward, query and key in float32 while
    the key is rotated (two products and their sum), or both sides of the feed-forward's activation function. With a
    backward pass, the gradient of the residual stream, and with it the gradients of both those sides, or at the end of
    a forward that runs again the feed-forward's output, gated and added. A lean block has fewer of these on a GPU; on a CPU
    the casts that its kernels make of their operands stand in their place, so one arithmetic serves both. tests/models/wan/test_allocation.py measures.
    """
    compute, residual, dim = precision.compute, precision.residual, arch.dim
    both_sides = 2 * arch.ffn_dim * compute
    if has_backward:
        return batch.video_tokens * (dim * residual + max(both_sides, dim * (3 * compute + 2 * _FLOAT32)))
    rotating = dim * (4 * _FLOAT32 + 2 * compute)
    return batch.video_tokens * max(rotating, both_sides + dim * (residual + 2 * compute))


def dit_ends_working(arch: WanArch, batch: Batch) -> float:
    """The same of the embedding and of the head: two float32 copies of the hidden state."""
    return batch.video_tokens * arch.dim * 2 * _FLOAT32


def dit_hidden_bytes(arch: WanArch, batch: Batch, precision: DitPrecision) -> float:
    """The residual stream between two blocks."""
    return batch.video_tokens * arch.dim * precision.residual


def dit_text_bytes(arch: WanArch, batch: Batch, precision: DitPrecision) -> float:
    """The embedded text, which every block of a stage reads and which exists once."""
    return batch.samples * arch.text_len * arch.dim * precision.compute


def dit_input_saved(arch: WanArch, batch: Batch, precision: DitPrecision, *, text: bool) -> float:
    """The embedding layers: the input of the text embedding's activation, where the text wants a gradient."""
    return dit_text_bytes(arch, batch, precision) if text else 0.0


def dit_head_saved(arch: WanArch, batch: Batch) -> float:
    """The head: the input of its norm. The loss behind it keeps the difference to the target."""
    volume = PATCH_SIZE[0] * PATCH_SIZE[1] * PATCH_SIZE[2]
    return batch.video_tokens * (arch.dim + arch.out_dim * volume) * _FLOAT32


def umt5_block_saved(sizes: Umt5Sizes, batch: Batch, compute: int, stored: int, *, trained: bool) -> float:
    """What one UMT5 block keeps without recomputation.

    A trained block whose weights are wider than the products saves the cast of every weight too, because autocast
    makes it anew in every call.

    Args:
        sizes: of the encoder.
        batch: the micro-batch; its text tokens count.
        compute: bytes of one number in matrix products.
        stored: bytes of one stored weight, and of the states.
        trained: whether the block's weights train.
    """
    tokens, width, ffn = batch.text_tokens, sizes.d_model, sizes.d_ff
    inner = sizes.num_heads * sizes.d_kv
    length = tokens / batch.samples
    scores = batch.samples * sizes.num_heads * length * length
    if not trained:
        return tokens * (2 * width + 3 * inner) * stored + (scores + 6 * tokens * ffn) * stored
    casts = stored != compute
    norms = tokens * 4 * width * stored
    attention = (tokens * 3 * inner + scores) * max(stored, compute)
    inputs = tokens * ((5 if casts else 2) * width + inner + ffn) * compute
    weights = (4 * width * inner + 3 * width * ffn) * compute if casts else 0.0
    return norms + attention + inputs + 6 * tokens * ffn * compute + weights + 8 * length * length


def umt5_block_selected(sizes: Umt5Sizes, batch: Batch, compute: int, stored: int) -> float:
    """What one UMT5 block keeps with "selective": its input and the outputs of matrix products."""
    tokens, inner = batch.text_tokens, sizes.num_heads * sizes.d_kv
    scores = sizes.num_heads * tokens * tokens / batch.samples
    outputs = tokens * (3 * inner + 2 * sizes.d_model + 2 * sizes.d_ff) * compute
    return outputs + (scores + tokens * inner) * max(stored, compute) + tokens * sizes.d_model * stored


def _adapters_saved(arch: WanArch, batch: Batch, precision: DitPrecision, adapters: Adapters) -> float:
    """Inputs of A (cast to float32, or lean as they are) and of B.

    Where nothing is cast, some inputs exist anyhow, the text and what attention gives, and some are one for several layers.
    What is dropped out is each layer's own.
    """
    saved, seen = 0.0, set()
    kept = precision.kept_by_adapter
    is_cast = precision.compute != kept
    for path in adapters.paths:
        rows, width, _ = _linear_sizes(arch, batch, path)
        saved += rows * adapters.rank * kept
        reads_text = path in ("cross_attn.k", "cross_attn.v")
        exists_anyhow = not is_cast and (reads_text or path.endswith("attn.o"))
        source = "self_attn.qkv" if path in _READ_BY_THREE and not is_cast else path
        if adapters.dropout or not (exists_anyhow or source in seen):
            saved += rows * width * kept
        seen.add(source)
        if adapters.dropout and not reads_text:
            saved += rows * width  # the mask, for the gradient of the input, which the text does not want
    return saved


def _linear_sizes(arch: WanArch, batch: Batch, path: str) -> tuple[float, int, int]:
    """Rows, inputs and outputs of a linear layer of a block."""
    if path in ("cross_attn.k", "cross_attn.v"):
        return batch.samples * arch.text_len, arch.dim, arch.dim
    if path == "ffn.0":
        return batch.video_tokens, arch.dim, arch.ffn_dim
    if path == "ffn.2":
        return batch.video_tokens, arch.ffn_dim, arch.dim
    return batch.video_tokens, arch.dim, arch.dim
