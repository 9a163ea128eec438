"""diffusers' own modules of Wan 2.2 with the weights of our checkpoints: what parity is measured against."""

import csv
import gzip
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

from models.wan.arch import WanArch
from models.wan.vae import LATENT_STATS

KEYS = Path(__file__).resolve().parents[1] / "assets" / "keys"
# The constructor's arguments as in the `vae/config.json` of the published diffusers repositories, made narrower.
VAE_CONFIGS = {
    "2.1": {"base_dim": 8},
    "2.2": {
        "base_dim": 8,
        "decoder_base_dim": 16,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": list(LATENT_STATS["2.2"].mean),
        "latents_std": list(LATENT_STATS["2.2"].std),
    },
}


def published_vae_names(kind: str) -> dict[str, str]:
    """diffusers' name by official name, as published; a narrow VAE has the same tensors."""
    with gzip.open(KEYS / f"wan{kind.replace('.', '')}_vae_keys.csv.gz", "rt", encoding="utf-8") as file:
        return {row[0]: row[1] for row in list(csv.reader(file))[1:]}


def build_transformer(arch: WanArch, state: Mapping[str, Tensor]) -> WanTransformer3DModel:
    """diffusers' DiT, its weights converted from official names by diffusers' own converter; frozen."""
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
    model.load_state_dict(convert_wan_transformer_to_diffusers(dict(state)), strict=True)
    return model.eval().requires_grad_(False)


def exact_timesteps(self, timesteps: Tensor) -> Tensor:
    """`Timesteps.forward` of diffusers in float64: so that what is compared is not the rounding of the timestep."""
    half = self.num_channels // 2
    angles = timesteps.double()[:, None] / 10000 ** (torch.arange(half, dtype=torch.float64) / half)
    return torch.cat((torch.cos(angles), torch.sin(angles)), dim=1).float()
