"""Bench: how many frames a second the VAE encodes, by clips in a batch and by tiling.

    python -m scripts.bench.vae
    python -m scripts.bench.vae --device cuda --size 480x832x49 --batches 1,2,4

Timed in turns within one process, random weights: batches of several clips against the same clips one by one, and one clip in
overlapping tiles against the clip as a whole. A batch must give what its clips give alone; tiles give other latents
where they meet, by how much is reported. Also the most memory that each way held at once (on a GPU).

Writes reports/bench_vae/<run_tag>/.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from models.wan.component_shapes import VaeSizes
from models.wan.vae import WanVae, build_vae
from utils.argument_types import positive_int
from utils.bench import Comparison, check_agreement, compare, finish, note_machine, print_rows, relative_error
from utils.devices import choose_device
from utils.errors import UserError
from utils.probe_cli import add_flags, probe_parser, run_probe
from utils.report import Report, Verdict

TOOL = "bench_vae"
QUESTION = "What do batches and tiles change about the speed of encoding?"
NEXT_STEPS = "Set caching_batch_size to a batch whose ratio is below 1 and whose memory fits."
# A clip in a batch goes through other kernels than alone; measured 3e-7 on a CPU.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
# The VAE of TI2V-5B; on a CPU narrower, because nobody encodes at the published width there.
SIZES = {"cpu": VaeSizes("2.2", 32, 48), "cuda": VaeSizes("2.2", 160, 256)}
# Larger than one tile in one direction, so that tiling does something: diffusers cuts the VAE of 2.2 behind its fold of 2x2
# pixels, so that its tiles of 256 are 512 px wide.
CLIPS = {"cpu": "64x576x5", "cuda": "480x832x49"}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser(TOOL, __doc__ or "")
    add_flags(parser, "device")
    parser.add_argument(
        "--rounds", type=positive_int, default=7, help="counted rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--size",
        type=clip_size,
        help="height x width x frames of a clip, e.g. 480x832x49 (default: by device)",
    )
    parser.add_argument(
        "--batches", type=batches, default=[2, 4], help="clips in a batch, e.g. 2,4 (default: 2,4)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the VAE (default: %(default)s)",
    )
    return parser


def clip_size(text: str) -> tuple[int, int, int]:
    """`480x832x49` as height, width and frames."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not height x width x frames, such as 480x832x49")
    height, width, frames = map(int, found.groups())
    return height, width, frames


def batches(text: str) -> list[int]:
    """`2,4` as numbers of clips."""
    return [positive_int(word) for word in text.split(",")]


def probe(args: argparse.Namespace) -> Verdict:
    """Compare, time, write the report, print its lines."""
    device = choose_device(args.device)
    torch.set_num_threads(1)
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag, seed=0)
    note_machine(report, device)
    height, width, frames = args.size or clip_size(CLIPS[device.type])
    dtype: torch.dtype = getattr(torch, args.dtype)
    vae = random_vae(SIZES[device.type], dtype, device)
    random = torch.Generator().manual_seed(5)
    shape = (max(args.batches), 3, frames, height, width)
    videos = (torch.rand(shape, generator=random) * 2 - 1).to(device)
    try:
        vae.encode(videos[:1])
    except ValueError as error:
        raise UserError(f"--size: {error}") from None
    name = f"{height} x {width} px, {frames} frames, {args.dtype}"
    comparisons = [
        time_batch(report, vae, videos[:clips], name, TOLERANCE[dtype], args.rounds) for clips in args.batches
    ]
    comparisons.append(time_tiling(report, vae, videos[:1], name, args.rounds))
    rows = [one.row() for one in comparisons]
    clips = [*args.batches, 1]
    for row, number in zip(rows, clips, strict=True):
        seconds = row["ours_ms"]
        row["frames_per_second"] = None if seconds is None else round(1e3 * number * frames / seconds, 2)
    report.table("timed", rows, "Seconds of each way over those of clip by clip, whole")
    print_rows(rows)
    refused = [one.name for one in comparisons if one.is_noisy]
    return finish(report, [], refused, NEXT_STEPS)


def random_vae(sizes: VaeSizes, dtype: torch.dtype, device: torch.device) -> WanVae:
    """A VAE with the library's random weights, the same in every run, frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        module = build_vae(sizes)
    module = module.to(device).eval().requires_grad_(False)
    # Not by `to`, which warns of modules that are to stay in float32, of which this one has none.
    module = module.bfloat16() if dtype == torch.bfloat16 else module
    return WanVae(module, sizes.kind, dtype, device)


def time_batch(
    report: Report, vae: WanVae, videos: Tensor, name: str, tolerance: float, rounds: int
) -> Comparison:
    """Clips as one batch against one by one.

    Raises:
        UserError: the latents disagree.
    """

    def together() -> Tensor:
        return vae.encode(videos)

    def alone() -> Tensor:
        return torch.cat([vae.encode(video.unsqueeze(0)) for video in videos])

    what = f"batch of {len(videos)} against one by one, {name}"
    error = check_agreement(what, together(), alone(), tolerance)
    report.metric(f"error_batch_{len(videos)}", error, "relative error of its latents against one by one")
    note_memory(report, f"batch_{len(videos)}", together, vae.device)
    return compare(what, together, alone, rounds, vae.device, warmup=1)


def time_tiling(report: Report, vae: WanVae, video: Tensor, name: str, rounds: int) -> Comparison:
    """One clip in tiles against the whole."""

    def tiled() -> Tensor:
        with vae.tiling():
            return vae.encode(video)

    def whole() -> Tensor:
        return vae.encode(video)

    error = relative_error(tiled(), whole())
    report.metric("error_tiled", error, "relative error of its latents against the whole: tiles see less")
    note_memory(report, "whole", whole, vae.device)
    note_memory(report, "tiled", tiled, vae.device)
    return compare(f"tiled against whole, {name}", tiled, whole, rounds, vae.device, warmup=1)


def note_memory(report: Report, name: str, work: Callable[[], Any], device: torch.device) -> None:
    """The most that a piece of work holds on a GPU; a CPU does not tell."""
    if device.type != "cuda":
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    held = torch.cuda.max_memory_allocated(device) - before
    report.metric(f"gb_{name}", held / 1e9, "the most that it held at once, besides weights and input")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
