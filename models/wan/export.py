"""Writing what encoder_ft trains: UMT5 in a file that other programs load, read again before it counts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.wan.checkpoint import (
    TEXT_ENCODER_FILE,
    TensorSource,
    open_text_encoder,
    open_text_encoder_part,
    text_encoder_sizes,
)
from models.wan.downloads import TEXT_ENCODER_WEIGHTS
from models.wan.layers import TEXT_PREFIX
from models.wan.names import umt5_to_hf, umt5_to_official
from models.wan.text_encoder import umt5_config
from models.wan.tokenizer_place import SPIECE_TENSOR, read_spiece
from utils.config.schema import TextEncoderFormat
from utils.errors import UserError
from utils.finite import all_finite

TEXT_ENCODER_CONFIG = "config.json"
# A `.pth` of plain tensors has no place for what the header of a `.safetensors` says.
PTH_METADATA = "text_encoder_metadata.json"


@dataclass(frozen=True)
class EncoderFormat:
    """How a tuned encoder is written.

    Attributes:
        name: `hf` (transformers' names), `official` (Wan's own), `official_pth` (those in the official `.pth`), `comfyui`
            (transformers' names and the tokenizer in one file).
        full: also the tensors that did not train, so that the file is a whole encoder.
        tokenizer: directory or file that has the SentencePiece model; read for `comfyui` alone.
    """

    name: TextEncoderFormat
    full: bool
    tokenizer: Path


def save_text_encoder(
    trained: Mapping[str, Tensor],
    base: TensorSource,
    dtype: torch.dtype,
    directory: Path,
    metadata: Mapping[str, str],
    how: EncoderFormat,
) -> list[Path]:
    """Write the encoder, and read it again.

    The files: `text_encoder.safetensors` or the official `.pth`; under transformers' names also `config.json`, beside a `.pth`
    its metadata as JSON.

    Args:
        trained: trained parameters by global name.
        base: the encoder that training started from, official names.
        dtype: of the file; the compute dtype, which is the precision that the encoder was trained to run in.
        directory: where to write.
        metadata: goes into the file's header.
        how: names and kind of file.

    Raises:
        UserError: what was written is not a sound encoder of the base's names and shapes.
    """
    tensors = {
        umt5_to_official(name.removeprefix(TEXT_PREFIX)): tensor.to(dtype).contiguous()
        for name, tensor in trained.items()
    }
    if how.full:
        tensors |= {
            name: base.get(name).to(dtype).contiguous() for name in base.shapes if name not in tensors
        }
    is_official = how.name in ("official", "official_pth")
    stored = tensors if is_official else {umt5_to_hf(name): tensor for name, tensor in tensors.items()}
    spiece = read_spiece(how.tokenizer) if how.name == "comfyui" else None
    if how.name == "official_pth":
        weights, description = directory / TEXT_ENCODER_FILE, directory / PTH_METADATA
        torch.save(_compact(stored), weights)
        _write_json(description, dict(metadata))
    else:
        weights, description = directory / TEXT_ENCODER_WEIGHTS, directory / TEXT_ENCODER_CONFIG
        extra = {} if spiece is None else {SPIECE_TENSOR: _as_tensor(spiece)}
        save_file({**stored, **extra}, weights, metadata=dict(metadata))
        if not is_official:  # beside official names it would be taken for the DiT's
            config = umt5_config(text_encoder_sizes(base.shapes)).to_dict()
            _write_json(description, config | {"architectures": ["UMT5EncoderModel"]})
    _check_saved(weights, tensors, base, metadata, how)
    if spiece is not None and read_spiece(weights) != spiece:
        raise _unsound(weights, "its tokenizer is not the one that was written")
    return [path for path in (weights, description) if path.exists()]


def _check_saved(
    weights: Path,
    tensors: Mapping[str, Tensor],
    base: TensorSource,
    metadata: Mapping[str, str],
    how: EncoderFormat,
) -> None:
    """Read a saved encoder as training would, and hold it against the base's header and what was meant; tensor by tensor."""
    saved = open_text_encoder(weights) if how.full else open_text_encoder_part(weights)
    expected = set(base.shapes) if how.full else set(tensors)
    if set(saved.shapes) != expected:
        odd = sorted(set(saved.shapes) ^ expected)
        raise _unsound(weights, f"{odd[0]} is missing or does not belong to it")
    if weights.suffix == ".safetensors" and saved.metadata() != dict(metadata):
        raise _unsound(weights, "its metadata are not those that were written")
    for name, shape in saved.shapes.items():
        if shape != base.shapes[name]:
            raise _unsound(weights, f"{name} is {list(shape)} instead of {list(base.shapes[name])}")
        tensor = saved.get(name)
        if not all_finite(tensor):
            raise _unsound(weights, f"{name} holds NaN or infinite values, so its training has diverged")
        if not torch.equal(tensor, tensors[name]):
            raise _unsound(weights, f"{name} was written with other values than it has")
    saved.release()


def _unsound(weights: Path, reason: str) -> UserError:
    return UserError(
        f"{weights.name}: the encoder was read again after it was written, and {reason}; it is not kept. Go on from an earlier "
        "checkpoint, with a lower optimizer.lr if it has diverged, or look at the disk"
    )


def _compact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that own just their numbers: torch writes the whole storage behind a view."""
    return {
        name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        for name, tensor in tensors.items()
    }


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
