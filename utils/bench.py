"""What benchmarks share: a comparison in turns, what refuses a number, the machine, and the end of a report.

A ratio is ours over the peer's, so below 1 is faster. On a CPU the processor's own seconds of this process count, so that other
programs on the same cores disturb little; on a GPU the time between two CUDA events.
"""

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.report import Report, Verdict
from utils.timing import Timing, ratios, take_turns

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The distance between the quartiles of the ratios of all rounds, over their median, beyond which a ratio is not told.
MAX_SPREAD = 0.20
# More runnable processes per core than this are other programs: the benchmark itself is one.
_BUSY_LOAD = 0.75
HOW_TO_READ = """\
`ratio` is ours over the other's, turn by turn in one process, median of all rounds; below 1 is less. `low` and `high` are its
quartiles. Where they lie further apart than 20 % of the median the machine was too noisy, and there is no number. On a CPU the
seconds are the processor's own of this process, one thread; on a GPU they lie between two CUDA events. Seconds say nothing
about other machines.
"""


@dataclass(frozen=True)
class Comparison:
    """Two things that took turns."""

    name: str
    ours: Timing
    other: Timing

    @property
    def ratio(self) -> Timing:
        """Ours over the other's, round by round."""
        return ratios(self.ours, self.other)

    @property
    def is_noisy(self) -> bool:
        """Whether the ratios lie too far apart to be told."""
        return self.ratio.spread > MAX_SPREAD

    def row(self) -> dict[str, Any]:
        """The ratio first, then milliseconds; a noisy one without numbers, with the reason."""
        shown: dict[str, Any] = {"what": self.name}
        if self.is_noisy:
            reason = f"refused: ratios spread over {self.ratio.spread:.0%} of their median"
            return shown | dict.fromkeys(("ratio", "low", "high", "ours_ms", "other_ms")) | {"note": reason}
        low, high = self.ratio.quartiles
        return shown | {
            "ratio": round(self.ratio.median, 3),
            "low": round(low, 3),
            "high": round(high, 3),
            "ours_ms": round(1e3 * self.ours.median, 2),
            "other_ms": round(1e3 * self.other.median, 2),
            "note": "",
        }


def stopwatch(device: "torch.device") -> Callable[[Callable[[], object]], float]:
    """What runs a piece of work on a device and returns its seconds: CUDA events, or this process's processor time."""
    if device.type != "cuda":

        def by_processor(work: Callable[[], object]) -> float:
            started = time.process_time()
            work()
            return time.process_time() - started

        return by_processor

    import torch

    def by_events(work: Callable[[], object]) -> float:
        torch.cuda.synchronize(device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3

    return by_events


def compare(
    name: str,
    ours: Callable[[], object],
    other: Callable[[], object],
    rounds: int,
    device: "torch.device",
    warmup: int = 2,
) -> Comparison:
    """Time two things in turns."""
    taken = take_turns({"ours": ours, "other": other}, rounds, warmup=warmup, measure=stopwatch(device))
    return Comparison(name, taken["ours"], taken["other"])


def relative_error(value: "Tensor", reference: "Tensor") -> float:
    """L2 norm of the difference over that of the reference, in float64."""
    wide = reference.detach().double()
    return float((value.detach().double() - wide).norm() / wide.norm())


def check_agreement(what: str, value: "Tensor", reference: "Tensor", tolerance: float) -> float:
    """The relative error between two outputs that are to be compared in speed.

    Raises:
        UserError: it is over the tolerance, or not a number: nothing is timed then.
    """
    error = relative_error(value, reference)
    if not error <= tolerance:
        raise UserError(
            f"{what}: the two outputs differ by {error:.1e} (relative, L2), more than {tolerance:.1e}; what computes different "
            "things is not compared in speed: look for what changed"
        )
    return error


def machine_facts(device: "torch.device") -> dict[str, Any]:
    """Processor or GPU, cores, load, threads: what a number was measured on."""
    import torch

    facts: dict[str, Any] = {
        "device": str(device),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
    return facts


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    found = next((line for line in lines if line.startswith("model name")), "")
    return found.partition(":")[2].strip() or platform.machine()


def note_machine(report: Report, device: "torch.device") -> None:
    """Record the machine at the start, and whether other programs use it."""
    facts = machine_facts(device)
    report.metric("machine", facts, "what it ran on; load: the average of the last minute before it began")
    if facts["load"] > _BUSY_LOAD * (facts["cores"] or 1):
        report.note(
            f"measured on a busy machine: a load of {facts['load']} on {facts['cores']} cores before it began"
        )


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table for the terminal: the columns of the first row."""
    if not rows:
        return
    names = list(rows[0])
    cells = [names, *([_shown(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    for line in cells:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        sys.stdout.write(f"{text.rstrip()}\n")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)


def finish(report: Report, missed: Sequence[str], refused: Sequence[str], next_steps: str) -> Verdict:
    """Write the report and print where it is: fail for what misses a target, inconclusive for what could not be told."""
    verdict: Verdict = "fail" if missed else "inconclusive" if refused else "pass"
    parts = [f"over its target: {', '.join(missed)}"] if missed else []
    parts += [f"too noisy to tell: {', '.join(refused)}"] if refused else []
    explanation = "; ".join(parts) or "everything was measured, and what has a target keeps it"
    directory = report.write(verdict, explanation, HOW_TO_READ, next_steps)
    sys.stdout.write(f"{verdict}: {explanation}\nreport: {directory}\n")
    return verdict
