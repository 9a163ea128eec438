"""Draw a picture or a clip with Wan 2.2, with adapters and a tuned text encoder if wanted.

    python scripts/sample.py --config configs/wan22_dit_lora_translator.toml --prompt "a red circle moves to the right" \\
        --adapter output/RUN --seed 3 --out sample.mp4

See docs/sampling.md.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.wan.sample_flags import add_sampling_flags, describe, device_name, settings_from, tuned_encoder
from utils.argument_types import config_file, path_of, seed
from utils.cli import end_process, run_command
from utils.errors import UserError
from utils.local_ranks import run_ranks
from utils.report import check_writable

if TYPE_CHECKING:
    from torch import Tensor

    from models.wan.sample_job import SampleJob, Where

_SUFFIXES = (".png", ".mp4")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit status: 0, or 2 for what the user can mend.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=True,
        type=config_file,
        metavar="TOML",
        help="a training config, or a run's directory",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a value of the config (repeatable)",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to draw")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the noise (default: 0)")
    parser.add_argument(
        "--out",
        required=True,
        type=path_of,
        metavar="FILE",
        help=".png (one frame) or .mp4; replaced if it is there",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="F[:WEIGHT]",
        help="LoRA file, the directory it is in, or a run; with a factor on what it adds (repeatable)",
    )
    for expert in ("high", "low"):
        parser.add_argument(
            f"--adapter_{expert}",
            action="append",
            default=[],
            metavar="F[:WEIGHT]",
            help=f"A14B: the same for the {expert}-noise expert, where the file does not say it (repeatable)",
        )
    parser.add_argument(
        "--adapter_exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help='modules of the adapters to leave out, as a glob such as "cross_attn.v" or "blocks.3.*" (repeatable)',
    )
    parser.add_argument(
        "--text_encoder", type=path_of, metavar="F", help="a tuned UMT5: weight file, its directory, or a run"
    )
    add_sampling_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    return parser


def build_job(args: argparse.Namespace) -> "SampleJob":
    """What the flags ask for, checked as far as headers tell."""
    from models.wan.checkpoint import read_variant
    from utils.config.load import load_config

    suffix = args.out.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UserError(f"--out {args.out}: ends in neither {' nor '.join(_SUFFIXES)}")
    if args.out.is_dir():
        raise UserError(f"--out {args.out}: is a directory; give the file to write")
    check_writable(args.out, "--out")
    config = load_config(args.config, args.set).train
    variant = read_variant(config.model)
    settings = settings_from(args, variant, one_frame=suffix == ".png")
    if suffix == ".png" and settings.num_frames != 1:
        raise UserError(
            f"--out {args.out}: a .png holds one frame, not {settings.num_frames}; write .mp4 or --frames 1"
        )

    from models.wan.sample_adapters import choose_adapters
    from models.wan.sample_job import SampleJob, Variation, check_job

    adapters = choose_adapters(variant, args.adapter, args.adapter_high, args.adapter_low)
    job = SampleJob(
        config,
        settings,
        (args.prompt,),
        (args.seed,),
        args.negative_prompt,
        (Variation(tuple(adapters), tuned_encoder(args.text_encoder)),),
        args.image,
        args.expert,
        tuple(args.adapter_exclude),
        tiling=args.tiling,
    )
    check_job(job)
    args.out.parent.mkdir(parents=True, exist_ok=True)  # now, and not once everything is drawn
    return job


def draw(job: "SampleJob", where: "Where", out: Path) -> None:
    """Sample, decode and write."""
    from models.wan.sample_job import decode, sample

    where.say(describe(job.settings))
    latents = sample(job, where)
    if where.is_main:
        where.say("decoding")
        (videos,) = decode(job, latents, where)
        write(videos[0], out, job.settings.variant.fps)
        where.say(f"written: {out}")


def write(video_CFHW: "Tensor", out: Path, fps: int) -> None:
    """Write a video in [-1, 1] as the file's ending says."""
    from models.wan.pictures import to_frames
    from utils.data.videos import write_video
    from utils.files import atomic_path

    frames_FHWC = to_frames(video_CFHW)
    if out.suffix.lower() == ".mp4":
        write_video(out, frames_FHWC, fps)
        return
    from PIL import Image

    with atomic_path(out) as temporary:
        Image.fromarray(frames_FHWC[0]).save(temporary, format="PNG")


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Draw in this process, or in as many as there are stages."""
    job = build_job(args)
    stages = job.config.pipeline_stages
    if stages > 1 and args.device is not None:
        raise UserError(
            "--device: each of several stages has its own; leave it out, or add --set pipeline_stages=1"
        )
    if stages > 1 and "WORLD_SIZE" not in os.environ:
        print(
            f"pipeline_stages = {stages}: starting as many processes (--set pipeline_stages=1 stays in one)",
            flush=True,
        )
        return run_ranks([sys.executable, str(Path(__file__).resolve()), *argv], stages)

    from models.wan.sample_job import Where
    from utils.devices import choose_device
    from utils.progress import Progress, announce

    if stages == 1:
        progress = Progress("sampling", job.settings.steps)
        where = Where(choose_device(device_name(args.device)), None, announce, progress.reach)
        draw(job, where, args.out)
        progress.close()
        return 0

    from utils import distributed

    with distributed.process_group(job.config.timeout_minutes) as processes:
        if processes.world_size != stages:
            error = UserError(
                f"pipeline_stages = {stages}, but {processes.world_size} processes were started; start {stages}"
            )
            error.on_every_rank = True
            raise error
        if not processes.is_main:
            draw(job, Where(processes.device, processes), args.out)
            return 0
        progress = Progress("sampling", job.settings.steps)
        draw(job, Where(processes.device, processes, announce, progress.reach), args.out)
        progress.close()
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, and return the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(given)
    return run_command(lambda: run(args, given), debug=args.debug)


if __name__ == "__main__":
    end_process(main())
