"""The one map between the official tensor names of Wan 2.2 and those of the Hugging Face libraries.

Pure functions on names, by rule, for any depth and width; no torch. "Official" is the naming of the published
checkpoints and of everything in this project. Official modules (`blocks.0.ffn.2`) are accepted as well as tensors
(`blocks.0.ffn.2.weight`) where a function says so. Source of the correspondences: the published key lists of both sides.
"""

import re
from collections.abc import Iterable

from models.wan.arch import VaeKind
from utils.errors import UserError

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_LEAF = re.compile(r"(.+)\.(weight|bias)")

_UMT5_GLOBAL = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
_UMT5_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_HF_UMT5_BLOCK = re.compile(r"encoder\.block\.(\d+)\.(.+)")
# transformers registers the token table a second time, under the encoder.
_HF_UMT5_TIED = "encoder.embed_tokens"

_DIT_GLOBAL = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_DIT_BLOCK = {
    "modulation": "scale_shift_table",
    # diffusers numbers the norms in the order they are applied, Wan in the order they were written:
    # norm1 before self-attention, norm3 before cross-attention, norm2 before the feed-forward.
    "norm1": "norm1",
    "norm2": "norm3",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
} | {
    f"{official}.{projection}": f"{diffusers}.{renamed}"
    for official, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for projection, renamed in (
        ("q", "to_q"),
        ("k", "to_k"),
        ("v", "to_v"),
        ("o", "to_out.0"),
        ("norm_q", "norm_q"),
        ("norm_k", "norm_k"),
    )
}

_VAE_GLOBAL = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    "encoder.conv1": "encoder.conv_in",
    "decoder.conv1": "decoder.conv_in",
    "encoder.head.0": "encoder.norm_out",
    "decoder.head.0": "decoder.norm_out",
    "encoder.head.2": "encoder.conv_out",
    "decoder.head.2": "decoder.conv_out",
}
_VAE_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_VAE_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_VAE_ATTENTION = ("norm", "to_qkv", "proj")
_VAE_RESAMPLE = ("resample.1", "time_conv")
_VAE_LEAF = re.compile(r"(.+)\.(weight|bias|gamma)")
_VAE_IN_MIDDLE = re.compile(r"(encoder|decoder)\.middle\.([012])\.(.+)")
_VAE_FLAT_LEVEL = re.compile(r"(?:encoder\.downsamples|decoder\.upsamples)\.(\d+)\.(.+)")
_VAE_NESTED_LEVEL = re.compile(
    r"(encoder|decoder)\.(?:down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.(.+)"
)


def umt5_to_hf(name: str) -> str:
    """Name in `transformers`' UMT5EncoderModel of an official UMT5 tensor or module.

    Raises:
        UserError: no such tensor exists in the official encoder.
    """
    module, leaf = _split_leaf(name)
    block = _BLOCK.fullmatch(module)
    if block and block[2] in _UMT5_BLOCK:
        return f"encoder.block.{block[1]}.{_UMT5_BLOCK[block[2]]}{leaf}"
    if module in _UMT5_GLOBAL:
        return _UMT5_GLOBAL[module] + leaf
    raise UserError(f"{name}: not the official name of a tensor of the UMT5 encoder")


def umt5_to_official(name: str) -> str:
    """Official name of a tensor or module of `transformers`' UMT5EncoderModel (both names of the tied token table).

    Raises:
        UserError: no such tensor exists in `transformers`' encoder.
    """
    module, leaf = _split_leaf(name)
    if module == _HF_UMT5_TIED:
        module = _UMT5_GLOBAL["token_embedding"]
    block = _HF_UMT5_BLOCK.fullmatch(module)
    if block and block[2] in _HF_TO_UMT5_BLOCK:
        return f"blocks.{block[1]}.{_HF_TO_UMT5_BLOCK[block[2]]}{leaf}"
    if module in _HF_TO_UMT5_GLOBAL:
        return _HF_TO_UMT5_GLOBAL[module] + leaf
    raise UserError(f"{name}: not the Hugging Face name of a tensor of the UMT5 encoder")


def dit_to_diffusers(name: str) -> str:
    """Name in `diffusers`' WanTransformer3DModel of an official DiT tensor or module.

    Raises:
        UserError: no such tensor exists in the official DiT of Wan 2.2.
    """
    return _rename_dit(name, _DIT_GLOBAL, _DIT_BLOCK, "the official name of a tensor of the Wan 2.2 DiT")


def dit_to_official(name: str) -> str:
    """Official name of a tensor or module of `diffusers`' WanTransformer3DModel.

    Raises:
        UserError: no such tensor exists in the DiT of Wan 2.2 under diffusers.
    """
    return _rename_dit(
        name,
        _DIFFUSERS_TO_DIT_GLOBAL,
        _DIFFUSERS_TO_DIT_BLOCK,
        "diffusers' name of a tensor of the Wan 2.2 DiT",
    )


def vae_to_diffusers(names: Iterable[str], kind: VaeKind) -> dict[str, str]:
    """Names in `diffusers`' AutoencoderKLWan of all official tensors of a Wan VAE.

    The whole list is needed: Wan 2.1 numbers the decoder's blocks through, and only the list tells where a level ends.

    Args:
        names: every official tensor name of the VAE.
        kind: "2.1" (flat numbering of levels) or "2.2" (nested).

    Raises:
        UserError: a name belongs to no VAE of this kind.
    """
    names = list(names)
    level_ends = sorted(
        {int(m[1]) for name in names if (m := re.match(r"decoder\.upsamples\.(\d+)\.resample\.", name))}
    )
    return {name: _rename_vae(name, kind, level_ends) for name in names}


def _split_leaf(name: str) -> tuple[str, str]:
    """Module path, and ".weight", ".bias" or nothing."""
    match = _LEAF.fullmatch(name)
    return (match[1], f".{match[2]}") if match else (name, "")


def _rename_dit(name: str, whole: dict[str, str], in_block: dict[str, str], what: str) -> str:
    module, leaf = _split_leaf(name)
    block = _BLOCK.fullmatch(module)
    if block and block[2] in in_block:
        return f"blocks.{block[1]}.{in_block[block[2]]}{leaf}"
    if module in whole:
        return whole[module] + leaf
    raise UserError(f"{name}: not {what}")


def _rename_vae(name: str, kind: VaeKind, level_ends: list[int]) -> str:
    match = _VAE_LEAF.fullmatch(name)
    renamed = _rename_vae_module(match[1], kind, level_ends) if match else None
    if match is None or renamed is None:
        raise UserError(f"{name}: not the official name of a tensor of the Wan {kind} VAE")
    return f"{renamed}.{match[2]}"


def _rename_vae_module(module: str, kind: VaeKind, level_ends: list[int]) -> str | None:
    if module in _VAE_GLOBAL:
        return _VAE_GLOBAL[module]
    if middle := _VAE_IN_MIDDLE.fullmatch(module):
        side, position, rest = middle.groups()
        inner = (rest if rest in _VAE_ATTENTION else None) if position == "1" else _VAE_RESIDUAL.get(rest)
        return f"{side}.mid_block.{_VAE_MIDDLE[position]}.{inner}" if inner else None
    if kind == "2.2":
        return _rename_nested_level(module)
    return _rename_flat_level(module, level_ends)


def _rename_nested_level(module: str) -> str | None:
    match = _VAE_NESTED_LEVEL.fullmatch(module)
    if match is None:
        return None
    side, level, position, rest = match.groups()
    direction = "down" if side == "encoder" else "up"
    block = f"{side}.{direction}_blocks.{level}"
    if rest in _VAE_RESIDUAL:
        return f"{block}.resnets.{position}.{_VAE_RESIDUAL[rest]}"
    return f"{block}.{direction}sampler.{rest}" if rest in _VAE_RESAMPLE else None


def _rename_flat_level(module: str, level_ends: list[int]) -> str | None:
    match = _VAE_FLAT_LEVEL.fullmatch(module)
    if match is None:
        return None
    index, rest = int(match[1]), match[2]
    if rest not in _VAE_RESIDUAL and rest not in _VAE_RESAMPLE:
        return None
    if module.startswith("encoder"):
        return f"encoder.down_blocks.{index}.{_VAE_RESIDUAL.get(rest, rest)}"
    level = sum(end < index for end in level_ends)
    if rest in _VAE_RESAMPLE:
        return f"decoder.up_blocks.{level}.upsamplers.0.{rest}"
    start = level_ends[level - 1] + 1 if level else 0
    return f"decoder.up_blocks.{level}.resnets.{index - start}.{_VAE_RESIDUAL[rest]}"


def _inverse(table: dict[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}


_HF_TO_UMT5_GLOBAL = _inverse(_UMT5_GLOBAL)
_HF_TO_UMT5_BLOCK = _inverse(_UMT5_BLOCK)
_DIFFUSERS_TO_DIT_GLOBAL = _inverse(_DIT_GLOBAL)
_DIFFUSERS_TO_DIT_BLOCK = _inverse(_DIT_BLOCK)
