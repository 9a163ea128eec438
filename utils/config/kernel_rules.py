"""Rules about how products and attention are computed."""

from utils.config.rules import Rule
from utils.config.schema import Problem, TrainConfig


def check_compute(config: TrainConfig) -> list[Problem]:
    """transformer_compute = "float8" needs transformer_dtype = "float8" and dtype = "bfloat16"."""
    model, key = config.model, "model.transformer_compute"
    if model.transformer_compute is None:
        return []
    if model.transformer_dtype != "float8":
        reason = 'is "float8", but transformer_dtype is not: products in 8 bits take weights that are stored in 8 bits'
        return [Problem(key, reason, 'write transformer_dtype = "float8" too, or take it out')]
    if model.dtype != "bfloat16":
        reason = f'is "float8", whose results are bfloat16, but dtype is "{model.dtype}"'
        return [Problem(key, reason, 'write dtype = "bfloat16", or take it out')]
    return []


def check_attention(config: TrainConfig) -> list[Problem]:
    """flash-attn's kernels need dtype = "bfloat16"."""
    model = config.model
    if model.dtype == "bfloat16" or not model.attention.startswith("flash_attn"):
        return []
    reason = f'is "{model.attention}", which knows no {model.dtype}, and that is dtype'
    return [Problem("model.attention", reason, 'write dtype = "bfloat16", or attention = "auto"')]


KERNEL_RULES = (
    Rule(check_compute, ("model.transformer_compute", "model.transformer_dtype", "model.dtype")),
    Rule(check_attention, ("model.attention", "model.dtype")),
)
