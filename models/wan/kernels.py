"""Which kernels a configuration asks for, and whether this machine has them.

Attention of the packages flash-attn 2 (`flash_attn`) and flash-attn 3 (`flash_attn_interface`) where they are installed;
nothing here needs them.
"""

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from models.wan.attention import Attend, attend_by_torch
from utils.compiled import check_compiler
from utils.config.schema import TrainConfig
from utils.errors import UserError

# Fastest first: the module that has `flash_attn_func`, and the compute capabilities [from, to) that it is made for.
_FLASH: dict[str, tuple[str, tuple[int, int], tuple[int, int]]] = {
    "flash_attn_3": ("flash_attn_interface", (9, 0), (10, 0)),
    "flash_attn_2": ("flash_attn", (8, 0), (13, 0)),
}
_FLOAT8_FROM = (8, 9)


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Whether the machine can do what `compile`, `model.attention` and `model.transformer_compute` ask for.

    Raises:
        UserError: it cannot; says which key asks for what.
    """
    if config.compile:
        check_compiler(device, "compile")
    _check_attention(config.model.attention, device)
    if config.model.transformer_compute == "float8" and device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < _FLOAT8_FROM:
            raise UserError(
                f'model.transformer_compute: is "float8", which {torch.cuda.get_device_name(device)} (compute capability '
                f"{found[0]}.{found[1]}) cannot; 8.9 (Ada) or newer can. Take it out: weights stay in 8 bits without it"
            )


def _check_attention(name: str, device: torch.device) -> None:
    if name not in _FLASH:
        return
    module, first, end = _FLASH[name]
    reason = None
    if device.type != "cuda":
        reason = "is for GPUs, and this run has none"
    elif not first <= torch.cuda.get_device_capability(device) < end:
        reason = f"is not made for {torch.cuda.get_device_name(device)}"
    elif _imported(module) is None:
        reason = f"cannot be used: {module} is not installed, or does not fit this torch"
    if reason is not None:
        raise UserError(
            f'model.attention: is "{name}", which {reason}. Write model.attention = "auto", which takes it where it can be used'
        )


def attention_in_use(config: TrainConfig, device: torch.device) -> str:
    """What "auto" stands for here: a kernel for this dtype and device whose package is installed, or "torch".

    With `compile` it is torch's, which the compiler knows; the packages' may break the graph.
    """
    name = config.model.attention
    if name != "auto":
        return name
    if config.compile or config.model.dtype != "bfloat16" or device.type != "cuda":
        return "torch"
    capability = torch.cuda.get_device_capability(device)
    for candidate, (module, first, end) in _FLASH.items():
        if first <= capability < end and _imported(module) is not None:
            return candidate
    return "torch"


def attend_of(config: TrainConfig, device: torch.device) -> Attend:
    """The attention that `model.attention` names; importable, as `check_device` has seen."""
    used = attention_in_use(config, device)
    return attend_by_torch if used == "torch" else _flash(_FLASH[used][0])


@cache
def _imported(module: str) -> Any:
    """`flash_attn_func` of a module; None where it is not there, or was built for another torch, which only importing it tells."""
    try:
        return importlib.import_module(module).flash_attn_func
    except (ImportError, OSError, AttributeError):
        return None


def _flash(module: str) -> Attend:
    function = _imported(module)

    def attend(query_BSNK: Tensor, key_BLNK: Tensor, value_BLNK: Tensor) -> Tensor:
        # Some versions give the softmax's sums too.
        result: Any = function(query_BSNK, key_BLNK, value_BLNK)
        return result[0] if isinstance(result, tuple) else result

    return attend
