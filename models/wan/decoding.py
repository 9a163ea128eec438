"""Latents to pictures: whole where memory allows it, in tiles where not."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from models.wan.denoisers import free_memory
from models.wan.vae import WanVae
from utils.errors import UserError

Tiling = Literal["auto", "always", "never"]
# What torch says on a CPU, where it has no type of its own for it.
_CPU_WORDS = ("can't allocate memory", "not enough memory", "DefaultCPUAllocator")


def decode_latents(
    vae: WanVae,
    latents_BCFHW: Tensor,
    tiling: Tiling = "auto",
    say: Callable[[str], None] = lambda text: None,
) -> Tensor:
    """Videos of normalised latents, on the CPU: [B, 3, 4 * (F - 1) + 1, H * stride, W * stride] in [-1, 1], one by one.

    Args:
        vae: to decode with.
        latents_BCFHW: of `sample_latents`.
        tiling: "auto" decodes whole, and in tiles once memory does not suffice, which it says.
        say: hears that.

    Raises:
        UserError: there is not enough memory for tiles either, or with "never" not for the whole.
    """
    videos, is_tiled = [], tiling == "always"
    for latents_CFHW in latents_BCFHW:
        one = latents_CFHW.unsqueeze(0)
        if not is_tiled:
            video = _whole(vae, one)
            if video is not None:
                videos.append(video)
                continue
            if tiling == "never":
                raise UserError(
                    f"{_too_large(one)}; decode with --tiling auto, or ask for fewer frames or a smaller size"
                )
            free_memory(vae.device)
            say(
                f"warning: {_too_large(one)}, so it is decoded in tiles, which differ a little from the whole "
                "(--tiling always saves the attempt)"
            )
            is_tiled = True
        videos.append(_in_tiles(vae, one))
    return torch.cat(videos)


def _whole(vae: WanVae, latents: Tensor) -> Tensor | None:
    """The video; None where there is not enough memory. The error, which holds on to tensors, is gone by then."""
    try:
        return vae.decode(latents).cpu()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None


def _in_tiles(vae: WanVae, latents: Tensor) -> Tensor:
    try:
        with vae.tiling():
            return vae.decode(latents).cpu()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = f"{_too_large(latents)}, not even in tiles"
        raise UserError(f"{reason}; ask for fewer frames, or decode with --device cpu") from None


def _too_large(latents: Tensor) -> str:
    frames, height, width = latents.shape[2:]
    return (
        f"there is not enough memory to decode {frames} x {height} x {width} latents (frames, height, width)"
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says that a GPU's or the machine's memory does not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _CPU_WORDS)
