"""Rules over the whole training configuration, one function each: what may not be combined, and why.

A rule returns its problems and never raises. `RULES` lists them with the keys they read, so that a rule whose
keys are unusable stays silent instead of complaining a second time. `DATASET_RULES` is in `dataset_rules`.
"""

import os
from itertools import pairwise
from pathlib import Path
from typing import Literal

from utils.config.caption_rules import CAPTION_RULES
from utils.config.closed_form_rules import CLOSED_FORM_RULES
from utils.config.eval_rules import EVAL_RULES
from utils.config.experts import EXPERT_RULES, on_each_side
from utils.config.introspect import keys_of
from utils.config.kernel_rules import KERNEL_RULES
from utils.config.probe_rules import PROBE_RULES
from utils.config.rules import Rule
from utils.config.sample_rules import SAMPLE_RULES
from utils.config.schema import BudgetConfig, ModelConfig, Problem, TrainConfig
from utils.config.target_rules import TARGET_RULES, check_targets

__all__ = ["RULES", "Mode", "check_targets", "mode_of"]

Mode = Literal["encoder_ft", "dit_lora"]
REPORTS_DIR = "reports"

_MODE_KEYS = ("model.cache_text_embeddings", "model.train_text_encoder")
_ENCODER_FT = (
    "encoder_ft is cache_text_embeddings = false, train_text_encoder = true, freeze_transformer = true"
)
_DIT_LORA = "dit_lora is cache_text_embeddings = true, train_text_encoder = false, freeze_transformer = true"
_ENCODER_ONLY_KEYS = (
    "text_train_blocks",
    "train_token_embedding",
    "text_encoder_dropout",
    "save_text_encoder_full",
    "save_text_encoder_format",
)
_WHOLE_ENCODER_FORMATS = ("official_pth", "comfyui")


def mode_of(config: TrainConfig) -> Mode:
    """The mode that the switches of a checked configuration stand for."""
    return "encoder_ft" if config.model.train_text_encoder else "dit_lora"


def check_cache_and_training(config: TrainConfig) -> list[Problem]:
    """Exactly one of cache_text_embeddings and train_text_encoder is true: it is the mode."""
    model, key = config.model, "model.cache_text_embeddings"
    if model.cache_text_embeddings and model.train_text_encoder:
        reason = (
            "is true, which contradicts train_text_encoder = true: training an encoder behind a cache trains nothing, "
            "because every step reads embeddings made before training"
        )
        return [Problem(key, reason, f"set one of the two to false: {_ENCODER_FT}; {_DIT_LORA}")]
    if not model.cache_text_embeddings and not model.train_text_encoder:
        reason = (
            "is false, which contradicts train_text_encoder = false: a frozen encoder gives the same embeddings at every "
            "step, so they are made once"
        )
        return [Problem(key, reason, f"set one of the two to true: {_DIT_LORA}; {_ENCODER_FT}")]
    return []


def check_frozen_transformer(config: TrainConfig) -> list[Problem]:
    """freeze_transformer is true in both modes: the DiT's own weights are never trained."""
    if config.model.freeze_transformer:
        return []
    reason = (
        "is false, which contradicts both modes: the DiT's own weights are never trained here, only the encoder before "
        "it (train_text_encoder = true) or an adapter on it (train_text_encoder = false)"
    )
    return [Problem("model.freeze_transformer", reason, "set freeze_transformer = true")]


def check_adapter_fits_mode(config: TrainConfig) -> list[Problem]:
    """dit_lora needs an [adapter], encoder_ft refuses one."""
    mode = _clear_mode(config.model)
    if mode == "dit_lora" and config.adapter is None:
        reason = "is missing: without it dit_lora has nothing to train"
        return [Problem("adapter", reason, "add an [adapter] section, e.g. with rank = 16")]
    if mode == "encoder_ft" and config.adapter is not None:
        reason = "is not for encoder_ft: the DiT stays as it is while the text encoder is trained"
        return [Problem("adapter", reason, f"take the section out, or switch modes: {_DIT_LORA}")]
    return []


def check_budget_fits_mode(config: TrainConfig) -> list[Problem]:
    """Every key of [budget] must limit something in this mode."""
    budget, mode = config.budget, _clear_mode(config.model)
    if budget is None or mode is None:
        return []
    if mode == "dit_lora":
        if config.adapter is None:  # said already
            return []
        given = [key for key in ("max_neutral_drift", "neutral_prompts") if getattr(budget, key) is not None]
        reason = "would be ignored: in dit_lora the text encoder does not change"
        return [Problem(f"budget.{key}", reason, "take it out") for key in given]
    problems = []
    if budget.max_neutral_drift is None:
        reason = "is missing: in encoder_ft there is no adapter, so this budget would limit nothing"
        problems.append(
            Problem(
                "budget.max_neutral_drift",
                reason,
                "write e.g. max_neutral_drift = 0.05, or take [budget] out",
            )
        )
    defaults = keys_of(BudgetConfig)
    for key in ("max_delta_ratio", "max_mean_delta_ratio"):
        if getattr(budget, key) != defaults[key].default:
            reason = "would be ignored: in encoder_ft there is no adapter"
            problems.append(Problem(f"budget.{key}", reason, "take it out"))
    if budget.action == "project":
        reason = "is 'project', but an encoder's drift is no length that weights could be scaled back to"
        problems.append(Problem("budget.action", reason, 'write action = "stop" or "warn"'))
    return problems


def check_projectable(config: TrainConfig) -> list[Problem]:
    """Weights that are stored in bfloat16 cannot be put exactly on a cap."""
    if config.budget is None or config.budget.action != "project" or config.optimizer.type != "adamw_kahan":
        return []
    reason = "is 'project', but optimizer.type = 'adamw_kahan' keeps the adapter in bfloat16, too coarse to lie on a cap"
    return [
        Problem("budget.action", reason, 'use optimizer.type = "adamw" or "adamw8bit", or action = "stop"')
    ]


def check_encoder_options(config: TrainConfig) -> list[Problem]:
    """Options of encoder training are refused in dit_lora, where nothing would read them."""
    if _clear_mode(config.model) != "dit_lora":
        return []
    keys = keys_of(ModelConfig)
    reason = "would be ignored: in dit_lora the text encoder is not trained"
    fix = f"take it out, or switch modes: {_ENCODER_FT}"
    given = [name for name in _ENCODER_ONLY_KEYS if getattr(config.model, name) != keys[name].default]
    return [Problem(f"model.{name}", reason, fix) for name in given]


def check_encoder_format(config: TrainConfig) -> list[Problem]:
    """Formats that other programs load as a whole encoder cannot hold the trained tensors alone."""
    chosen = config.model.save_text_encoder_format
    if config.model.save_text_encoder_full or chosen not in _WHOLE_ENCODER_FORMATS:
        return []
    reason = f"is {chosen!r}, a whole encoder for other programs, and save_text_encoder_full is false"
    fix = 'set save_text_encoder_full = true, or use "hf" or "official"'
    return [Problem("model.save_text_encoder_format", reason, fix)]


@on_each_side
def check_blocks_range(config: TrainConfig) -> list[Problem]:
    """train_blocks_range is [first, last] with first <= last."""
    if config.adapter is None or config.adapter.train_blocks_range is None:
        return []
    blocks = config.adapter.train_blocks_range
    if len(blocks) == 2 and blocks[0] <= blocks[1]:
        return []
    reason = f"must be [first, last] with first <= last, not {list(blocks)}"
    return [Problem("adapter.train_blocks_range", reason, "e.g. [20, 29] for the last ten of 30 blocks")]


def check_noise_levels(config: TrainConfig) -> list[Problem]:
    """min_t is below max_t."""
    if config.model.min_t < config.model.max_t:
        return []
    reason = f"is {config.model.min_t:g}, which is not below max_t = {config.model.max_t:g}: no noise level is left to train"
    return [Problem("model.min_t", reason, "lower min_t or raise max_t")]


def check_sigmoid_scale(config: TrainConfig) -> list[Problem]:
    """sigmoid_scale is refused with the uniform law, which does not read it."""
    model = config.model
    if (
        model.timestep_sample_method == "logit_normal"
        or model.sigmoid_scale == keys_of(ModelConfig)["sigmoid_scale"].default
    ):
        return []
    reason = f'would be ignored: timestep_sample_method = "{model.timestep_sample_method}" has no scale'
    return [
        Problem("model.sigmoid_scale", reason, 'take it out, or set timestep_sample_method = "logit_normal"')
    ]


def check_partition(config: TrainConfig) -> list[Problem]:
    """partition_split belongs to partition_method = "manual": one rising layer index per stage after the first."""
    split, needed = config.partition_split, config.pipeline_stages - 1
    if config.partition_method != "manual":
        if not split:
            return []
        reason = f'would be ignored: partition_method is "{config.partition_method}"'
        return [Problem("partition_split", reason, 'take it out, or set partition_method = "manual"')]
    problems = []
    if len(split) != needed:
        reason = f"has {len(split)} entries; pipeline_stages = {config.pipeline_stages} with the manual method needs {needed}"
        problems.append(
            Problem("partition_split", reason, "give the index of the first layer of stages 2, 3, ...")
        )
    if any(later <= earlier for earlier, later in pairwise(split)):
        reason = f"must rise from entry to entry, not {list(split)}"
        problems.append(
            Problem("partition_split", reason, "give the index of the first layer of stages 2, 3, ...")
        )
    return problems


def check_betas(config: TrainConfig) -> list[Problem]:
    """betas holds exactly two values."""
    betas = config.optimizer.betas
    if len(betas) == 2:
        return []
    return [Problem("optimizer.betas", f"must hold two values, not {len(betas)}", "e.g. [0.9, 0.99]")]


def check_optimizer_precision(config: TrainConfig) -> list[Problem]:
    """adamw_kahan keeps trained weights in bfloat16, so it goes with dtype = "bfloat16" only."""
    if config.optimizer.type != "adamw_kahan" or config.model.dtype == "bfloat16":
        return []
    reason = 'is "adamw_kahan", which keeps trained weights in bfloat16, and model.dtype is "float32"'
    return [Problem("optimizer.type", reason, 'write model.dtype = "bfloat16", or optimizer.type = "adamw"')]


def check_warmup(config: TrainConfig) -> list[Problem]:
    """warmup_steps is below max_steps."""
    if config.max_steps is None or config.warmup_steps < config.max_steps:
        return []
    reason = (
        f"is {config.warmup_steps}, and max_steps is {config.max_steps}: training would end before the learning rate "
        "has reached lr"
    )
    return [Problem("warmup_steps", reason, "lower warmup_steps or raise max_steps")]


def check_output_dir(config: TrainConfig) -> list[Problem]:
    """output_dir is not inside reports/, which is for the reports of probes only."""
    reports, output_dir = (Path(os.path.realpath(path)) for path in (REPORTS_DIR, config.output_dir))
    if output_dir != reports and reports not in output_dir.parents:
        return []
    reason = f'is "{config.output_dir}", inside {REPORTS_DIR}/: training output and the reports of probes never mix'
    return [Problem("output_dir", reason, 'choose another place, e.g. "output/<name>"')]


def _clear_mode(model: ModelConfig) -> Mode | None:
    """The mode, or None where the switches contradict each other and rules about a mode cannot know which is meant."""
    if model.cache_text_embeddings == model.train_text_encoder:
        return None
    return "encoder_ft" if model.train_text_encoder else "dit_lora"


RULES = (
    Rule(check_cache_and_training, _MODE_KEYS),
    Rule(check_frozen_transformer, ("model.freeze_transformer",)),
    Rule(check_adapter_fits_mode, (*_MODE_KEYS, "adapter")),
    Rule(check_encoder_format, ("model.save_text_encoder_format", "model.save_text_encoder_full")),
    Rule(check_encoder_options, (*_MODE_KEYS, *(f"model.{name}" for name in _ENCODER_ONLY_KEYS))),
    *CAPTION_RULES,
    *EXPERT_RULES,
    *TARGET_RULES,
    Rule(check_blocks_range, ("adapter.train_blocks_range",)),
    *CLOSED_FORM_RULES,
    Rule(check_budget_fits_mode, (*_MODE_KEYS, "adapter", "budget")),
    Rule(check_projectable, ("budget.action", "optimizer.type")),
    Rule(check_noise_levels, ("model.min_t", "model.max_t")),
    Rule(check_sigmoid_scale, ("model.timestep_sample_method", "model.sigmoid_scale")),
    Rule(check_partition, ("partition_method", "partition_split", "pipeline_stages")),
    Rule(check_betas, ("optimizer.betas",)),
    Rule(check_optimizer_precision, ("optimizer.type", "model.dtype")),
    *KERNEL_RULES,
    Rule(check_warmup, ("warmup_steps", "max_steps")),
    *EVAL_RULES,
    *PROBE_RULES,
    *SAMPLE_RULES,
    Rule(check_output_dir, ("output_dir",)),
)
