"""How long the closed-form translator takes, and how much memory, at the real sizes; on random weights, text states given.

    python scripts/bench/closed_form.py
    python scripts/bench/closed_form.py --variant t2v-a14b --num_prompts 1000 4000 --ranks 16 64

Every case is a process of its own, whose peak memory is asked for at its end (Python and torch included). The states of both
encoders are drawn at random, of which the time is not counted; everything after them is what scripts/solve_translator.py
does: text embedding, moments, all ridges, all targets, and the measuring of residuals. Weights are read from a file.

Writes reports/bench_closed_form/<run_tag>/.
"""

import argparse
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from models.wan.arch import PUBLISHED, WanArch, expected_shapes
from utils.argument_types import positive_int
from utils.errors import UserError
from utils.probe_cli import probe_parser, run_probe
from utils.report import Report, Verdict
from utils.sparse_weights import fill, tensor_spans, write_sparse_safetensors

TOOL = "bench_closed_form"
QUESTION = "Does the closed form of all targets of one DiT cost as little as it promises at the real sizes?"
# (seconds, 10^9 bytes) on 2 cores.
TARGETS = {"ti2v-5b": (120.0, 4.0), "t2v-a14b": (360.0, 8.0)}
_TOKENS_OF_A_PROMPT, _TOKENS_AT_ONCE = 20, 2048
_HELD_OUT, _DOMAIN = 40, 40
_WEIGHT_STD, _CHANGE = 0.02, 0.1
HOW_TO_READ = """\
`moments` is the text embedding of all tokens and the sums of their products; `solve` is everything after that, with the ridge
chosen by held-out prompts. `cpu_seconds` are the processor's, start of Python and drawing of states included: on cores that
others use too they say more than the clock. `gigabytes` is the largest resident memory of the process. Encoding the prompts is not in it: that is
two passes of the text encoder over all of them, which at the size of UMT5-XXL wants a GPU."""
NEXT_STEPS = "A figure over its target while nothing else runs is a slower solver: compare with an older commit on this machine."


@dataclass(frozen=True)
class Case:
    """What one process does."""

    variant: str
    dim: int
    num_layers: int
    num_prompts: int
    rank: int
    threads: int


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser(TOOL, __doc__ or "")
    parser.add_argument(
        "--variant", choices=sorted(TARGETS), default="ti2v-5b", help="whose sizes (default: %(default)s)"
    )
    parser.add_argument("--dim", type=positive_int, help="another width of the DiT")
    parser.add_argument("--num_layers", type=positive_int, help="another number of blocks")
    parser.add_argument(
        "--num_prompts",
        type=positive_int,
        nargs="+",
        default=[4000],
        metavar="N",
        help=f"neutral prompts, {_TOKENS_OF_A_PROMPT} tokens each (default: %(default)s)",
    )
    parser.add_argument(
        "--ranks", type=positive_int, nargs="+", default=[16], metavar="R", help="default: %(default)s"
    )
    parser.add_argument("--threads", type=positive_int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--scratch", metavar="DIR", help="where the temporary folder is made (default: the system's)"
    )
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Measure every case and write the report."""
    real = PUBLISHED[args.variant]
    dim, num_layers = args.dim or real.dim, args.num_layers or real.num_layers
    report = Report(TOOL, QUESTION, args.reports_dir, args.run_tag, 0)
    cases = [
        Case(args.variant, dim, num_layers, num_prompts, rank, args.threads)
        for num_prompts in args.num_prompts
        for rank in args.ranks
    ]
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix=f"{TOOL}_") as scratch:
        write_weights(Path(scratch), sized(args.variant, dim, num_layers))
        for case in cases:
            rows.append(asdict(case) | run_case(case, Path(scratch)))
            print(rows[-1])
    is_real = (dim, num_layers) == (real.dim, real.num_layers)
    max_seconds, max_gigabytes = TARGETS[args.variant]
    slowest, largest = max(row["seconds"] for row in rows), max(row["gigabytes"] for row in rows)
    if is_real:
        report.cap("max_seconds", max_seconds, "all targets of one DiT, text states given, on 2 cores")
        report.cap("max_gigabytes", max_gigabytes, "the process's peak")
    report.metric("seconds", slowest, "the slowest case")
    report.metric("gigabytes", largest, "the case that needs most")
    report.table("cases", rows, "Cases")
    over = is_real and (slowest > max_seconds or largest > max_gigabytes)
    verdict: Verdict = "fail" if over else "pass"
    sizes = f"{args.variant}, width {dim}, {num_layers} blocks"
    explanation = f"{sizes}: at most {slowest:.0f} s and {largest:.2f} GB in {len(rows)} case(s)."
    directory = report.write(verdict, explanation, HOW_TO_READ, NEXT_STEPS)
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def sized(variant: str, dim: int, num_layers: int) -> WanArch:
    """The published sizes with another width or depth."""
    return replace(PUBLISHED[variant], dim=dim, num_layers=num_layers)


def write_weights(scratch: Path, arch: WanArch) -> None:
    """Text embedding and cross-attention's keys and values of a DiT in float32, as published.

    Raises:
        UserError: the disk has no room for them.
    """
    import numpy as np

    read = ("text_embedding.", *(f"{module}." for module in targets_of(arch)))
    # Nothing else: the whole of an A14B expert in one file of float32 is more than a machine of 24 GiB maps.
    shapes = {name: shape for name, shape in expected_shapes(arch).items() if name.startswith(read)}
    needed = 2 * arch.num_layers * arch.dim**2 * 4 + arch.dim * (arch.dim + arch.text_dim) * 4
    free = shutil.disk_usage(scratch).free
    if free < 1.1 * needed:
        raise UserError(
            f"{scratch}: {needed / 1e9:.1f} GB are needed there for the weights and {free / 1e9:.1f} GB are free; name another "
            "place with --scratch, or give fewer --num_layers"
        )
    path = scratch / "dit.safetensors"
    write_sparse_safetensors(path, shapes, "F32")
    spans = tensor_spans(path)
    draws = np.random.default_rng(0)
    for name, scale in (("text_embedding.0", arch.text_dim), ("text_embedding.2", arch.dim)):
        values = draws.standard_normal(shapes[f"{name}.weight"], np.float32) * np.float32(scale**-0.5)
        fill([spans[f"{name}.weight"]], values.tobytes())
        bias = draws.standard_normal(arch.dim, np.float32) * np.float32(_WEIGHT_STD)
        fill([spans[f"{name}.bias"]], bias.tobytes())
    for module in targets_of(arch):
        values = draws.standard_normal((arch.dim, arch.dim), np.float32) * np.float32(_WEIGHT_STD)
        fill([spans[f"{module}.weight"]], values.tobytes())


def targets_of(arch: WanArch) -> list[str]:
    """All keys and values."""
    return [f"blocks.{block}.cross_attn.{name}" for block in range(arch.num_layers) for name in "kv"]


def run_case(case: Case, scratch: Path) -> dict[str, float]:
    """One case in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, case, scratch).result()


def measure(case: Case, scratch: Path) -> dict[str, float]:
    """Seconds and the peak of this process."""
    import torch

    from models.wan.closed_form.fit_moments import Collector
    from models.wan.closed_form.fit_prompts import FitPlan, FitPrompt
    from models.wan.closed_form.fit_search import Caps, fit
    from models.wan.closed_form.fit_solve import Solver
    from models.wan.probes.encoder_drift import load_text_embedding
    from utils.tensor_source import open_safetensors

    torch.set_num_threads(case.threads)
    arch, device = sized(case.variant, case.dim, case.num_layers), torch.device("cpu")
    kinds = [FitPrompt("", "anchor")]
    kinds += [FitPrompt("", "neutral", True)] * _HELD_OUT + [FitPrompt("", "neutral")] * case.num_prompts
    kinds += [FitPrompt("", "domain")] * _DOMAIN
    seconds = 0.0
    random = torch.Generator().manual_seed(0)
    collector = Collector(
        FitPlan(tuple(kinds)),
        load_text_embedding(scratch / "dit.safetensors", arch.text_dim),
        arch.text_dim,
        device,
    )
    mixing = torch.randn(arch.text_dim, 64, generator=random) @ torch.randn(
        64, arch.text_dim, generator=random
    )
    mixing *= _CHANGE / arch.text_dim**0.5 / 8
    per_time = _TOKENS_AT_ONCE // _TOKENS_OF_A_PROMPT
    with torch.no_grad():
        for start in range(0, len(kinds), per_time):
            prompts = kinds[start : start + per_time]
            base = torch.randn(len(prompts) * _TOKENS_OF_A_PROMPT, arch.text_dim, generator=random)
            tuned = (1 + _CHANGE) * base + base @ mixing
            states = (base.split(_TOKENS_OF_A_PROMPT), tuned.split(_TOKENS_OF_A_PROMPT))
            began = time.perf_counter()
            collector.add(prompts, *states)
            seconds += time.perf_counter() - began
        began = time.perf_counter()
        source = open_safetensors([scratch / "dit.safetensors"])
        solver = Solver(collector.result(), source, targets_of(arch), case.rank, 1.0, device)
        found = fit(solver, None, Caps())
        solving = time.perf_counter() - began
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "moments_seconds": round(seconds, 1),
        "solve_seconds": round(solving, 1),
        "seconds": round(seconds + solving, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "gigabytes": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "recovery": round(found.chosen.recovery, 3),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and return the exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
