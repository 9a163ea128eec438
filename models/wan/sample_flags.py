"""The flags that say how to sample, shared by `sample.py` and `prompt_grid.py`, and what they mean for a checkpoint. No torch."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import get_args

from models.wan.arch import VariantInfo
from models.wan.probes.encoder_subject import SAVED_ENCODER
from models.wan.prompts import NEGATIVE_PROMPT
from models.wan.sampling_settings import (
    SamplingSettings,
    SolverName,
    check_settings,
    official_settings,
    size_for_image,
)
from utils.argument_types import path_of
from utils.config.sample_rules import parse_size
from utils.config.schema import Expert
from utils.errors import UserError
from utils.saved_runs import find_saved_file

TILINGS = ("auto", "always", "never")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Size, steps, guidance and the rest; without a flag it is as the official code has it for the variant."""
    group = parser.add_argument_group("how it is sampled (default: as the official code samples the variant)")
    group.add_argument("--size", type=_size, metavar="WxH", help="width x height in px")
    group.add_argument("--frames", type=int, metavar="N", help="frames, 4n+1; 1 is a picture")
    group.add_argument("--solver", choices=get_args(SolverName), default="unipc", help="default: unipc")
    group.add_argument("--steps", type=int, metavar="N", help="50 for ti2v-5b, 40 for A14B")
    group.add_argument("--shift", type=float, metavar="X", help="of the noise levels: 5, for t2v-a14b 12")
    group.add_argument(
        "--guidance",
        type=float,
        metavar="X",
        help="of classifier-free guidance: 5; of the high-noise expert 4 (t2v) or 3.5 (i2v). 1 is off. Given without "
        "--guidance_low, it is that of both experts",
    )
    group.add_argument(
        "--guidance_low", type=float, metavar="X", help="A14B: of the low-noise expert: 3 (t2v), 3.5 (i2v)"
    )
    group.add_argument(
        "--negative_prompt", default=NEGATIVE_PROMPT, metavar="TEXT", help="default: Wan's own, in Chinese"
    )
    group.add_argument(
        "--image", type=path_of, metavar="FILE", help="the first frame: i2v-a14b needs one, ti2v-5b takes one"
    )
    group.add_argument(
        "--expert",
        choices=get_args(Expert),
        help="A14B: make all steps with this expert alone, as where a checkpoint holds no other",
    )
    group.add_argument(
        "--reuse_text_keys",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compute keys and values of the texts once for all steps, and keep them (default); the picture is the same",
    )
    group.add_argument(
        "--tiling",
        choices=TILINGS,
        default="auto",
        help="decode in tiles: auto, once memory does not suffice (default)",
    )
    group.add_argument(
        "--device", default=None, metavar="NAME", help="cpu, cuda or cuda:N (default: a GPU if there is one)"
    )


def settings_from(
    args: argparse.Namespace, variant: VariantInfo, *, one_frame: bool = False
) -> SamplingSettings:
    """The settings that flags ask for, on top of the official ones.

    Args:
        args: of `add_sampling_flags`.
        variant: of the checkpoint.
        one_frame: make a picture where `--frames` does not say otherwise.

    Raises:
        UserError: the variant cannot make that.
    """
    settings = unchecked_settings(args, variant, one_frame=one_frame)
    check_settings(settings, has_image=args.image is not None)
    if args.expert is not None and not variant.has_experts:
        raise UserError(f"--expert {args.expert}: {variant.name} has no experts; leave it out")
    return settings


def unchecked_settings(
    args: argparse.Namespace, variant: VariantInfo, *, one_frame: bool = False
) -> SamplingSettings:
    """The same, also of what the variant cannot make.

    Raises:
        UserError: the image cannot be read.
    """
    settings = official_settings(variant)
    image_size = None if args.image is None else _image_size(args.image)
    if args.size is not None:
        settings = replace(settings, width=args.size[0], height=args.size[1])
    elif image_size is not None:
        width, height = size_for_image(settings, *image_size)
        settings = replace(settings, width=width, height=height)
    if args.frames is not None or one_frame:
        settings = replace(settings, num_frames=1 if args.frames is None else args.frames)
    if args.guidance is not None and args.guidance_low is None:
        settings = replace(settings, guidance_low_noise=None)
    given = {
        "steps": args.steps,
        "shift": args.shift,
        "guidance": args.guidance,
        "guidance_low_noise": args.guidance_low,
        "solver": args.solver,
        "reuse_text_keys": args.reuse_text_keys,
    }
    return replace(settings, **{key: value for key, value in given.items() if value is not None})


def _image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image that is whole."""
    from utils.data.images import load_image

    return load_image(path).size


def device_name(name: str | None) -> str:
    """What `--device` means where it is not given."""
    if name is not None:
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def tuned_encoder(path: Path | None) -> Path | None:
    """The weight file that `--text_encoder` means: itself, that of a directory, or of a run (its last save)."""
    return None if path is None else find_saved_file(path, SAVED_ENCODER)


def describe(settings: SamplingSettings) -> str:
    """The settings in a line."""
    low = settings.guidance_low_noise
    guidance = (
        f"{settings.guidance:g}"
        if low is None
        else f"{settings.guidance:g} (high noise) and {low:g} (low noise)"
    )
    frames = (
        "1 frame" if settings.num_frames == 1 else f"{settings.num_frames} frames at {settings.variant.fps}/s"
    )
    return (
        f"{settings.variant.name}, {settings.width}x{settings.height} px, {frames}; {settings.solver}, {settings.steps} "
        f"step{'s' if settings.steps != 1 else ''}, shift {settings.shift:g}, guidance {guidance}"
    )


def _size(text: str) -> tuple[int, int]:
    size = parse_size(text)
    if size is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 832x480 (width x height)")
    return size
