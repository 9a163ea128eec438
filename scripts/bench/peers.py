"""The peers that benchmarks hold this project against: the versions that are named, and diffusers' DiT with our weights.

A peer that is not installed, or of another version, is skipped with a line that says so: its numbers would be those of
something else. The adapters on both sides are `peft`'s, so there is no other LoRA layer to compare with.
"""

from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from models.wan.arch import WanArch
from models.wan.names import dit_to_diffusers

# The versions of constraints.txt.
NAMED = {"diffusers": "0.42.1", "transformers": "5.23.0", "peft": "0.21.2"}


def why_not(name: str) -> str | None:
    """Why a peer cannot be compared with, as a line to show; None where it can."""
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name}: skipped, it is not installed (named is {NAMED[name]})"
    if found != NAMED[name]:
        return f"{name}: skipped, version {found} is installed and {NAMED[name]} is named"
    return None


def build_peer_dit(
    arch: WanArch, state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> Any:
    """diffusers' `WanTransformer3DModel`, frozen, with weights given under official names.

    As `from_pretrained(torch_dtype=dtype)` loads it: everything in `dtype` but for what it keeps in float32 (time embedder,
    modulation table, norms).
    """
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=arch.num_heads,
            attention_head_dim=arch.head_dim,
            in_channels=arch.in_dim,
            out_channels=arch.out_dim,
            text_dim=arch.text_dim,
            freq_dim=arch.freq_dim,
            ffn_dim=arch.ffn_dim,
            num_layers=arch.num_layers,
            eps=arch.eps,
        )
    kept = tuple(WanTransformer3DModel._keep_in_fp32_modules or ())

    def typed(name: str, tensor: Tensor) -> Tensor:
        wide = any(part in name.split(".") for part in kept)
        # A copy: mapped or shared memory is aligned differently, which changes the last bits.
        return tensor.to(device, torch.float32 if wide else dtype, copy=True)

    renamed = {dit_to_diffusers(name): tensor for name, tensor in state.items()}
    model.load_state_dict(
        {name: typed(name, tensor) for name, tensor in renamed.items()}, strict=True, assign=True
    )
    # Its rotary table is made in the constructor, which here was on no device.
    rope = model.rope
    with torch.device(device):
        model.rope = type(rope)(arch.head_dim, rope.patch_size, rope.max_seq_len)
    return model.eval().requires_grad_(False)


def build_peer_block(arch: WanArch, dtype: torch.dtype) -> Any:
    """One block of the same on the current device, with weights of no particular value: to count what it does."""
    from diffusers import WanTransformer3DModel
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    block = WanTransformerBlock(
        arch.dim, arch.ffn_dim, arch.num_heads, "rms_norm_across_heads", True, arch.eps, None
    )
    kept = tuple(WanTransformer3DModel._keep_in_fp32_modules or ())
    for name, parameter in block.named_parameters():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)
    return block.eval().requires_grad_(False)
