"""A tiny checkpoint rewritten in the other layouts in which Wan 2.2 is handed on, with the same weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.wan.arch import WanArch, load_arch
from models.wan.checkpoint import (
    TEXT_ENCODER_FILE,
    TOKENIZER_DIR,
    open_text_encoder,
    open_transformer,
    open_vae,
)
from models.wan.component_shapes import vae_kind
from models.wan.names import dit_to_diffusers, umt5_to_hf, vae_to_diffusers
from utils.tensor_source import TensorSource

INDEX = "diffusion_pytorch_model.safetensors.index.json"


def as_diffusers_config(arch: WanArch) -> dict[str, Any]:
    """`transformer/config.json` of a diffusers directory."""
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.35.0",
        "added_kv_proj_dim": None,
        "attention_head_dim": arch.head_dim,
        "cross_attn_norm": True,
        "eps": arch.eps,
        "ffn_dim": arch.ffn_dim,
        "freq_dim": arch.freq_dim,
        "image_dim": None,
        "in_channels": arch.in_dim,
        "num_attention_heads": arch.num_heads,
        "num_layers": arch.num_layers,
        "out_channels": arch.out_dim,
        "patch_size": [1, 2, 2],
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": arch.text_dim,
    }


def tensors_of(source: TensorSource) -> dict[str, Tensor]:
    """Copies of all tensors of a source."""
    return {name: source.get(name).clone() for name in source.shapes}


def dit_places(official: Path) -> dict[str, Path]:
    """The DiTs of an official checkpoint by their folder in diffusers."""
    if (official / "high_noise_model").is_dir():
        return {"transformer": official / "high_noise_model", "transformer_2": official / "low_noise_model"}
    return {"transformer": official}


def vae_place(official: Path) -> Path:
    """The VAE of an official checkpoint."""
    (place,) = official.glob("*_VAE.pth")
    return place


def write_diffusers(official: Path, root: Path) -> Path:
    """The checkpoint as a diffusers directory: two shards with an index for each DiT, one file for the rest."""
    root.mkdir(parents=True)
    for folder, place in dit_places(official).items():
        source = open_transformer(place)
        arch = load_arch(place / "config.json", source.shapes)
        write_shards(
            root / folder, {dit_to_diffusers(name): one for name, one in tensors_of(source).items()}, INDEX
        )
        (root / folder / "config.json").write_text(json.dumps(as_diffusers_config(arch)))
    text = tensors_of(open_text_encoder(official / TEXT_ENCODER_FILE))
    write_shards(
        root / "text_encoder",
        {umt5_to_hf(name): one for name, one in text.items()},
        "model.safetensors.index.json",
    )
    (root / "text_encoder" / "config.json").write_text('{"model_type": "umt5", "d_model": 64}')
    vae = tensors_of(open_vae(vae_place(official)))
    kind = vae_kind({name: tuple(one.shape) for name, one in vae.items()})
    renamed = vae_to_diffusers(vae, kind)
    (root / "vae").mkdir()
    save_file(
        {renamed[name]: one for name, one in vae.items()}, root / "vae/diffusion_pytorch_model.safetensors"
    )
    (root / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLWan", "z_dim": 16}')
    shutil.copytree(official / TOKENIZER_DIR, root / "tokenizer")
    (root / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return root


def write_shards(folder: Path, tensors: dict[str, Tensor], index: str) -> None:
    """Two shards and their index."""
    folder.mkdir()
    names, weight_map = sorted(tensors), {}
    stem = index.partition(".")[0]
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"{stem}-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    total = sum(one.nbytes for one in tensors.values())
    (folder / index).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def write_comfyui(official: Path, root: Path, prefix: str = "model.diffusion_model.") -> Path:
    """The checkpoint as ComfyUI's folders of single files; the tokenizer is inside the encoder's file."""
    for folder in ("diffusion_models", "text_encoders", "vae"):
        (root / folder).mkdir(parents=True)
    for folder, place in dit_places(official).items():
        is_alone = len(dit_places(official)) == 1
        name = "ti2v_5B" if is_alone else f"t2v_{'low' if folder == 'transformer_2' else 'high'}_noise_14B"
        dit = {f"{prefix}{key}": one for key, one in tensors_of(open_transformer(place)).items()}
        save_file(dit, root / "diffusion_models" / f"wan2.2_{name}_fp32.safetensors")
        # Only tiny sizes need it; the published ones are known by their shapes.
        shutil.copy(place / "config.json", root / "diffusion_models" / "config.json")
    text = tensors_of(open_text_encoder(official / TEXT_ENCODER_FILE))
    spiece = (official / TOKENIZER_DIR / "spiece.model").read_bytes()
    save_file(
        {umt5_to_hf(name): one for name, one in text.items()}
        | {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)},
        root / "text_encoders" / "umt5_xxl_bf16.safetensors",
    )
    save_file(tensors_of(open_vae(vae_place(official))), root / "vae" / "wan_vae.safetensors")
    return root
