"""The device that a probe's --device names."""

from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> "torch.device":
    """`cpu`, `cuda` or `cuda:N`.

    Raises:
        UserError: it is no such name, or there is no such GPU.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: is no device; write cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} GPU(s) can be used here"
        raise UserError(f"--device {name}: {found}; write --device cpu or another number")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: is not supported; write cpu, cuda or cuda:N")
    return device
