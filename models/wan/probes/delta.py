"""How far an adapter moves the weights of a DiT: measured on the files, and judged against caps.

No product B A is ever formed and no model built. Of the base, only the adapted tensors are read, one at a time, and
those only once for each checkpoint (`utils.base_norms`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.wan.probes.subject import (
    Cap,
    Subject,
    base_remarks,
    choose_cap,
    choose_optional_cap,
    read_fitting_adapter,
)
from utils.base_norms import BaseNorms
from utils.errors import UserError
from utils.lora_names import KOHYA_PREFIX, AdapterFile
from utils.report_summary import Verdict
from utils.tensor_source import TensorSource, open_safetensors

if TYPE_CHECKING:
    from utils.delta_budget import ModuleDelta

# Far weaker than rounding the weights to bfloat16, which moves them by about 1.6e-3.
WEAK_RATIO = 1e-4


@dataclass(frozen=True)
class DeltaCaps:
    """The limits: on each module, on the mean of all (None: none), and the ratio below which a module does hardly anything."""

    max_ratio: Cap
    max_mean_ratio: Cap | None = None
    weak_ratio: float = WEAK_RATIO


def choose_caps(
    subject: Subject, max_ratio: float | None, max_mean_ratio: float | None, weak_ratio: float = WEAK_RATIO
) -> DeltaCaps:
    """The caps of a subject: flags (None: not given), else the run's [budget], else defaults.

    Raises:
        UserError: what is too weak would be too strong.
    """
    config, where = subject.config, subject.config_path
    caps = DeltaCaps(
        choose_cap("max_delta_ratio", max_ratio, config, where),
        choose_optional_cap("max_mean_delta_ratio", max_mean_ratio, config, where),
        weak_ratio,
    )
    for cap in filter(None, (caps.max_ratio, caps.max_mean_ratio)):
        if weak_ratio != WEAK_RATIO and weak_ratio > cap.value:
            raise UserError(
                f"--min_delta_ratio {weak_ratio:g} is above the cap of {cap.value:g} ({cap.source}), so nothing could pass; "
                "lower the one or raise the other"
            )
    return caps


@dataclass(frozen=True)
class SpectralDelta:
    """Largest singular values of what the adapter adds and of the base weight, and their ratio.

    `error` is how much smaller the ratio may be, since the base's value is a lower bound.
    """

    module: str
    delta_norm: float
    weight_norm: float
    ratio: float
    error: float


@dataclass(frozen=True)
class DeltaResult:
    """What was measured.

    Attributes:
        adapter: the adapter.
        deltas: one for each adapted module, in the order of the file.
        spectral: likewise, empty unless it was asked for.
        remarks: what a reader should know about the files.
        num_read: base tensors that had to be read, because no table had their norms.
    """

    adapter: AdapterFile
    deltas: "tuple[ModuleDelta, ...]"
    spectral: tuple[SpectralDelta, ...]
    remarks: tuple[str, ...]
    num_read: int


def measure_delta(
    subject: Subject, source: TensorSource, *, spectral: bool = False, norms_directory: Path | None = None
) -> DeltaResult:
    """Measure every adapted module.

    Args:
        subject: the adapter and the base it belongs to.
        source: the base, opened.
        spectral: also take the ratio of spectral norms; the first time for a checkpoint this takes a second or two a module at the size of A14B.
        norms_directory: where tables of base norms lie; default the user's cache directory.

    Raises:
        UserError: the adapter does not fit the base, or either holds values that are not finite.
    """
    from utils.delta_budget import module_delta, spectral_delta_norm

    adapter, base_keys = read_fitting_adapter(subject, source)
    norms = BaseNorms(source, norms_directory)
    deltas, spectral_deltas = [], []
    for module, pair in adapter.modules.items():
        key = base_keys[module]
        if spectral:
            base = norms.spectral(key)
            norm = spectral_delta_norm(pair.down, pair.up, pair.scale)
            ratio = norm / base.value if base.value else float("inf") if norm else 0.0
            error = ratio - norm / (base.value + base.error) if base.value else 0.0
            spectral_deltas.append(SpectralDelta(module, norm, base.value, ratio, error))
        deltas.append(module_delta(module, pair.down, pair.up, pair.scale, norms.frobenius(key)))
    norms.save()
    remarks = [*base_remarks(subject.adapter, source), *_scale_remarks(subject.adapter, adapter)]
    zeros = [delta.module for delta in deltas if not delta.weight_norm]
    if zeros:
        remarks.append(
            f"warning: {len(zeros)} of {len(deltas)} adapted weights of {subject.transformer} are all zeros ({zeros[0]}), so "
            "that no ratio can be given; the file may be incomplete: download it again"
        )
    remarks += norms.problems
    return DeltaResult(adapter, tuple(deltas), tuple(spectral_deltas), tuple(remarks), norms.measured)


def judge_delta(deltas: "Sequence[ModuleDelta]", caps: DeltaCaps) -> tuple[Verdict, str]:
    """The verdict and the sentence that explains it."""
    from utils.delta_budget import CAP_TOLERANCE, over_cap, summarise

    cap, mean_cap = caps.max_ratio.value, caps.max_mean_ratio
    over, overall = over_cap(deltas, cap), summarise(deltas).overall
    if over:
        count = f"{len(over)} of {len(deltas)} modules"
        return (
            "fail",
            f"{count} over the cap of {cap:g}; the farthest is {over[0].module} with {over[0].ratio:.4f}.",
        )
    if mean_cap is not None and not overall.mean_ratio <= mean_cap.value * (1 + CAP_TOLERANCE):
        return "fail", f"The mean ratio is {overall.mean_ratio:.4f}, over its cap of {mean_cap.value:g}."
    largest = f"the largest ratio is {overall.max_ratio:.3g} ({overall.worst_module})"
    if overall.max_ratio < caps.weak_ratio:
        return (
            "inconclusive",
            f"The adapter changes hardly anything: {largest}, below {caps.weak_ratio:g}.",
        )
    weak = sum(delta.ratio < caps.weak_ratio for delta in deltas)
    hardly = f"; {weak} of them do hardly anything (below {caps.weak_ratio:g})" if weak else ""
    return "pass", f"All {len(deltas)} modules are within the cap of {cap:g}; {largest}{hardly}."


def _scale_remarks(path: Path, adapter: AdapterFile) -> list[str]:
    """A kohya file without alpha: its trainer always writes one, so the file has lost it on the way."""
    is_kohya = any(key.startswith(KOHYA_PREFIX) for key in open_safetensors([adapter.path]).shapes)
    bare = [module for module, pair in adapter.modules.items() if pair.scale_source == "none"]
    if not (is_kohya and bare):
        return []
    return [
        f"warning: {path} has kohya's names and no alpha for {len(bare)} of {len(adapter.modules)} modules ({bare[0]}); "
        "files of that kind have one, and without it the scale is taken as 1"
    ]
