"""The trained tiny Wan: written as bfloat16 safetensors, read again, and turned into the official layout."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.wan.arch import WanArch, load_arch
from models.wan.checkpoint import (
    EXPERT_DIRS,
    TEXT_ENCODER_FILE,
    TOKENIZER_DIR,
    VAE_FILES,
    open_text_encoder,
    open_transformer,
)
from models.wan.names import umt5_to_official
from models.wan.text_encoder import load_umt5
from models.wan.transformer import WanTransformer
from models.wan.vae import WanVae, load_vae
from scripts.make_tiny_wan import NUM_SHARDS, write_dit, write_json
from scripts.tiny_world.tokens import Tokens, write_tokenizer_files
from utils.errors import UserError
from utils.files import atomic_directory

ASSET = Path(__file__).resolve().parents[2] / "tests" / "assets" / "tiny_wan"
DIT_FILE, UMT5_FILE, VAE_FILE = "dit.safetensors", "text_encoder.safetensors", "vae.safetensors"
CONFIG_FILE, QUALITY_FILE = "config.json", "quality.json"
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class TinyWan:
    """The whole model in float32 on the CPU, loaded through the project's own reading of the official layout."""

    tokens: Tokens
    umt5: nn.Module
    dit: WanTransformer
    vae: WanVae


def rounded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights as the asset holds them."""
    return {name: value.detach().to(torch.bfloat16).contiguous() for name, value in state.items()}


def write_vae(state: dict[str, Tensor], directory: Path) -> WanVae:
    """Write the asset's VAE and load it as everything after it will see it."""
    save_file(rounded(state), directory / VAE_FILE, metadata={"format": "pt"})
    return load_vae(directory / VAE_FILE, torch.float32, _CPU)


def write_text_and_dit(umt5: nn.Module, dit: WanTransformer, directory: Path) -> None:
    """Write the asset's text encoder (official names, the tied table once) and DiT."""
    encoder = {umt5_to_official(name): value for name, value in umt5.state_dict().items()}
    save_file(rounded(encoder), directory / UMT5_FILE, metadata={"format": "pt"})
    save_file(rounded(dict(dit.state_dict())), directory / DIT_FILE, metadata={"format": "pt"})
    write_json(directory / CONFIG_FILE, dit.arch.to_config_json())


def write_official(asset: Path, out: Path) -> WanArch:
    """Write a checkpoint in the official layout of T2V-A14B from the asset, or nothing; returns the DiT's sizes.

    The one DiT that was trained stands in for both experts: it knows all noise levels.

    Raises:
        UserError: the asset is not there or not whole; `out` exists and is not an empty directory.
    """
    wanted = (DIT_FILE, UMT5_FILE, VAE_FILE, CONFIG_FILE)
    missing = [name for name in wanted if not (asset / name).is_file()]
    if missing:
        raise UserError(
            f"{asset}: has no {', '.join(missing)}, which is the trained tiny Wan; restore it from the repository, or "
            "make it anew with `make tiny-world` (an hour of one core)"
        )
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    dit, umt5, vae = (load_file(asset / name) for name in (DIT_FILE, UMT5_FILE, VAE_FILE))
    arch = load_arch(asset / CONFIG_FILE, {name: tuple(value.shape) for name, value in dit.items()})
    weights = {name: value.float() for name, value in dit.items()}
    with atomic_directory(out) as directory:
        for expert in EXPERT_DIRS.values():
            write_dit(directory / expert, arch, weights, NUM_SHARDS[arch.variant.name])
        torch.save(umt5, directory / TEXT_ENCODER_FILE)
        torch.save(
            {name: value.float() for name, value in vae.items()}, directory / VAE_FILES[arch.variant.vae_kind]
        )
        write_tokenizer_files(directory / TOKENIZER_DIR)
        write_json(
            directory / "configuration.json", {"framework": "Pytorch", "task": "text-to-video-synthesis"}
        )
    return arch


def load_official(directory: Path) -> TinyWan:
    """Load a checkpoint that `write_official` wrote."""
    dit_dir = directory / EXPERT_DIRS["high_noise"]
    source = open_transformer(dit_dir)
    arch = load_arch(dit_dir / CONFIG_FILE, source.shapes)
    dit = WanTransformer(arch)
    dit.load_state_dict({name: source.get(name) for name in source.shapes})
    return TinyWan(
        Tokens(directory / TOKENIZER_DIR),
        load_umt5(open_text_encoder(directory / TEXT_ENCODER_FILE), torch.float32, _CPU),
        dit.eval().requires_grad_(False),
        load_vae(directory / VAE_FILES[arch.variant.vae_kind], torch.float32, _CPU),
    )


def read_quality(asset: Path = ASSET) -> dict[str, Any]:
    """What was measured of the asset."""
    found: dict[str, Any] = json.loads((asset / QUALITY_FILE).read_text(encoding="utf-8"))
    return found
