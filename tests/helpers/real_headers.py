"""Checkpoints whose DiT has a published model's real header and no data: a few kilobytes on disk each."""

import json
from pathlib import Path

from models.wan.arch import VARIANTS, WanArch, expected_shapes
from utils.sparse_weights import write_sparse_safetensors

# The published config.json of each; parameters of one DiT.
SIZES = {
    "ti2v-5b": {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30},
    "t2v-a14b": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
    "i2v-a14b": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
}
PARAMETERS = {"ti2v-5b": "5.00 B", "t2v-a14b": "14.29 B", "i2v-a14b": "14.29 B"}


def published_arch(variant: str) -> WanArch:
    """The sizes of a published DiT."""
    info = VARIANTS[variant]
    return WanArch(
        model_type=info.model_type,
        freq_dim=256,
        in_dim=info.in_dim,
        out_dim=info.out_dim,
        text_len=512,
        eps=1e-6,
        text_dim=4096,
        **SIZES[variant],
    )


def write_real_dit(root: Path, variant: str) -> Path:
    """The DiT (or both) of a variant in the official layout, and nothing else of the checkpoint."""
    arch = published_arch(variant)
    experts = ("high_noise_model", "low_noise_model") if VARIANTS[variant].has_experts else (".",)
    for expert in experts:
        folder = root / expert
        folder.mkdir(parents=True, exist_ok=True)
        write_sparse_safetensors(folder / "diffusion_pytorch_model.safetensors", expected_shapes(arch))
        (folder / "config.json").write_text(json.dumps(arch.to_config_json()), encoding="utf-8")
    return root
