"""A LoRA under the names that other programs read: the one place that writes them (`utils.lora_names` reads all of them).

| dialect | keys | read by |
| --- | --- | --- |
| `comfyui` | `diffusion_model.<official path>.lora_A.weight` | ComfyUI, diffusers, this project (its own) |
| `diffusers` | `transformer.<diffusers' path>.lora_A.weight` | diffusers, PEFT on its models |
| `kohya` | `lora_unet_<official path with _>.lora_down.weight`, `.alpha` | musubi-tuner, ComfyUI, diffusers where whole |
| `peft` | `base_model.model.<official path>.lora_A.weight` and `adapter_config.json` | PEFT on the official model |

The scale is folded into B, so that alpha is the rank everywhere: loaders disagree on what a missing or other alpha means.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from models.wan.names import dit_to_diffusers
from utils.errors import UserError
from utils.lora_names import KOHYA_PREFIX, AdapterPair, adapter_key

if TYPE_CHECKING:
    from torch import Tensor

Dialect = Literal["comfyui", "diffusers", "kohya", "peft"]
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)
PEFT_CONFIG_NAME = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
# What diffusers' reader of kohya's files takes from every block, whether it is there or not.
_KOHYA_BLOCK = (
    *(f"{attention}.{projection}" for attention in ("self_attn", "cross_attn") for projection in "qkvo"),
    "ffn.0",
    "ffn.2",
)


@dataclass(frozen=True)
class DialectFile:
    """What to write: tensors by key, and for PEFT the text of the file beside them."""

    tensors: "dict[str, Tensor]"
    peft_config: str | None = None


def to_dialect(modules: Mapping[str, AdapterPair], dialect: Dialect) -> DialectFile:
    """The adapter under another program's names.

    Args:
        modules: by official module path.
        dialect: whose names.

    Raises:
        UserError: the program could not read such a file (see `check_kohya`), or a module has no name there.
    """
    if dialect == "kohya":
        check_kohya(modules)
    tensors = {}
    for module, pair in modules.items():
        down, up = folded(pair)
        for key, tensor in zip(_keys(module, dialect), (down, up), strict=True):
            tensors[key] = tensor
        if dialect == "kohya":
            tensors[f"{KOHYA_PREFIX}{module.replace('.', '_')}.alpha"] = down.new_tensor(float(pair.rank))
    return DialectFile(tensors, _peft_config(modules) if dialect == "peft" else None)


def folded(pair: AdapterPair) -> "tuple[Tensor, Tensor]":
    """A and scale * B. Exact where the scale is a power of two; else B is kept in float32, rounded once from float64."""
    import torch

    up = pair.up
    if pair.scale != 1.0:
        mantissa, _ = math.frexp(pair.scale)
        exact = up * pair.scale
        is_exact = abs(mantissa) == 0.5 and torch.equal(exact.double(), up.double() * pair.scale)
        up = exact if is_exact else (up.double() * pair.scale).float()
    return pair.down.contiguous(), up.contiguous()


def check_kohya(modules: Mapping[str, AdapterPair]) -> None:
    """Refuse what diffusers cannot read under kohya's names.

    Its reader takes all ten linear layers of blocks 0 to N - 1 and nothing else, N being the number of blocks in the file, and
    fails where one is missing. (ComfyUI reads any part; `comfyui` is read by both.)

    Raises:
        UserError: the adapter is not whole in this sense.
    """
    blocks: dict[int, set[str]] = {}
    outside = []
    for module in modules:
        match = _IN_BLOCK.fullmatch(module)
        if match is None or match[2] not in _KOHYA_BLOCK:
            outside.append(module)
        else:
            blocks.setdefault(int(match[1]), set()).add(match[2])
    missing = [
        f"blocks.{block}.{path}"
        for block in range(len(blocks))
        for path in _KOHYA_BLOCK
        if path not in blocks.get(block, set())
    ]
    if outside or missing:
        why = f"{outside[0]} has no place there" if outside else f"{missing[0]} is not adapted"
        more = len(outside) + len(missing) - 1
        raise UserError(
            "kohya's names are read by diffusers only where a file adapts all ten linear layers of every block from 0 on, and "
            f"{why}{f' (and {more} more)' if more else ''}; write --to comfyui, which ComfyUI and diffusers both read"
        )


def _keys(module: str, dialect: Dialect) -> tuple[str, str]:
    if dialect == "comfyui":
        return adapter_key(module, "A"), adapter_key(module, "B")
    if dialect == "kohya":
        stem = KOHYA_PREFIX + module.replace(".", "_")
        return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"
    stem = f"transformer.{dit_to_diffusers(module)}" if dialect == "diffusers" else _PEFT_PREFIX + module
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _peft_config(modules: Mapping[str, AdapterPair]) -> str:
    ranks = {module: pair.rank for module, pair in modules.items()}
    usual = max(ranks.values(), key=list(ranks.values()).count)
    other = {module: rank for module, rank in ranks.items() if rank != usual}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        # PEFT takes these keys for regular expressions.
        "rank_pattern": {re.escape(module): rank for module, rank in other.items()},
        "alpha_pattern": {re.escape(module): rank for module, rank in other.items()},
    }
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
