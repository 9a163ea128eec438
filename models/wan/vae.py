"""The VAE of Wan 2.1 and 2.2, through `diffusers`' AutoencoderKLWan, loaded from the official tensor names.

With schedulers.py the only door to `diffusers`, and the only place of the latent statistics. Shapes: B batch, C channels,
F frames, H height, W width; a video has 4n+1 frames of 3 channels in [-1, 1], its latents have n+1 frames.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from models.wan.arch import VaeKind
from models.wan.checkpoint import open_vae
from models.wan.component_shapes import VaeSizes, vae_sizes
from models.wan.names import vae_to_diffusers
from utils.errors import UserError

_FRAME_STRIDE = 4
_PIXEL_STRIDES: dict[VaeKind, int] = {"2.1": 8, "2.2": 16}


@dataclass(frozen=True)
class LatentStats:
    """Mean and standard deviation of each latent channel: normalised latent = (posterior mean - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


# Published with the models: `wan/modules/vae2_1.py` and `vae2_2.py` of the official repository.
# fmt: off
LATENT_STATS: dict[VaeKind, LatentStats] = {
    "2.1": LatentStats(
        mean=(
            -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
        ),
        std=(
            2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
            3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
        ),
    ),
    "2.2": LatentStats(
        mean=(
            -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
            -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
            -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
            -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
            -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
            0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
        ),
        std=(
            0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
            0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
            0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
            0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
            0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
            0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
        ),
    ),
}
# fmt: on


class WanVae:
    """Videos to normalised latents and back, without gradients. Weights and convolutions are in `dtype`, statistics in float32."""

    def __init__(self, module: Any, kind: VaeKind, dtype: torch.dtype, device: torch.device) -> None:
        self._module = module
        self._dtype = dtype
        self._device = torch.device(device)
        self.kind: VaeKind = kind
        self.stride = (_FRAME_STRIDE, _PIXEL_STRIDES[kind], _PIXEL_STRIDES[kind])
        stats = LATENT_STATS[kind]
        self.latent_channels = len(stats.mean)
        self._mean_C = torch.tensor(stats.mean, dtype=torch.float32, device=device)
        self._std_C = torch.tensor(stats.std, dtype=torch.float32, device=device)

    def encode(self, video_BCFHW: Tensor) -> Tensor:
        """Normalised latents of a video: the posterior's mean (never a sample), minus the mean, over the deviation.

        Args:
            video_BCFHW: values in [-1, 1], 3 channels, 4n+1 frames, height and width multiples of the stride.

        Returns:
            float32 latents of shape [B, latent_channels, n+1, H / stride, W / stride].

        Raises:
            ValueError: a shape that the VAE would cut or refuse.
        """
        self._check_video(tuple(video_BCFHW.shape))
        with torch.no_grad():
            posterior = self._module.encode(video_BCFHW.to(self._device, self._dtype)).latent_dist
            return (posterior.mode().float() - self._per_channel(self._mean_C)) / self._per_channel(
                self._std_C
            )

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Video of normalised latents, float32, clamped to [-1, 1]: [B, 3, 4 * (F - 1) + 1, H * stride, W * stride].

        Raises:
            ValueError: the latents have the wrong number of channels or dimensions.
        """
        shape = tuple(latents_BCFHW.shape)
        if len(shape) != 5 or shape[1] != self.latent_channels:
            raise ValueError(
                f"latents of the Wan {self.kind} VAE are [B, {self.latent_channels}, F, H, W], not {list(shape)}"
            )
        with torch.no_grad():
            latents = latents_BCFHW.to(self._device, torch.float32)
            latents = latents * self._per_channel(self._std_C) + self._per_channel(self._mean_C)
            return self._module.decode(latents.to(self._dtype)).sample.float().clamp(-1.0, 1.0)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._device

    @contextmanager
    def tiling(self) -> Iterator[None]:
        """Decode in overlapping tiles of 256 px for the body: less memory, and a little other pixels.

        The attention in the middle of the decoder sees one tile, so tiles differ from the whole everywhere, not only where
        they meet.
        """
        self._module.enable_tiling()
        try:
            yield
        finally:
            self._module.disable_tiling()

    def to(self, device: torch.device) -> Self:
        """Move weights and statistics; returns itself."""
        self._device = torch.device(device)
        self._module.to(device)
        self._mean_C, self._std_C = self._mean_C.to(device), self._std_C.to(device)
        return self

    def _per_channel(self, values_C: Tensor) -> Tensor:
        return values_C.view(1, -1, 1, 1, 1)

    def _check_video(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 5 or shape[1] != 3:
            raise ValueError(f"a video is [B, 3, F, H, W], not {list(shape)}")
        frames, height, width = shape[2:]
        # diffusers drops frames beyond 4n+1 without a word.
        if frames % _FRAME_STRIDE != 1 or height % self.stride[1] or width % self.stride[2]:
            raise ValueError(
                f"{frames} frames of {height} x {width} px do not fit the Wan {self.kind} VAE: "
                f"it takes 4n+1 frames and multiples of {self.stride[1]} px"
            )


def load_vae(path: Path, dtype: torch.dtype, device: torch.device) -> WanVae:
    """Load a VAE, as `open_vae` opens it; kind and sizes follow from the tensor shapes.

    Raises:
        UserError: the file is missing or damaged, or its tensors are not those of a Wan 2.1 or 2.2 VAE.
    """
    from diffusers import AutoencoderKLWan  # takes seconds, and only the cache needs it

    source = open_vae(path)
    try:
        sizes = vae_sizes(source.shapes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    with torch.device("meta"):
        module = AutoencoderKLWan(**_diffusers_config(sizes))
    # Copies: a view of the mapped file would change with the file, and its alignment changes the last bits of results.
    state = {
        renamed: source.get(name).to(device=device, dtype=dtype, copy=True)
        for name, renamed in vae_to_diffusers(source.shapes, sizes.kind).items()
    }
    module.load_state_dict(state, strict=True, assign=True)
    return WanVae(module.eval().requires_grad_(False), sizes.kind, dtype, device)


def build_vae(sizes: VaeSizes) -> Any:
    """An AutoencoderKLWan of these sizes with the library's random weights, as a module that can be trained."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**_diffusers_config(sizes))


def _diffusers_config(sizes: VaeSizes) -> dict[str, Any]:
    """Constructor arguments of AutoencoderKLWan, as in the `vae/config.json` of the published diffusers repositories."""
    stats = LATENT_STATS[sizes.kind]
    config: dict[str, Any] = {
        "base_dim": sizes.base_dim,
        "decoder_base_dim": sizes.decoder_base_dim,
        "z_dim": sizes.latent_channels,
        "latents_mean": list(stats.mean),
        "latents_std": list(stats.std),
        "scale_factor_spatial": _PIXEL_STRIDES[sizes.kind],
    }
    if sizes.kind == "2.2":
        config |= {
            "is_residual": True,
            "patch_size": 2,
            "in_channels": sizes.pixel_channels,
            "out_channels": sizes.pixel_channels,
        }
    return config
