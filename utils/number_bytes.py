"""Bytes of one number, and of one trained weight with all that belongs to it. No torch: a plan needs none."""

from typing import Literal

from utils.config.schema import DType, OptimizerConfig

FLOAT32 = 4


def bytes_of(dtype: DType) -> int:
    """Bytes of one number of this precision."""
    return {"float32": 4, "bfloat16": 2}[dtype]


def trained_dtype_name(config: OptimizerConfig) -> Literal["float32", "bfloat16"]:
    """Storage precision of trained weights: float32, except where the optimizer compensates bfloat16 rounding."""
    return "bfloat16" if config.type == "adamw_kahan" else "float32"


def trained_bytes(config: OptimizerConfig) -> int:
    """Bytes of one trained weight; its gradient has as many."""
    return bytes_of(trained_dtype_name(config))


def bytes_per_trained_weight(config: OptimizerConfig) -> float:
    """Memory of one trained weight: itself, its gradient and the optimizer's state."""
    return 2.0 * trained_bytes(config) + state_bytes_per_weight(config)


def state_bytes_per_weight(config: OptimizerConfig) -> float:
    """Memory of the optimizer's state for one trained weight: what `zero_stage = 1` divides by the number of copies."""
    return {"adamw": 8.0, "adamw8bit": 2.0, "adamw_kahan": 6.0}[config.type]
