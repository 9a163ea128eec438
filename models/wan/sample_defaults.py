"""`[samples]` as the flags of prompt_grid, and what of it does not fit the checkpoint. No torch, but for a GPU's name."""

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from models.wan.arch import VariantInfo, load_arch
from models.wan.checkpoint import locate, open_transformer, read_variant
from models.wan.layouts import expert_model
from models.wan.probes.encoder_prompts import plan_prompts
from models.wan.prompts import NEGATIVE_PROMPT
from models.wan.sample_flags import unchecked_settings
from models.wan.sampling_settings import setting_faults
from utils.config.experts import EXPERTS, first_side
from utils.config.sample_rules import parse_size
from utils.config.schema import Problem, SamplesConfig, TrainConfig
from utils.devices import choose_device
from utils.errors import UserError

# What says when, for how long and where it is drawn is for the training's own grids; everything else says what.
_ABOUT_WHEN_AND_WHERE = ("every_n_epochs", "timeout_minutes", "device", "reports_dir")
_PATHS = ("prompts", "domain_prompts", "image")


def flags_of(samples: SamplesConfig) -> argparse.Namespace:
    """What `[samples]` says, as the flags of prompt_grid of the same names; None where it says nothing."""
    values = {
        field.name: getattr(samples, field.name)
        for field in fields(samples)
        if field.name not in _ABOUT_WHEN_AND_WHERE
    }
    for name in _PATHS:
        values[name] = None if values[name] is None else Path(values[name])
    values["size"] = None if samples.size is None else parse_size(samples.size)
    return argparse.Namespace(**values)


def fill_flags(args: argparse.Namespace, samples: SamplesConfig | None) -> None:
    """Give the flags that are None the value of `[samples]`, or its default where there is no such section.

    `--guidance` alone is that of both experts, so it puts `guidance_low` of the section out of force.
    """
    defaults = vars(flags_of(samples or SamplesConfig()))
    if args.guidance is not None:
        defaults.pop("guidance_low")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.negative_prompt is None:
        args.negative_prompt = NEGATIVE_PROMPT


def makes_picture(args: argparse.Namespace, variant: VariantInfo) -> bool:
    """Whether one frame is drawn where `frames` does not say otherwise: not with a first frame, which would be all of it."""
    return args.image is None and variant.model_type != "i2v"


def check_samples(config: TrainConfig) -> list[Problem]:
    """What `[samples]` asks for, and the checkpoint (of which headers are read), the prompts or this machine cannot give."""
    samples = config.samples
    if samples is None:
        return []
    variant = read_variant(first_side(config.model))
    args = flags_of(samples)
    problems = _try("samples.domain_prompts", lambda: _plan(args, config, samples))
    problems += _check_settings(args, variant)
    problems += _check_experts(config, samples, variant)
    if samples.device != "cpu":
        for problem in _try("samples.device", lambda: choose_device(samples.device)):
            reason = problem.reason.removeprefix(f"--device {samples.device}: ").partition(";")[0]
            problems.append(
                Problem(problem.key, f'is "{samples.device}", and {reason}', 'write "cpu" or another')
            )
    return problems


def _plan(args: argparse.Namespace, config: TrainConfig, samples: SamplesConfig) -> None:
    plan_prompts(args.prompts, args.domain_prompts, None, config, None, samples.max_prompts)


def _check_settings(args: argparse.Namespace, variant: VariantInfo) -> list[Problem]:
    try:
        settings = unchecked_settings(args, variant, one_frame=makes_picture(args, variant))
    except UserError as error:
        return [Problem("samples.image", str(error), "give another picture")]
    faults = setting_faults(settings, has_image=args.image is not None, named=lambda name: f"samples.{name}")
    problems = []
    for name, message in faults:
        reason, _, fix = message.removeprefix(f"samples.{name}: ").rpartition("; ")
        problems.append(Problem(f"samples.{name}", reason, fix))
    return problems


def _check_experts(config: TrainConfig, samples: SamplesConfig, variant: VariantInfo) -> list[Problem]:
    """Those that draw are there; the ones that are trained have been looked at already."""
    if not variant.has_experts:
        if samples.expert is None:
            return []
        reason = f'is "{samples.expert}", and {variant.name} has no experts'
        return [Problem("samples.expert", reason, "take it out")]
    drawing = EXPERTS if samples.expert is None else (samples.expert,)
    for expert in drawing:
        if config.model.expert in (expert, "both"):
            continue
        paths, missing = locate(expert_model(config.model, expert))
        found = missing or _try(
            "samples",
            lambda paths=paths: load_arch(  # type: ignore[misc]
                paths.config_json, open_transformer(paths.transformer_dir).shapes
            ),
        )
        if found:
            reason = f"needs the {expert} expert too, to draw with: {found[0].reason}"
            fix = "give a checkpoint that holds both experts"
            alone = f' or make all steps with one alone: samples.expert = "{config.model.expert}"'
            return [Problem("samples", reason, fix + ("," + alone if samples.expert is None else ""))]
    return []


def _try(key: str, check: Callable[[], object]) -> list[Problem]:
    try:
        check()
    except UserError as error:
        return [Problem(key, str(error))]
    return []
