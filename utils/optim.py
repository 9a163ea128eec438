"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from utils.config.schema import OptimizerConfig
from utils.errors import UserError
from utils.number_bytes import trained_dtype_name


def trainable_dtype(config: OptimizerConfig) -> torch.dtype:
    """Storage precision of trained weights: float32, except where the optimizer compensates bfloat16 rounding."""
    dtype: torch.dtype = getattr(torch, trained_dtype_name(config))
    return dtype


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    config: OptimizerConfig,
    tables: Collection[str] = (),
    shared_by: Any = None,
) -> torch.optim.Optimizer:
    """The configured optimizer over one stage's trainable parameters; there may be none.

    Norms, biases and other vectors get no weight decay, and neither do lookup tables (`tables`, by name): decay would
    shrink the rows that the data never asks for.

    Args:
        parameters: the stage's trainable parameters by global name.
        config: of the optimizer.
        tables: names of those that are lookup tables.
        shared_by: process group of the copies of this stage that share the optimizer's state out among themselves
            (`zero_stage = 1`): each keeps the state of some parameters whole, steps them and sends them to the
            others. None, or a group of one: nothing is shared.

    Raises:
        UserError: the optimizer's library is not installed.
    """
    is_decayed = {name: parameter.dim() >= 2 and name not in tables for name, parameter in parameters.items()}
    decayed = [parameter for name, parameter in parameters.items() if is_decayed[name]]
    plain = [parameter for name, parameter in parameters.items() if not is_decayed[name]]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if not parameters:
        return torch.optim.AdamW(groups)  # an optimizer of nothing
    groups = [group for group in groups if group["params"]]
    if shared_by is None or dist.get_world_size(shared_by) == 1:
        return _make_optimizer(groups, config)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(groups, lambda own: _make_optimizer(own, config), process_group=shared_by)  # type: ignore[arg-type]


def _make_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The configured optimizer over groups that say their weight decay; a group may be empty."""
    arguments: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if config.type == "adamw":
        # On a GPU the default implementation makes one more float32 copy of everything while it steps; the fused one does not.
        fused = any(parameter.is_cuda for group in groups for parameter in group["params"])
        return torch.optim.AdamW(groups, fused=fused, **arguments)
    if config.type == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UserError(
                "optimizer.type = 'adamw8bit' needs bitsandbytes, which is not installed: pip install "
                "'ai-model-sandbox[8bit]', or use type = 'adamw'"
            ) from error
        return AdamW8bit(groups, **arguments)
    from optimi import AdamW as KahanAdamW

    return KahanAdamW(groups, kahan_sum=True, triton=False, **arguments)


def local_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that holds this process's state: the one inside where copies share it out, else itself."""
    return optimizer.optim if is_shared_out(optimizer) else optimizer  # type: ignore[attr-defined]


def is_shared_out(optimizer: torch.optim.Optimizer) -> bool:
    """Whether data-parallel copies share this optimizer's state out among themselves."""
    return type(optimizer).__name__ == "ZeroRedundancyOptimizer"


def group_counters(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Step counters that an optimizer keeps per group instead of per parameter (optimi does); all groups agree."""
    counters: dict[str, int] = {}
    for group in optimizer.param_groups:
        if group.get("setup"):
            counters["step"] = int(group["step"])
    return counters


def restore_group_counters(optimizer: torch.optim.Optimizer, counters: Mapping[str, int]) -> None:
    """Put back what `group_counters` returned, into an optimizer that has not stepped yet."""
    for group in optimizer.param_groups:
        if "setup" in group and "step" in counters:
            group["setup"] = True
            group["step"] = torch.tensor(counters["step"], dtype=torch.int32)


def learning_rate(step: int, total_steps: int, peak: float, schedule: str, warmup_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then constant, or down to 0 at `total_steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = value
