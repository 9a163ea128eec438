"""What the logit probe compares, chosen from flags, a config or the newest run; and measuring it."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from models.wan.arch import WanArch
from models.wan.probes.base import arch_of, open_official
from models.wan.probes.logit_flags import blocks_asked_for, parse_quantiles
from models.wan.probes.logit_report import Kind, LogitResult, Pair, measure_cached, measure_synthetic
from models.wan.probes.subject import (
    Subject,
    base_remarks,
    choose_subject,
    choose_transformer,
    overrides_for,
    read_fitting_adapter,
)
from utils.config.experts import BOTH, only_expert, side_config
from utils.config.load import load_config
from utils.config.schema import Expert
from utils.devices import choose_device
from utils.errors import UserError
from utils.lora_names import AdapterPair
from utils.module_paths import block_of, type_of
from utils.tensor_source import TensorSource


class MeasuredLogits(NamedTuple):
    """What was measured, on which inputs, and what a reader should know."""

    result: LogitResult
    inputs: str
    remarks: list[str]


@dataclass(frozen=True)
class LogitSubject:
    """A base, and what is held against it: an adapter on it, or another checkpoint."""

    base: Path
    adapter: Path | None
    against: Path | None
    config_path: Path | None
    subject: Subject | None
    remarks: tuple[str, ...]
    expert: Expert | None = None


def choose_logit_subject(args: argparse.Namespace) -> LogitSubject:
    """Fill in what no flag says.

    Raises:
        UserError: something is missing, or flags contradict each other.
    """
    if args.against is None:
        subject = choose_subject(args)
        return LogitSubject(
            subject.transformer,
            subject.adapter,
            None,
            subject.config_path,
            subject,
            subject.remarks,
            subject.expert,
        )
    if args.adapter is not None:
        raise UserError("--against and --adapter: give one of them, they are two ways to say what to compare")
    config = load_config(args.config).train if args.config is not None else None
    base = args.base
    if base is None:
        if config is None:
            raise UserError("--against needs --base (or --config), the checkpoint that it is held against")
        base = Path(config.model.transformer_path or config.model.ckpt_path)
    expert = args.expert or (only_expert(config) if config else None)
    against = choose_transformer(args.against, expert, is_asked_for=False)
    return LogitSubject(
        choose_transformer(base, expert, is_asked_for=args.expert is not None),
        None,
        against,
        args.config,
        None,
        (),
        expert,
    )


def measure_logits(
    chosen: LogitSubject,
    base: TensorSource,
    arch: WanArch,
    kinds: Sequence[Kind],
    args: argparse.Namespace,
    say: Callable[[str], None],
) -> MeasuredLogits:
    """Measure.

    Args:
        chosen: what to compare.
        base: opened under official names.
        arch: its sizes.
        kinds: which attentions.
        args: with `device`, `seed` and the flags of `logit_flags`; without --blocks those that the adapter touches, or all.
        say: hears of progress.

    Raises:
        UserError: the two do not fit each other, or the cache lacks samples.
    """
    device = choose_device(args.device)
    blocks: Sequence[int] | None = blocks_asked_for(args, arch.num_layers)
    adapter, remarks = _adapter(chosen, base, kinds)
    other = base
    if chosen.against is not None:
        other = open_official(chosen.against)
        if arch_of(chosen.against, other) != arch:
            raise UserError(
                f"{chosen.against}: is another model than {chosen.base}; compare two of the same sizes"
            )
    if blocks is None:
        touched = sorted(
            {
                index
                for module in adapter
                if (index := block_of(module)) is not None and type_of(module) in kinds
            }
        )
        blocks = touched if adapter else range(arch.num_layers)
    pair = Pair(base, other, adapter, arch, device)
    if args.synthetic:
        result = measure_synthetic(pair, blocks, kinds, args.seed, args.tokens)
        return MeasuredLogits(result, f"random, {args.tokens} queries", remarks)

    import torch

    from models.wan.probes.cached_samples import open_cached

    if chosen.config_path is None:
        raise UserError("no run says which samples to use; give --config, or --synthetic for random inputs")
    overrides = chosen.subject.overrides if chosen.subject else overrides_for(chosen.config_path, chosen.base)
    loaded = load_config(chosen.config_path, overrides, check_files=True)
    assert loaded.dataset is not None, "load_config with check_files has read it"
    config = replace(loaded.train, seed=args.seed)
    if config.model.expert == BOTH and chosen.expert is not None:
        config = side_config(config, chosen.expert)
    cached = open_cached(
        config,
        loaded.dataset,
        arch.variant,
        parse_quantiles(args.quantiles),
        with_text=True,
        instead="use --synthetic",
    )
    if cached.num_left_out:
        remarks.append(
            f"{cached.num_left_out} sample(s) of the dataset are not in the cache and are left out (clips that cannot be decoded "
            "never are; train.py --cache_only makes the others)"
        )
    dtype: torch.dtype = getattr(torch, loaded.train.model.dtype)
    used = f"{min(args.samples, len(cached.samples))} of {len(cached.samples)} cached sample(s)"
    say(f"{used} at noise levels {', '.join(f'{s:.3f}' for s in cached.sigmas)}")
    last = max(blocks)
    result = measure_cached(
        pair, cached.wires(args.samples), blocks, kinds, dtype, lambda block: say(f"block {block} of {last}")
    )
    return MeasuredLogits(result, f"{used} at quantiles {args.quantiles}", remarks)


def _adapter(
    chosen: LogitSubject, base: TensorSource, kinds: Sequence[Kind]
) -> tuple[dict[str, AdapterPair], list[str]]:
    if chosen.subject is None:
        return {}, []
    adapter, _ = read_fitting_adapter(chosen.subject, base)
    remarks = base_remarks(adapter.path, base)
    unseen = sorted({type_of(module) for module in adapter.modules} - set(kinds))
    if unseen:
        remarks.append(
            f"the logits are those of {' and '.join(kinds)} alone; the adapter also touches {', '.join(unseen)}"
        )
    if not any(type_of(module) in kinds for module in adapter.modules):
        raise UserError(
            f"{adapter.path}: adapts {', '.join(unseen)} alone, and no logits of that kind are looked at; choose another "
            "--attention"
        )
    return adapter.modules, remarks
