"""Bench: what sampling gains where the DiT makes embedding, keys and values of its texts once for all steps.

    python -m scripts.bench.sampling
    python -m scripts.bench.sampling --device cuda

Timed in turns within one process, random weights: whole samples with guidance (two texts) that keep what is made of the texts
against the same samples that make it in every pass, for grids like pictures and like clips. The latents must have the same bits,
or nothing is timed. Beside each ratio stands the one that FLOPs predict (models/wan/costs.py); a second table has it for the
published sizes, and what is kept of one text; a third what training makes a second time where it recomputes.

Writes reports/bench_sampling/<run_tag>/.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.wan.arch import PUBLISHED, VARIANTS, WanArch, expected_shapes
from models.wan.costs import dit_block_flops, dit_head_flops, dit_input_flops, dit_text_flops
from models.wan.denoisers import LayeredDit, sampling_config
from models.wan.layer_memory import Workload
from models.wan.layers import dit_layers
from models.wan.sampling import sample_latents
from models.wan.sampling_settings import SamplingSettings, official_settings
from scripts.bench.dit_block import grids
from scripts.bench.random_weights import RandomSource
from utils.argument_types import positive_int
from utils.bench import check_agreement, compare, finish, note_machine, print_rows
from utils.config.schema import AdapterConfig, ModelConfig, OptimizerConfig, TrainConfig
from utils.devices import choose_device
from utils.lora_targets import linear_modules, resolve_targets
from utils.probe_cli import add_flags, probe_parser, run_probe
from utils.report import Report, Verdict
from utils.stage_plan import make_plan

TOOL = "bench_sampling"
QUESTION = "What does sampling gain where the text's keys and values are made once for all steps?"
NEXT_STEPS = (
    "Where the ratio is well above the predicted one, look at what a pass does beside matrix products."
)
VARIANT = VARIANTS["ti2v-5b"]
_SIZES = PUBLISHED[VARIANT.name]
SIZES: dict[str, WanArch] = {
    "cpu": replace(_SIZES, dim=256, ffn_dim=1024, num_heads=2, num_layers=2, text_dim=256),
    "cuda": _SIZES,
}
GRIDS = {"cpu": "1x8x8,1x16x16,8x16x16", "cuda": "1x15x26,1x22x40,13x15x26"}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
# Tokens of a prompt and of the negative one; the DiT pads both.
LENGTHS = (20, 60)
# Published sizes: variant, what is drawn, video tokens.
REAL = (
    ("ti2v-5b", "832x480, a picture", 390),
    ("ti2v-5b", "1280x704, a picture", 880),
    ("ti2v-5b", "832x480, 49 frames", 5_070),
    ("ti2v-5b", "1280x704, 121 frames", 27_280),
    ("t2v-a14b", "832x480, a picture", 1_560),
    ("t2v-a14b", "832x480, 49 frames", 20_280),
)
TRAINED = (("ti2v-5b", 27_280), ("ti2v-5b", 5_070), ("ti2v-5b", 390), ("t2v-a14b", 20_280))
_BFLOAT16_BYTES = 2


@dataclass(frozen=True)
class Case:
    """Samples of one grid by one DiT of random weights."""

    dit: LayeredDit
    arch: WanArch
    settings: SamplingSettings
    texts: tuple[Tensor, Tensor]
    device: torch.device

    def draw(self, reuse: bool) -> Tensor:
        """Latents of one sample."""
        text, negative = self.texts
        return sample_latents(
            self.dit,
            [text],
            [0],
            replace(self.settings, reuse_text_keys=reuse),
            negative_states=negative,
            device=self.device,
        )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser(TOOL, __doc__ or "")
    add_flags(parser, "device")
    parser.add_argument(
        "--rounds", type=positive_int, default=7, help="counted rounds (default: %(default)s)"
    )
    parser.add_argument("--steps", type=positive_int, default=4, help="of a sample (default: %(default)s)")
    parser.add_argument(
        "--grids", type=grids, help=f"frames x rows x columns of tokens (default on a CPU: {GRIDS['cpu']})"
    )
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Compare, time, predict, write the report, print its lines.

    Raises:
        UserError: the latents are not the same.
    """
    device = choose_device(args.device)
    torch.set_num_threads(1)
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag, seed=0)
    note_machine(report, device)
    arch, dtype = SIZES[device.type], DTYPES[device.type]
    dit = random_dit(arch, dtype, device)
    rows, refused = [], []
    for grid in args.grids or grids(GRIDS[device.type]):
        case = Case(dit, arch, settings_of(grid, args.steps), random_texts(arch, device), device)
        tokens = grid[0] * grid[1] * grid[2]
        name = f"{tokens:,} tokens, {args.steps} steps, {dtype}"
        kept, anew = partial(case.draw, True), partial(case.draw, False)
        check_agreement(name, kept(), anew(), 0.0)
        comparison = compare(name, kept, anew, args.rounds, device, warmup=1)
        rows.append(comparison.row() | {"predicted": round(predicted_ratio(arch, tokens, args.steps), 3)})
        refused += [name] if comparison.is_noisy else []
    report.table(
        "timed", rows, "Seconds of samples that keep what is made of the texts, over those that do not"
    )
    print_rows(rows)
    report.table("predicted", predictions(), "By FLOPs, at the published sizes and numbers of steps")
    print_rows(predictions())
    report.table("trained", trainings(), "By FLOPs, what recomputation makes a second time in training")
    print_rows(trainings())
    return finish(report, [], refused, NEXT_STEPS)


def predicted_ratio(arch: WanArch, tokens: int, steps: int) -> float:
    """FLOPs of a sample whose experts make what depends on the text once each, over those where each step makes it."""
    makings = min(steps, 2 if arch.variant.has_experts else 1)
    whole = arch.num_layers * dit_block_flops(arch, tokens)
    whole += dit_input_flops(arch, tokens) + dit_head_flops(arch, tokens)
    return 1.0 - (1.0 - makings / steps) * dit_text_flops(arch) / whole


def kept_bytes(arch: WanArch, itemsize: int) -> int:
    """Of one text of one sample: keys and values of every block, and the embedding."""
    return (2 * arch.num_layers + 1) * arch.text_len * arch.dim * itemsize


def predictions() -> list[dict[str, Any]]:
    """The published sizes."""
    rows = []
    for name, drawn, tokens in REAL:
        arch, steps = PUBLISHED[name], official_settings(VARIANTS[name]).steps
        rows.append(
            {
                "model": name,
                "drawn": drawn,
                "tokens": tokens,
                "steps": steps,
                "ratio": round(predicted_ratio(arch, tokens, steps), 4),
                "kept_mb_per_text": round(kept_bytes(arch, _BFLOAT16_BYTES) / 1e6, 1),
            }
        )
    return rows


def trainings() -> list[dict[str, Any]]:
    """Steps of one sample with adapters on all keys and values: what recomputing those of the text costs, and what it saves."""
    rows = []
    for name, tokens in TRAINED:
        arch = PUBLISHED[name]
        again = 2.0 * arch.num_layers * arch.text_len * 2 * arch.dim**2
        config = config_of("bfloat16", AdapterConfig())
        source = RandomSource(expected_shapes(arch), torch.device("cpu"))
        targets = resolve_targets(linear_modules(source.shapes), AdapterConfig(), None)
        specs = dit_layers(config, source, arch, targets, {}, Workload(float(tokens), float(arch.text_len)))
        step = sum(make_plan(specs, config, None).partition.stage_costs)
        kept = 2 * arch.num_layers * arch.text_len * arch.dim * _BFLOAT16_BYTES
        rows.append(
            {
                "model": name,
                "tokens": tokens,
                "again_tflop": round(again / 1e12, 2),
                "step_tflop": round(step / 1e12, 1),
                "share": round(again / step, 5),
                "kept_mb": round(kept / 1e6, 1),
            }
        )
    return rows


def settings_of(grid: tuple[int, int, int], steps: int) -> SamplingSettings:
    """A guided sample whose video tokens are this grid."""
    frames, rows, columns = grid
    multiple = VARIANT.pixel_multiple
    return replace(
        official_settings(VARIANT),
        width=columns * multiple,
        height=rows * multiple,
        num_frames=(frames - 1) * VARIANT.vae_stride[0] + 1,
        steps=steps,
    )


def config_of(dtype: str, adapter: AdapterConfig | None) -> TrainConfig:
    """A training of files that are not there."""
    model = ModelConfig(
        type="wan",
        ckpt_path="random",
        dtype=dtype,  # type: ignore[arg-type]
        cache_text_embeddings=True,
        train_text_encoder=False,
        freeze_transformer=True,
    )
    return TrainConfig(
        output_dir="unused",
        dataset="unused",
        model=model,
        adapter=adapter,
        optimizer=OptimizerConfig(lr=1e-3),
    )


def random_dit(arch: WanArch, dtype: str, device: torch.device) -> LayeredDit:
    """A DiT as sampling opens one, with random weights."""
    config = config_of(dtype, None)
    source = RandomSource(expected_shapes(arch), device)
    specs = dit_layers(
        sampling_config(config, config.model), source, arch, (), {}, Workload(1.0, float(arch.text_len))
    )
    return LayeredDit(specs, device)


def random_texts(arch: WanArch, device: torch.device) -> tuple[Tensor, Tensor]:
    """States of a prompt and of a negative one."""
    random = torch.Generator().manual_seed(7)
    text, negative = (torch.randn(length, arch.text_dim, generator=random).to(device) for length in LENGTHS)
    return text, negative


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
