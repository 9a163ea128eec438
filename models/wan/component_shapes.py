"""Official tensor names and shapes of the UMT5 encoder and of both VAEs, by rule, and the sizes read back from them.

The counterpart of `arch.expected_shapes` for the other two parts of a checkpoint. No torch: what can be answered
from a file's header needs no tensor. Sources: `wan/modules/{t5,vae2_1,vae2_2}.py` of the official repository.
"""

import re
from dataclasses import dataclass

from models.wan.arch import Shape, VaeKind, describe_mismatch
from utils.errors import UserError

# Fixed by the structure of both VAEs, whatever their width.
_WIDTH_FACTORS = (1, 2, 4, 4)
_NUM_RES_BLOCKS = 2
_TEMPORAL_DOWNSAMPLE = (False, True, True)
_LATENT_CHANNELS: dict[VaeKind, int] = {"2.1": 16, "2.2": 48}
# 2.2 folds 2x2 pixels into channels before the first convolution.
_PIXEL_CHANNELS: dict[VaeKind, int] = {"2.1": 3, "2.2": 12}
_BLOCK_QUERY = re.compile(r"blocks\.\d+\.attn\.q\.weight")


@dataclass(frozen=True)
class Umt5Sizes:
    """Sizes of a UMT5 encoder, under the names that `transformers` gives them."""

    vocab_size: int
    d_model: int
    num_heads: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_buckets: int


@dataclass(frozen=True)
class VaeSizes:
    """Sizes of a Wan VAE: the widths of the first encoder and the last decoder level, in channels."""

    kind: VaeKind
    base_dim: int
    decoder_base_dim: int

    @property
    def latent_channels(self) -> int:
        """Channels of a latent: 16 (2.1) or 48 (2.2)."""
        return _LATENT_CHANNELS[self.kind]

    @property
    def pixel_channels(self) -> int:
        """Channels that the first convolution sees: 3, or 12 where 2x2 pixels are folded (2.2)."""
        return _PIXEL_CHANNELS[self.kind]


def expected_umt5_shapes(sizes: Umt5Sizes) -> dict[str, Shape]:
    """Official names and shapes of every tensor of a UMT5 encoder (242 for UMT5-XXL)."""
    width, inner, hidden = sizes.d_model, sizes.num_heads * sizes.d_kv, sizes.d_ff
    shapes: dict[str, Shape] = {"token_embedding.weight": (sizes.vocab_size, width)}
    for index in range(sizes.num_layers):
        block = f"blocks.{index}"
        shapes[f"{block}.norm1.weight"] = (width,)
        for projection in "qkv":
            shapes[f"{block}.attn.{projection}.weight"] = (inner, width)
        shapes[f"{block}.attn.o.weight"] = (width, inner)
        shapes[f"{block}.norm2.weight"] = (width,)
        shapes[f"{block}.ffn.gate.0.weight"] = (hidden, width)
        shapes[f"{block}.ffn.fc1.weight"] = (hidden, width)
        shapes[f"{block}.ffn.fc2.weight"] = (width, hidden)
        shapes[f"{block}.pos_embedding.embedding.weight"] = (sizes.num_buckets, sizes.num_heads)
    shapes["norm.weight"] = (width,)
    return shapes


def text_encoder_sizes(shapes: dict[str, Shape]) -> Umt5Sizes:
    """Read the sizes of a UMT5 encoder from its official names and shapes, and check every tensor against them.

    Raises:
        UserError: tensors are missing, unknown, or of shapes that do not belong together.
    """
    table = _shape_of(shapes, "token_embedding.weight", 2, "UMT5 encoder")
    bias = _shape_of(shapes, "blocks.0.pos_embedding.embedding.weight", 2, "UMT5 encoder")
    query = _shape_of(shapes, "blocks.0.attn.q.weight", 2, "UMT5 encoder")
    gate = _shape_of(shapes, "blocks.0.ffn.gate.0.weight", 2, "UMT5 encoder")
    num_layers = sum(_BLOCK_QUERY.fullmatch(name) is not None for name in shapes)
    num_buckets, num_heads = bias
    if num_heads < 1 or query[0] % num_heads:
        raise UserError(
            f"blocks.0.attn.q.weight has {query[0]} rows, which do not split into {num_heads} heads"
        )
    sizes = Umt5Sizes(
        vocab_size=table[0],
        d_model=table[1],
        num_heads=num_heads,
        d_kv=query[0] // num_heads,
        d_ff=gate[0],
        num_layers=num_layers,
        num_buckets=num_buckets,
    )
    _check_against(shapes, expected_umt5_shapes(sizes), "UMT5 encoder")
    return sizes


def expected_vae_shapes(sizes: VaeSizes) -> dict[str, Shape]:
    """Official names and shapes of every tensor of a Wan VAE (194 for 2.1, 196 for 2.2), in the published order."""
    channels, deepest = sizes.latent_channels, _WIDTH_FACTORS[-1]
    shapes: dict[str, Shape] = {}
    _conv(shapes, "encoder.conv1", sizes.base_dim, sizes.pixel_channels, (3, 3, 3))
    _encoder_levels(shapes, sizes)
    _middle(shapes, "encoder.middle", sizes.base_dim * deepest)
    _head(shapes, "encoder.head", sizes.base_dim * deepest, 2 * channels)
    _conv(shapes, "conv1", 2 * channels, 2 * channels, (1, 1, 1))
    _conv(shapes, "conv2", channels, channels, (1, 1, 1))
    _conv(shapes, "decoder.conv1", sizes.decoder_base_dim * deepest, channels, (3, 3, 3))
    _middle(shapes, "decoder.middle", sizes.decoder_base_dim * deepest)
    _decoder_levels(shapes, sizes)
    _head(shapes, "decoder.head", sizes.decoder_base_dim, sizes.pixel_channels)
    return shapes


def vae_kind(shapes: dict[str, Shape]) -> VaeKind:
    """Which of the two VAEs these official names and shapes belong to.

    Raises:
        UserError: it is neither.
    """
    channels = _shape_of(shapes, "conv2.weight", 5, "VAE")[0]
    nested = any(name.startswith("encoder.downsamples.0.downsamples.") for name in shapes)
    kind: VaeKind = "2.2" if nested else "2.1"
    if channels != _LATENT_CHANNELS[kind]:
        raise UserError(
            f"the VAE has the structure of Wan {kind} but {channels} latent channels instead of {_LATENT_CHANNELS[kind]}; "
            "use the published Wan2.1_VAE.pth or Wan2.2_VAE.pth"
        )
    return kind


def vae_sizes(shapes: dict[str, Shape]) -> VaeSizes:
    """Read the sizes of a Wan VAE from its official names and shapes, and check every tensor against them.

    Raises:
        UserError: tensors are missing, unknown, or of shapes that do not belong together.
    """
    sizes = VaeSizes(
        kind=vae_kind(shapes),
        base_dim=_shape_of(shapes, "encoder.conv1.weight", 5, "VAE")[0],
        decoder_base_dim=_shape_of(shapes, "decoder.head.0.gamma", 4, "VAE")[0],
    )
    _check_against(shapes, expected_vae_shapes(sizes), f"Wan {sizes.kind} VAE")
    return sizes


def _encoder_levels(shapes: dict[str, Shape], sizes: VaeSizes) -> None:
    index, width = 0, sizes.base_dim
    for level, factor in enumerate(_WIDTH_FACTORS):
        out_width = sizes.base_dim * factor
        is_last = level == len(_WIDTH_FACTORS) - 1
        for position in range(_NUM_RES_BLOCKS + (0 if is_last else 1)):
            nested = f"encoder.downsamples.{level}.downsamples.{position}"
            name = nested if sizes.kind == "2.2" else f"encoder.downsamples.{index}"
            index += 1
            if position < _NUM_RES_BLOCKS:
                _residual_block(shapes, name, width, out_width)
                width = out_width
                continue
            _conv(shapes, f"{name}.resample.1", width, width, (3, 3))
            if _TEMPORAL_DOWNSAMPLE[level]:
                _conv(shapes, f"{name}.time_conv", width, width, (3, 1, 1))


def _decoder_levels(shapes: dict[str, Shape], sizes: VaeSizes) -> None:
    index, width = 0, sizes.decoder_base_dim * _WIDTH_FACTORS[-1]
    for level, factor in enumerate(reversed(_WIDTH_FACTORS)):
        out_width = sizes.decoder_base_dim * factor
        is_last = level == len(_WIDTH_FACTORS) - 1
        for position in range(_NUM_RES_BLOCKS + 1 + (0 if is_last else 1)):
            nested = f"decoder.upsamples.{level}.upsamples.{position}"
            name = nested if sizes.kind == "2.2" else f"decoder.upsamples.{index}"
            index += 1
            if position <= _NUM_RES_BLOCKS:
                _residual_block(shapes, name, width, out_width)
                width = out_width
                continue
            # 2.1 halves the width while it enlarges the picture, 2.2 in the next level's first block.
            resampled = width if sizes.kind == "2.2" else width // 2
            _conv(shapes, f"{name}.resample.1", resampled, width, (3, 3))
            if _TEMPORAL_DOWNSAMPLE[::-1][level]:
                _conv(shapes, f"{name}.time_conv", 2 * width, width, (3, 1, 1))
            width = resampled


def _residual_block(shapes: dict[str, Shape], name: str, in_width: int, out_width: int) -> None:
    shapes[f"{name}.residual.0.gamma"] = (in_width, 1, 1, 1)
    _conv(shapes, f"{name}.residual.2", out_width, in_width, (3, 3, 3))
    shapes[f"{name}.residual.3.gamma"] = (out_width, 1, 1, 1)
    _conv(shapes, f"{name}.residual.6", out_width, out_width, (3, 3, 3))
    if in_width != out_width:
        _conv(shapes, f"{name}.shortcut", out_width, in_width, (1, 1, 1))


def _middle(shapes: dict[str, Shape], name: str, width: int) -> None:
    _residual_block(shapes, f"{name}.0", width, width)
    shapes[f"{name}.1.norm.gamma"] = (width, 1, 1)
    _conv(shapes, f"{name}.1.to_qkv", 3 * width, width, (1, 1))
    _conv(shapes, f"{name}.1.proj", width, width, (1, 1))
    _residual_block(shapes, f"{name}.2", width, width)


def _head(shapes: dict[str, Shape], name: str, width: int, out_channels: int) -> None:
    shapes[f"{name}.0.gamma"] = (width, 1, 1, 1)
    _conv(shapes, f"{name}.2", out_channels, width, (3, 3, 3))


def _conv(shapes: dict[str, Shape], name: str, out_channels: int, in_channels: int, kernel: Shape) -> None:
    shapes[f"{name}.weight"] = (out_channels, in_channels, *kernel)
    shapes[f"{name}.bias"] = (out_channels,)


def _shape_of(shapes: dict[str, Shape], name: str, num_dims: int, what: str) -> Shape:
    if name not in shapes:
        raise UserError(f"{name} is missing, so this is not a {what} with official tensor names")
    if len(shapes[name]) != num_dims:
        raise UserError(f"{name} is {list(shapes[name])}; in a {what} it has {num_dims} dimensions")
    return shapes[name]


def _check_against(shapes: dict[str, Shape], expected: dict[str, Shape], what: str) -> None:
    mismatch = describe_mismatch(shapes, expected)
    if mismatch:
        raise UserError(f"the tensors are not those of a {what}: {mismatch}")
