"""What closed-form translators are solved from in tests: neutral prompts, prompts with a new word, and a tuned encoder."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.wan.checkpoint import TEXT_ENCODER_FILE, open_text_encoder
from models.wan.names import umt5_to_hf

NEUTRAL = [
    f"a {colour} {shape} {does} on a {ground} background"
    for colour in ("red", "blue", "green", "yellow")
    for shape in ("circle", "square", "triangle")
    for does in ("moves", "stands still")
    for ground in ("dark", "light")
]
DOMAIN = [f"the zorp {does}" for does in ("moves", "stands", "rests", "is here", "is there")]


def write_tuned(
    path: Path,
    checkpoint: Path,
    strength: float = 0.1,
    change: Callable[[dict[str, Tensor]], object] | None = None,
) -> Path:
    """The checkpoint's encoder with noise on its matrices, as `path`; `change` edits the tensors before."""
    source, random = open_text_encoder(checkpoint / TEXT_ENCODER_FILE), torch.Generator().manual_seed(0)
    tensors = {}
    for name in source.shapes:
        tensor = source.get(name).float()
        if tensor.ndim == 2 and strength:
            tensor = tensor + strength * tensor.std() * torch.randn(tensor.shape, generator=random)
        tensors[umt5_to_hf(name)] = tensor.contiguous().clone()
    if change is not None:
        change(tensors)
    save_file(tensors, path)
    return path


def write_prompts(root: Path) -> None:
    """`neutral.txt`, `domain.txt` and `keywords.txt` in `root`."""
    for name, lines in (("neutral", NEUTRAL), ("domain", DOMAIN), ("keywords", ["zorp"])):
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
