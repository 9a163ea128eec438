"""Bench: UMT5 as this project trains and caches it, against transformers' UMT5EncoderModel with the same weights.

    python -m scripts.bench.encoder
    python -m scripts.bench.encoder --only caching

Timed in turns: forward, and forward + backward with every block trained (float32 weights; in bfloat16 by autocast), at a
middle size and one block at the size of UMT5-XXL; outputs and gradients are compared first. Then caching: captions encoded in
batches of like length, as the cache fills, against the same batches padded to 512 tokens: prompts per second.

Writes reports/bench_encoder/<run_tag>/.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.wan.caching import LENGTH_STEP, TEXT_BATCH_SIZE
from models.wan.component_shapes import Umt5Sizes, expected_umt5_shapes
from models.wan.layer_memory import Workload
from models.wan.layers import text_layers
from models.wan.stages import TextWire
from models.wan.text_encoder import (
    MAX_TEXT_TOKENS,
    TextEncoder,
    WanTokenizer,
    load_umt5,
    pad_token_ids,
)
from scripts.bench import peers
from scripts.bench.random_weights import RandomSource
from utils.argument_types import positive_int
from utils.bench import Comparison, check_agreement, compare, finish, note_machine, print_rows
from utils.config.schema import DType, ModelConfig, OptimizerConfig, TrainConfig
from utils.devices import choose_device
from utils.probe_cli import add_flags, probe_parser, run_probe
from utils.report import Report, Verdict

TOOL = "bench_encoder"
QUESTION = "Does the text encoder cost what transformers' does, and caching no more than the captions need?"
NEXT_STEPS = "Over a target: profile that row on an idle machine."
# Not slower than the peer, whose blocks these are; and padding must never be cheaper.
MAX_RATIO = 1.0
# Measured 0 (bit-equal) on a CPU: tests/models/wan/test_text_encoder.py. Kernels of a GPU may differ by shape.
TOLERANCE: dict[DType, float] = {"float32": 1e-5, "bfloat16": 2e-2}
MIDDLE = Umt5Sizes(
    vocab_size=8192, d_model=512, num_heads=8, d_kv=64, d_ff=1280, num_layers=6, num_buckets=32
)
# google/umt5-xxl, one of its 24 blocks; the table, of which every token reads one row, is cut down.
XXL_BLOCK = Umt5Sizes(
    vocab_size=8192, d_model=4096, num_heads=64, d_kv=64, d_ff=10240, num_layers=1, num_buckets=32
)
# Lengths of captions in tokens: a sentence to a paragraph.
CAPTION_TOKENS = (8, 200)


@dataclass(frozen=True)
class Shape:
    """A model and a batch of it: captions of these lengths, padded to the longest."""

    name: str
    sizes: Umt5Sizes
    lens: tuple[int, ...]


SHAPES = (
    Shape("middle", MIDDLE, (128, 96, 60, 17)),
    Shape("one block of XXL", XXL_BLOCK, (32,)),
)


class Umt5Weights(RandomSource):
    """Random weights of which attention makes no near-choices: UMT5 divides no scores, its queries are small instead.

    The token table is exact in bfloat16, in which this project stores it where the blocks compute in it.
    """

    def __init__(self, sizes: Umt5Sizes, device: torch.device) -> None:
        super().__init__(expected_umt5_shapes(sizes), device)
        self._d_kv = sizes.d_kv

    def get(self, name: str) -> Tensor:
        """As `RandomSource.get`."""
        drawn = super().get(name)
        if name.endswith("attn.q.weight"):
            return drawn * self._d_kv**-0.5
        return drawn.bfloat16().float() if name == "token_embedding.weight" else drawn


class Ours:
    """This project's layers, every block trained, without recomputation."""

    def __init__(self, source: RandomSource, dtype: DType, device: torch.device) -> None:
        config = TrainConfig(
            output_dir="unused",
            dataset="unused",
            activation_checkpointing=False,
            model=ModelConfig(
                type="wan",
                ckpt_path="unused",
                dtype=dtype,
                cache_text_embeddings=False,
                train_text_encoder=True,
                freeze_transformer=True,
            ),
            optimizer=OptimizerConfig(lr=1e-5),
        )
        specs = text_layers(config, source, Workload(1.0, 64.0))
        self._model = nn.Sequential(*(spec.build(device) for spec in specs))
        self.parameters = [p for layer in list(self._model)[1:] for p in layer.parameters()]

    def states(self, ids_BL: Tensor, lens_B: Tensor) -> Tensor:
        """[B, L, D], zero behind each caption's end."""
        one = torch.zeros(1, device=ids_BL.device)
        wire = TextWire(ids_BL, lens_B, one, one, one.long())
        return TextWire(*self._model(tuple(wire))).text


class Peer:
    """transformers' UMT5EncoderModel, the same weights trained."""

    def __init__(self, source: RandomSource, dtype: DType, device: torch.device) -> None:
        self._model = load_umt5(source, torch.float32, device)
        self._dtype = getattr(torch, dtype)
        encoder = self._model.get_submodule("encoder")
        blocks, norm = encoder.get_submodule("block"), encoder.get_submodule("final_layer_norm")
        self.parameters = [p for module in (*blocks.children(), norm) for p in module.parameters()]
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def states(self, ids_BL: Tensor, lens_B: Tensor) -> Tensor:
        """As `Ours.states`."""
        mask_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device)[None, :] < lens_B[:, None]
        with torch.autocast(ids_BL.device.type, self._dtype, enabled=self._dtype != torch.float32):
            states = self._model(input_ids=ids_BL, attention_mask=mask_BL.long()).last_hidden_state
        result: Tensor = states * mask_BL.unsqueeze(-1)
        return result


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser(TOOL, __doc__ or "")
    add_flags(parser, "device")
    parser.add_argument(
        "--rounds", type=positive_int, default=9, help="counted rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--prompts_per_round", type=positive_int, default=48, help="captions encoded (default: %(default)s)"
    )
    parser.add_argument("--only", choices=("blocks", "caching"), help="this part alone (default: both)")
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Compare, time, write the report, print its lines."""
    device = choose_device(args.device)
    torch.set_num_threads(1)
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag, seed=0)
    note_machine(report, device)
    comparisons: list[Comparison] = []
    reason = peers.why_not("transformers")
    if reason is not None:
        report.note(reason)
        print(reason)
    elif args.only != "caching":
        comparisons += time_blocks(report, args.rounds, device)
    if args.only != "blocks":
        comparisons.append(time_caching(report, args.prompts_per_round, args.rounds, device))
    rows = [comparison.row() for comparison in comparisons]
    report.table("timed", rows, "Seconds of ours over those of the other", inline_rows=40)
    print_rows(rows)
    report.cap("max_ratio", MAX_RATIO, "ratio of each row; met where its lower quartile is not above")
    refused = [one.name for one in comparisons if one.is_noisy]
    missed = [one.name for one in comparisons if not one.is_noisy and one.ratio.quartiles[0] > MAX_RATIO]
    return finish(report, missed, refused, NEXT_STEPS)


def time_blocks(report: Report, rounds: int, device: torch.device) -> list[Comparison]:
    """Forward and both, each shape and dtype.

    Raises:
        UserError: outputs or gradients disagree.
    """
    comparisons, errors = [], []
    for shape in SHAPES:
        source = Umt5Weights(shape.sizes, device)
        ids_BL, lens_B = random_ids(shape.lens, shape.sizes.vocab_size, device)
        for dtype, tolerance in TOLERANCE.items():
            name = f"{shape.name}, {dtype}, {len(shape.lens)} x {max(shape.lens)} tokens"
            sides = [side(source, dtype, device) for side in (Ours, Peer)]
            steps = [Step(side, ids_BL, lens_B) for side in sides]
            (states, gradients), (other, others) = (step.both() for step in steps)
            mine, theirs = (torch.cat([g.flatten() for g in group]) for group in (gradients, others))
            errors.append(
                {
                    "what": name,
                    "output": check_agreement(f"{name}: output", states, other, tolerance),
                    "gradients": check_agreement(f"{name}: gradients", mine, theirs, tolerance),
                    "tolerance": tolerance,
                }
            )
            del states, other, gradients, others, mine, theirs
            ours, peer = steps
            comparisons += [
                compare(f"{name}: forward", ours.forward, peer.forward, rounds, device),
                compare(f"{name}: both", ours.both, peer.both, rounds, device),
            ]
    report.table("agreement", errors, "Relative errors before timing")
    return comparisons


class Step:
    """One side with its batch: a forward pass, and one with its backward pass."""

    def __init__(self, side: Ours | Peer, ids_BL: Tensor, lens_B: Tensor) -> None:
        self._side, self._batch = side, (ids_BL, lens_B)

    def forward(self) -> Tensor:
        """States, without a graph."""
        with torch.no_grad():
            return self._side.states(*self._batch)

    def both(self) -> tuple[Tensor, list[Tensor]]:
        """States, and gradients of all trained weights."""
        states = self._side.states(*self._batch)
        loss = states.float().square().mean()
        return states.detach(), list(torch.autograd.grad(loss, self._side.parameters))


def random_ids(lens: Sequence[int], vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids of captions of these lengths, padded to the longest, and the lengths."""
    random = torch.Generator().manual_seed(3)
    ids = [torch.randint(2, vocab_size, (length,), generator=random).tolist() for length in lens]
    ids_BL, lens_B = pad_token_ids(ids)
    return ids_BL.to(device), lens_B.to(device)


class IdWords(WanTokenizer):
    """Takes captions that are written as token ids: what is measured is the encoder."""

    def __init__(self) -> None:
        """Nothing is loaded."""

    def __call__(self, caption: str) -> list[int]:
        """`5 17 2` as three ids."""
        return [int(word) for word in caption.split()]


def time_caching(report: Report, num_prompts: int, rounds: int, device: torch.device) -> Comparison:
    """Captions in batches of like length, as the cache fills, against the same batches padded to 512 tokens.

    Raises:
        UserError: the states disagree.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = replace(XXL_BLOCK, num_layers=24) if device.type == "cuda" else MIDDLE
    random = torch.Generator().manual_seed(4)
    lens = torch.randint(*CAPTION_TOKENS, (num_prompts,), generator=random).tolist()
    captions = [
        " ".join(map(str, torch.randint(2, sizes.vocab_size, (length,), generator=random).tolist()))
        for length in lens
    ]
    batches = list(like_lengths(captions))
    with tempfile.TemporaryDirectory(prefix="bench_encoder_") as scratch:
        path = Path(scratch) / "umt5.safetensors"
        source = Umt5Weights(sizes, device)
        save_file({name: source.get(name).to("cpu", dtype) for name in source.shapes}, path)
        encoder = TextEncoder(path, IdWords(), dtype, device, "sdpa")
        padded = load_umt5(source, dtype, device)
    compared = [torch.cat(list(encoder.encode(batch))) for batch in batches]
    full = [torch.cat(encode_padded(padded, batch, device)) for batch in batches]
    tolerance = TOLERANCE["float32" if dtype == torch.float32 else "bfloat16"]
    error = check_agreement("caching: states", torch.cat(compared), torch.cat(full), tolerance)
    report.metric("caching_error", error, "relative error between the two, before timing")

    def ours() -> None:
        for batch in batches:
            list(encoder.encode(batch))

    def to_512() -> None:
        for batch in batches:
            encode_padded(padded, batch, device)

    found = compare("caching against padding to 512", ours, to_512, rounds, device, warmup=1)
    if not found.is_noisy:
        for name, timing in (("caching", found.ours), ("padded", found.other)):
            report.metric(
                f"{name}_prompts_per_second", num_prompts / timing.median, f"{num_prompts} captions"
            )
            print(f"{name}: {num_prompts / timing.median:.3g} prompts/s")
    return found


def like_lengths(captions: Sequence[str]) -> Iterator[list[str]]:
    """Batches as `WanCache.fill_text` makes them: by length in steps, at most so many captions."""
    tokenizer = IdWords()

    def step_of(caption: str) -> int:
        return len(tokenizer(caption)) // LENGTH_STEP

    for _, group in groupby(sorted(captions, key=step_of), key=step_of):
        alike = list(group)
        for first in range(0, len(alike), TEXT_BATCH_SIZE):
            yield alike[first : first + TEXT_BATCH_SIZE]


@torch.no_grad()
def encode_padded(model: Any, captions: Sequence[str], device: torch.device) -> list[Tensor]:
    """States at true lengths, encoded at the full 512 tokens as the official code does."""
    ids_BL, lens_B = pad_token_ids([IdWords()(caption) for caption in captions])
    ids_BL = nn.functional.pad(ids_BL, (0, MAX_TEXT_TOKENS - ids_BL.shape[1]))
    mask_BL = torch.arange(MAX_TEXT_TOKENS)[None, :] < lens_B[:, None]
    states = model(input_ids=ids_BL.to(device), attention_mask=mask_BL.long().to(device)).last_hidden_state
    return [row[:length].clone() for row, length in zip(states.cpu(), lens_B.tolist(), strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
