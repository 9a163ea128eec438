"""Writing what encoder_ft trains: UMT5 in a file that other programs load."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.wan.checkpoint import TensorSource, text_encoder_sizes
from models.wan.layers import TEXT_PREFIX
from models.wan.names import umt5_to_hf
from models.wan.text_encoder import umt5_config

TEXT_ENCODER_WEIGHTS = "text_encoder.safetensors"
TEXT_ENCODER_CONFIG = "config.json"


def save_text_encoder(
    trained: Mapping[str, Tensor],
    base: TensorSource,
    dtype: torch.dtype,
    directory: Path,
    metadata: Mapping[str, str],
    *,
    full: bool,
) -> list[Path]:
    """Write `text_encoder.safetensors` and its `config.json`, under Hugging Face names.

    Args:
        trained: trained parameters by global name.
        base: the encoder that training started from, official names.
        dtype: of the file; the compute dtype, which is the precision that the encoder was trained to run in.
        directory: where to write.
        metadata: goes into the file's header.
        full: also the tensors that did not train, so that the file is a whole encoder.
    """
    tensors = {
        name.removeprefix(TEXT_PREFIX): tensor.to(dtype).contiguous() for name, tensor in trained.items()
    }
    if full:
        for official in base.shapes:
            name = umt5_to_hf(official)
            if name not in tensors:
                tensors[name] = base.get(official).to(dtype).contiguous()
    weights = directory / TEXT_ENCODER_WEIGHTS
    save_file(tensors, weights, metadata=dict(metadata))
    config = umt5_config(text_encoder_sizes(base.shapes)).to_dict() | {"architectures": ["UMT5EncoderModel"]}
    description = directory / TEXT_ENCODER_CONFIG
    description.write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
    return [weights, description]
