"""How fast the probes are at the real size of A14B, on files made on the spot.

    python scripts/bench/probes.py
    python scripts/bench/probes.py --num_layers 8      # a fifth of the disk and of the time

1. weights_inspect on both experts, all header and no data: seconds and memory of the whole command.
2. ||B A|| by Gram matrices against forming B A: time, and bytes of the tensors made on the way.
3. lora_delta_budget with an adapter on every cross_attn.{k,v}: without and with the table of base norms, against one plain
   read of the adapted tensors. These have values: 8.4 GB at the real size, deleted at the end.
4. What a budget check in training costs, as a share of a step. No such step runs here: its time is its FLOPs over the
   matrix multiplication speed of this machine, which is what it would take at the very least.

Writes reports/bench_probes/<run_tag>/.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from models.wan.arch import PUBLISHED, WanArch, expected_shapes
from models.wan.checkpoint import EXPERT_DIRS
from models.wan.costs import dit_block_backward_flops, dit_block_flops
from utils.errors import UserError
from utils.probe_cli import probe_parser, run_probe
from utils.report import Report, Verdict
from utils.sparse_weights import Span, fill, read_plainly, write_sparse_shards
from utils.timing import Timing, ratios, take_turns

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
INSPECT, BUDGET = (
    ROOT / "scripts/diagnostics" / name for name in ("weights_inspect.py", "lora_delta_budget.py")
)
MAX_INSPECT_SECONDS, MAX_INSPECT_MB = 1.0, 300.0
MIN_GRAM_SPEED_UP = 50.0
MAX_CACHED_SECONDS, MAX_READ_RATIO, MAX_CHECK_SHARE = 2.0, 2.0, 0.01
# Video tokens of a clip of 832 x 480 px and 49 frames, the smallest that is usual for A14B.
VIDEO_TOKENS = 20_280
# An assumption, nothing that was measured: what one GPU sustains in bfloat16.
ASSUMED_GPU_FLOPS = 400e12
# As published: float32, in six shards.
_DTYPE, _NUM_SHARDS, _SHARD_PREFIX = "F32", 6, "diffusion_pytorch_model"
_WEIGHT_STD, _UP_STD = 0.02, 1e-4
_READ_BYTES = 8 << 20
HOW_TO_READ = """
Seconds are those of whole commands, from the start of Python to its end, on this machine with the files in memory: run it
with nothing else running. `read_ratio` is lora_delta_budget without a table over a plain read of the same tensors (the
start of Python is taken off, it reads nothing); `gram_speed_up` compares in turn within one process. `check_share` is a
check that was measured over a step that was **not**: the step is arithmetic (FLOPs over the speed of a float32 matrix
multiplication here, one thread for both), so the true share is smaller. `check_share_on_gpu` divides the same check, on this
processor, by a step at an assumed speed, and says no more than where the check would begin to matter.
"""
NEXT_STEPS = "A figure over its cap while nothing else runs is a slower probe: compare with an older commit on this machine."


@dataclass(frozen=True)
class Usage:
    """The most memory that a command held, and the processor time that it took."""

    megabytes: float
    cpu_seconds: float


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = probe_parser("bench_probes", __doc__ or "")
    real = PUBLISHED["t2v-a14b"]
    parser.add_argument("--dim", type=int, default=real.dim, help="width of the DiT (default: %(default)s)")
    parser.add_argument("--ffn_dim", type=int, default=real.ffn_dim, help="of its ffn (default: %(default)s)")
    parser.add_argument(
        "--num_layers", type=int, default=real.num_layers, help="its blocks (default: %(default)s)"
    )
    parser.add_argument("--rank", type=int, default=32, help="of the adapter (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds (default: %(default)s)")
    parser.add_argument(
        "--scratch", metavar="DIR", help="where the temporary folder is made (default: the system's)"
    )
    return parser


def probe(args: argparse.Namespace) -> Verdict:
    """Measure, write the report, print its lines."""
    question = "Do the probes cost as little as they promise at the size of real checkpoints?"
    report = Report("bench_probes", question, args.reports_dir, args.run_tag)
    arch = replace(PUBLISHED["t2v-a14b"], dim=args.dim, ffn_dim=args.ffn_dim, num_layers=args.num_layers)
    report.metric("sizes", {"dim": arch.dim, "ffn_dim": arch.ffn_dim, "num_layers": arch.num_layers})
    report.metric("rank", args.rank)
    missed: list[str] = []
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="bench_probes_") as scratch:
        missed += bench_inspect(report, Path(scratch) / "inspect", arch, args.repeats)
        missed += bench_gram(report, arch.dim, args.rank, args.repeats)
        missed += bench_budget(report, Path(scratch) / "budget", arch, args.rank, args.repeats)
        missed += bench_check(report, arch, args.rank, args.repeats)
    verdict: Verdict = "fail" if missed else "pass"
    explanation = (
        f"Over its cap: {', '.join(missed)}." if missed else "Everything measured is within its cap."
    )
    directory = report.write(verdict, explanation, HOW_TO_READ, NEXT_STEPS)
    print(f"{verdict}: {explanation}\nreport: {directory}")
    return verdict


def bench_inspect(report: Report, scratch: Path, arch: WanArch, repeats: int) -> list[str]:
    """weights_inspect on both experts, as a command."""
    if not INSPECT.is_file():
        report.note(f"{INSPECT.name} is not there: not measured")
        print(f"{INSPECT.name} is not there: not measured")
        return []
    for folder in EXPERT_DIRS.values():
        write_expert(scratch / "a14b" / folder, arch)

    def inspect() -> Usage:
        return run_command(INSPECT, scratch, "--base", scratch / "a14b")

    megabytes = inspect().megabytes
    seconds = timed({"inspect": inspect}, repeats)["inspect"]
    shutil.rmtree(scratch)
    report.metric("inspect_seconds", seconds.median, "weights_inspect on both experts, the whole command")
    report.metric("inspect_mb", megabytes, "the most memory that it held")
    report.cap("max_inspect_seconds", MAX_INSPECT_SECONDS)
    report.cap("max_inspect_mb", MAX_INSPECT_MB)
    print(f"weights_inspect on both experts: {shown(seconds)}, {megabytes:.0f} MB")
    return over(
        ("seconds of weights_inspect", seconds.median > MAX_INSPECT_SECONDS),
        ("memory of weights_inspect", megabytes > MAX_INSPECT_MB),
    )


def bench_gram(report: Report, dim: int, rank: int, repeats: int) -> list[str]:
    """The norm of one module's B A, both ways."""
    import torch

    from utils.delta_budget import delta_norm, weight_norm

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, dim, generator=generator), torch.randn(dim, rank, generator=generator)

    def by_gram() -> float:
        return delta_norm(a, b)

    def formed() -> float:
        # The squares have to be summed in float64: in float32 this norm was 1.5e-3 off.
        return weight_norm(b @ a)

    difference = abs(by_gram() / formed() - 1)
    assert difference < 1e-4, f"the two norms differ by {difference:.1e}"
    taken = take_turns({"gram": by_gram, "formed": formed}, 10 * repeats)
    speed_up = ratios(taken["formed"], taken["gram"])
    bytes_gram, bytes_formed = bytes_made(by_gram), bytes_made(formed)
    report.metric(
        "gram_ms", 1e3 * taken["gram"].median, f"||B A|| of one module at rank {rank} by Gram matrices"
    )
    report.metric("formed_ms", 1e3 * taken["formed"].median, "the same by forming B A in float32")
    report.metric("gram_speed_up", speed_up.median, "how many times faster, turn by turn")
    report.metric("gram_bytes", bytes_gram, "of all tensors made on the way")
    report.metric("formed_bytes", bytes_formed, "the same for B A")
    report.cap("min_gram_speed_up", MIN_GRAM_SPEED_UP)
    print(
        f"||B A|| of [{dim}, {dim}] at rank {rank}: {speed_up.median:.0f} x ({speed_up.low:.0f}-{speed_up.high:.0f}) faster, "
        f"{bytes_gram / 1e3:,.0f} kB instead of {bytes_formed / 1e6:,.1f} MB"
    )
    return over(("the norm by Gram matrices", speed_up.median < MIN_GRAM_SPEED_UP))


def bench_budget(report: Report, scratch: Path, arch: WanArch, rank: int, repeats: int) -> list[str]:
    """lora_delta_budget as a command, against a plain read of what it has to read."""
    modules = target_modules(arch)
    scratch.mkdir()
    check_space(scratch, len(modules) * arch.dim * arch.dim * 4)
    every = write_expert(scratch / "base", arch)
    spans = [every[f"{module}.weight"] for module in modules]
    values = np.random.default_rng(0).standard_normal((arch.dim, arch.dim), np.float32)
    fill(spans, (values * np.float32(_WEIGHT_STD)).tobytes())
    write_adapter(scratch / "adapter.safetensors", arch, rank)
    buffer = memoryview(bytearray(_READ_BYTES))
    # A first table, so that the runs with it only read it.
    arguments = ("--adapter", scratch / "adapter.safetensors", "--base", scratch / "base")
    run_command(BUDGET, scratch, *arguments, cache=scratch / "kept")

    def without_table() -> None:
        with tempfile.TemporaryDirectory(dir=scratch) as cache:
            run_command(BUDGET, scratch, *arguments, cache=Path(cache))

    cpu_seconds: list[float] = []

    def with_table() -> None:
        cpu_seconds.append(run_command(BUDGET, scratch, *arguments, cache=scratch / "kept").cpu_seconds)

    taken = timed(
        {
            "plain": lambda: read_plainly(spans, buffer),
            "without": without_table,
            "with": with_table,
        },
        repeats,
    )
    # What both runs of the probe have in common, Python's start above all, reads no base tensor.
    reading = Timing(
        tuple(cold - warm for cold, warm in zip(taken["without"].seconds, taken["with"].seconds, strict=True))
    )
    ratio = ratios(reading, taken["plain"])
    num_bytes = sum(span.length for span in spans)
    report.metric(
        "read_seconds", taken["plain"].median, f"to read {num_bytes / 1e9:.1f} GB of adapted tensors"
    )
    report.metric(
        "budget_seconds", taken["without"].median, "lora_delta_budget without a table of base norms"
    )
    report.metric("budget_cached_seconds", taken["with"].median, "the same with the table")
    report.metric(
        "budget_cached_cpu_seconds",
        median(cpu_seconds),
        "processor time of that, which other programs do not change",
    )
    report.metric("read_ratio", ratio.median, "what measuring the base adds, over the plain read")
    report.cap("max_budget_cached_seconds", MAX_CACHED_SECONDS)
    report.cap("max_read_ratio", MAX_READ_RATIO)
    print(
        f"lora_delta_budget, {len(modules)} modules: {shown(taken['without'])}; with the table {shown(taken['with'])}, "
        f"{median(cpu_seconds):.3g} s of the processor; plain "
        f"read of {num_bytes / 1e9:.1f} GB {shown(taken['plain'])}; reading and norms {ratio.median:.2f} x that"
    )
    shutil.rmtree(scratch)
    return over(
        ("lora_delta_budget with the table", taken["with"].median > MAX_CACHED_SECONDS),
        ("reading the base", ratio.median > MAX_READ_RATIO),
    )


def bench_check(report: Report, arch: WanArch, rank: int, repeats: int) -> list[str]:
    """A budget check of all targets, as a share of a step by arithmetic."""
    import torch

    from utils.delta_budget import module_delta

    torch.set_num_threads(1)
    modules = target_modules(arch)
    a = [torch.nn.Parameter(torch.randn(rank, arch.dim)) for _ in modules]
    b = [torch.nn.Parameter(torch.randn(arch.dim, rank)) for _ in modules]

    def check() -> None:
        for module, down, up in zip(modules, a, b, strict=True):
            module_delta(module, down, up, 1.0, 1.0)

    rows, weight = torch.randn(1024, arch.dim), torch.randn(arch.dim, arch.dim)

    def multiply() -> "Tensor":
        return rows @ weight

    taken = take_turns({"check": check, "multiply": multiply}, repeats)
    speed = 2 * rows.shape[0] * arch.dim**2 / taken["multiply"].median
    flops = step_flops(arch)
    share = taken["check"].median / (flops / speed)
    share_on_gpu = taken["check"].median / (flops / ASSUMED_GPU_FLOPS)
    report.metric(
        "check_seconds", taken["check"].median, f"a budget check of {len(modules)} modules, measured"
    )
    report.metric("step_tflop", flops / 1e12, f"a step of {VIDEO_TOKENS:,} video tokens, by arithmetic")
    report.metric("matmul_gflops", speed / 1e9, "a float32 matrix multiplication here, one thread, measured")
    report.metric("check_share", share, "check_seconds over step_tflop at matmul_gflops: an estimate")
    report.metric(
        "check_share_on_gpu",
        share_on_gpu,
        f"the same at {ASSUMED_GPU_FLOPS / 1e12:.0f} TFLOP/s: an assumption, no GPU was used",
    )
    report.cap("max_check_share", MAX_CHECK_SHARE)
    print(
        f"budget check of {len(modules)} modules: {shown(taken['check'])}; of a step by arithmetic "
        f"({flops / 1e12:,.0f} TFLOP): {share:.1e} here, {share_on_gpu:.2%} at an assumed {ASSUMED_GPU_FLOPS / 1e12:.0f} TFLOP/s"
    )
    return over(("the budget check", share > MAX_CHECK_SHARE))


def step_flops(arch: WanArch) -> float:
    """One sample's step on `cross_attn.{k,v}` of every block: forward, forward again (checkpointing), backward."""
    adapted = ("cross_attn.k", "cross_attn.v")
    flops = 0.0
    for block in range(arch.num_layers):
        flops += 2 * dit_block_flops(arch, VIDEO_TOKENS)
        flops += dit_block_backward_flops(
            arch, VIDEO_TOKENS, adapted, hidden_wants_gradient=block > 0, text_wants_gradient=False
        )
    return flops


def target_modules(arch: WanArch) -> list[str]:
    """`cross_attn.{k,v}` of every block: what this project adapts by default."""
    return [f"blocks.{block}.cross_attn.{name}" for block in range(arch.num_layers) for name in "kv"]


def write_expert(directory: Path, arch: WanArch) -> dict[str, Span]:
    """One DiT with its index and config, without data; returns where each tensor would be."""
    spans = write_sparse_shards(directory, _SHARD_PREFIX, expected_shapes(arch), _DTYPE, _NUM_SHARDS)
    (directory / "config.json").write_text(json.dumps(arch.to_config_json()), encoding="utf-8")
    return spans


def write_adapter(path: Path, arch: WanArch, rank: int) -> None:
    """An adapter on all targets, as this project saves one: float32, scale 1."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module in target_modules(arch):
        stem = f"diffusion_model.{module}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, arch.dim, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(arch.dim, rank, generator=generator) * _UP_STD
    save_file(tensors, path)


def check_space(directory: Path, num_bytes: int) -> None:
    """Refuse to fill a disk.

    Raises:
        UserError: less than this, and a tenth more, is free there.
    """
    free = shutil.disk_usage(directory).free
    if free < 1.1 * num_bytes:
        raise UserError(
            f"{directory}: {num_bytes / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free; give another place "
            "with --scratch, or fewer blocks with --num_layers"
        )


def run_command(script: Path, scratch: Path, *arguments: object, cache: Path | None = None) -> Usage:
    """Run a probe as a person would, and throw its report away.

    Raises:
        RuntimeError: it ended with an error.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache or scratch / "cache")}
    reports = scratch / "reports"
    command = [sys.executable, str(script), *map(str, arguments), "--reports_dir", str(reports)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=ROOT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().decode()
    shutil.rmtree(reports, ignore_errors=True)
    if process.returncode not in (0, 1, 3):
        raise RuntimeError(f"{script.name} ended with {process.returncode}: {text[-500:]}")
    return Usage(usage.ru_maxrss * 1024 / 1e6, usage.ru_utime + usage.ru_stime)


def bytes_made(work: Callable[[], object]) -> int:
    """Bytes of all tensors that operations make while `work` runs; views count nothing."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            given = {entry.untyped_storage().data_ptr() for entry in args if isinstance(entry, torch.Tensor)}
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
                self.total += result.numel() * result.element_size()
            return result

    with Count() as count:
        work()
    return count.total


def timed(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Wall-clock seconds in turns."""
    return take_turns(variants, repeats, clock=time.perf_counter)


def over(*outcomes: tuple[str, bool]) -> list[str]:
    """The names of what is over its cap."""
    return [name for name, is_over in outcomes if is_over]


def shown(timing: Timing) -> str:
    """Median and range."""
    return f"{timing.median:.3g} s ({timing.low:.3g}-{timing.high:.3g})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit status."""
    return run_probe(build_parser(), probe, argv)


if __name__ == "__main__":
    sys.exit(main())
