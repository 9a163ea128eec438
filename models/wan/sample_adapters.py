"""Which adapters go on which DiT when sampling: what flags say, what files say, and what does not fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.wan.arch import VariantInfo
from models.wan.expert_files import expert_of_adapter
from models.wan.probes.subject import Subject, read_fitting_adapter
from utils.adapter_runs import adapters_of_pair, find_adapter_file
from utils.config.schema import Expert
from utils.config.targets import matches
from utils.errors import UserError
from utils.tensor_source import TensorSource, open_safetensors

if TYPE_CHECKING:
    from utils.added_lora import WeightedAdapter


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter's file, the factor on what it adds, and the expert that it is for; None where there are no experts."""

    path: Path
    weight: float
    expert: Expert | None


def parse_weighted(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:WEIGHT`: the path and the weight, by default 1.

    Raises:
        UserError: the path is empty, or the weight is not finite.
    """
    path, colon, number = text.rpartition(":")
    weight = 1.0
    if colon:
        try:
            weight = float(number)
        except ValueError:
            path = text  # a colon that belongs to the path
    else:
        path = text
    if not path or not abs(weight) < float("inf"):
        raise UserError(f"--adapter {text!r}: write FILE or FILE:WEIGHT, e.g. run/epoch3:0.8")
    return Path(path), weight


def choose_adapters(
    variant: VariantInfo,
    either: Sequence[str],
    high: Sequence[str] = (),
    low: Sequence[str] = (),
    *,
    flag: str = "--adapter",
    mend: str = "write --adapter_high or --adapter_low",
) -> list[AdapterChoice]:
    """The adapters that flags name, each with its expert.

    Args:
        variant: what is sampled.
        either: of `--adapter`; with two experts the file has to say which it is for. The directory of a pair of runs stands
            for the adapters of both.
        high: of `--adapter_high`; low: of `--adapter_low`.
        flag: what named `either`; mend: what to do about a file that does not say its expert.

    Raises:
        UserError: a file is missing, is for another variant or expert, or does not say for which expert it is.
    """
    told: list[tuple[str, Path, float, Expert | None]] = []
    for text in either:
        path, weight = parse_weighted(text)
        told += [(flag, one, weight, None) for one in adapters_of_pair(path) or (path,)]
    told += [("--adapter_high", *parse_weighted(text), "high_noise") for text in high]
    told += [("--adapter_low", *parse_weighted(text), "low_noise") for text in low]
    return [_choose(variant, *one, mend) for one in told]


def _choose(
    variant: VariantInfo, flag: str, path: Path, weight: float, expert: Expert | None, mend: str
) -> AdapterChoice:
    file = find_adapter_file(path)
    if expert is not None and not variant.has_experts:
        raise UserError(f"{flag}: {variant.name} has no experts; write --adapter")
    made_for = open_safetensors([file]).metadata().get("variant")
    if made_for not in (None, variant.name):
        raise UserError(
            f"{flag} {file}: is an adapter of {made_for}, and {variant.name} is sampled; give one that was trained on it"
        )
    if not variant.has_experts:
        return AdapterChoice(file, weight, None)
    saved_for = expert_of_adapter(file)
    if expert is None and saved_for is None:
        raise UserError(f"{flag} {file}: does not say for which expert of {variant.name} it is; {mend}")
    if None not in (expert, saved_for) and expert != saved_for:
        raise UserError(
            f"{flag} {file}: is an adapter of the {saved_for} expert; write it behind the other flag"
        )
    return AdapterChoice(file, weight, expert or saved_for)


def load_adapters(
    choices: Sequence[AdapterChoice],
    expert: Expert | None,
    transformer: Path,
    source: TensorSource,
    exclude: Sequence[str] = (),
) -> "list[WeightedAdapter]":
    """The adapters of one expert, read and checked against its DiT.

    Args:
        choices: all of them.
        expert: whose to load.
        transformer: where the DiT is; source: its tensors.
        exclude: globs over whole module paths such as `blocks.3.cross_attn.k` or paths within a block (`cross_attn.*`);
            modules that one matches get no adapter.

    Raises:
        UserError: an adapter does not fit the DiT, or `exclude` leaves nothing of one.
    """
    from utils.added_lora import WeightedAdapter  # needs torch, for which a mistyped flag should not wait

    adapters = []
    for choice in choices:
        if choice.expert != expert:
            continue
        file, _ = read_fitting_adapter(Subject(choice.path, transformer, None, None, expert, ()), source)
        kept = {module: pair for module, pair in file.modules.items() if not _is_excluded(module, exclude)}
        if not kept:
            raise UserError(
                f"--adapter_exclude {' '.join(exclude)}: leaves nothing of {file.path}; name fewer modules"
            )
        adapters.append(WeightedAdapter(kept, choice.weight))
    return adapters


def check_exclude(exclude: Sequence[str], modules: Mapping[Path, Sequence[str]]) -> None:
    """Refuse a pattern that excludes nothing: it would be a slip that nobody notices.

    Raises:
        UserError: a pattern matches no module of any adapter.
    """
    everything = [module for names in modules.values() for module in names]
    for pattern in exclude:
        if not any(_is_excluded(module, (pattern,)) for module in everything):
            known = ", ".join(sorted({_within_block(module) for module in everything}))
            raise UserError(
                f'--adapter_exclude "{pattern}": matches no module of the adapters; they have {known or "none"}'
            )


def _is_excluded(module: str, patterns: Sequence[str]) -> bool:
    return any(matches(pattern, module) or matches(pattern, _within_block(module)) for pattern in patterns)


def _within_block(module: str) -> str:
    parts = module.split(".", 2)
    return parts[2] if parts[0] == "blocks" and len(parts) == 3 else module
