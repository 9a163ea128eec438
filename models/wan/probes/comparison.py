"""Two versions of one DiT: a base, and the same with an adapter on it or another checkpoint beside it. Headers only."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from models.wan.arch import PUBLISHED, WanArch, expected_shapes, load_arch
from models.wan.checkpoint import locate, open_transformer
from models.wan.probes.namings import find_naming, split_prefixes
from models.wan.probes.subject import (
    OUTPUT_ROOT,
    Subject,
    base_remarks,
    choose_subject,
    choose_transformer,
    expert_of_adapter,
    read_fitting_adapter,
)
from utils.adapter_runs import newest_adapter_run
from utils.config.load import load_config
from utils.config.schema import Expert, TrainConfig
from utils.errors import UserError
from utils.lora_names import AdapterFile
from utils.tensor_source import RenamedSource, TensorSource


@dataclass(frozen=True)
class Comparison:
    """What is held against what; one of `adapter` and `other` is there.

    Attributes:
        transformer: the base's directory or file.
        base: its tensors under official names.
        arch: its sizes.
        adapter: the adapter on it.
        other: the other checkpoint's tensors, under official names.
        other_path: where these are.
        config_path, config: of the run that all belongs to, if any.
        expert: of an A14B model.
        remarks: what was chosen without a flag.
    """

    transformer: Path
    base: TensorSource
    arch: WanArch
    adapter: AdapterFile | None
    other: TensorSource | None
    other_path: Path | None
    config_path: Path | None
    config: TrainConfig | None
    expert: Expert | None
    remarks: tuple[str, ...]


def choose_comparison(args: argparse.Namespace) -> Comparison:
    """From flags: `--against` holds two checkpoints against each other, otherwise an adapter against its base.

    Raises:
        UserError: a part is missing or belongs to another model.
    """
    if args.against is None:
        return compare_adapter(choose_subject(args))
    if args.adapter is not None:
        raise UserError("--adapter and --against exclude each other; give the one that is to be measured")
    remarks: list[str] = []
    config_path = args.config
    if config_path is None and args.base is None:
        config_path = newest_adapter_run(OUTPUT_ROOT).config
        remarks.append(f"config: {config_path} (of the newest run below {OUTPUT_ROOT})")
    config = load_config(config_path).train if config_path else None
    base = args.base
    if base is None:
        assert config is not None
        base = Path(config.model.transformer_path or config.model.ckpt_path)
        remarks.append(f"base: {base} (from {config_path})")
    expert = args.expert or (config.model.expert if config else None)
    is_asked_for = args.expert is not None
    transformer = choose_transformer(base, expert, is_asked_for=is_asked_for)
    other_path = choose_transformer(args.against, expert, is_asked_for=is_asked_for)
    source, other = open_official(transformer), open_official(other_path)
    different = [name for name, shape in source.shapes.items() if other.shapes.get(name) != shape]
    if different:
        raise UserError(
            f"{other_path}: is no version of {transformer}: {different[0]} is {_shape(other, different[0])} instead of "
            f"{list(source.shapes[different[0]])} (and {len(different) - 1} more); give a checkpoint of the same model"
        )
    arch = read_arch(transformer, source, config)
    return Comparison(
        transformer, source, arch, None, other, other_path, config_path, config, expert, tuple(remarks)
    )


def compare_adapter(subject: Subject) -> Comparison:
    """An adapter against the base that it belongs to.

    Raises:
        UserError: it does not fit the base.
    """
    stored = open_transformer(subject.transformer)
    source = _official(subject.transformer, stored)
    adapter, _ = read_fitting_adapter(subject, source)
    remarks = (*subject.remarks, *base_remarks(subject.adapter, stored))
    return Comparison(
        subject.transformer,
        source,
        read_arch(subject.transformer, source, subject.config),
        adapter,
        None,
        None,
        subject.config_path,
        subject.config,
        subject.expert or expert_of_adapter(subject.adapter),
        remarks,
    )


def open_official(path: Path) -> TensorSource:
    """A DiT's tensors under official names, whatever naming and prefix its files have.

    Raises:
        UserError: it cannot be read, or is no Wan DiT.
    """
    return _official(path, open_transformer(path))


def _official(path: Path, source: TensorSource) -> TensorSource:
    for prefix, names in split_prefixes(source.shapes).items():
        naming = find_naming(names, prefix)
        if naming.kind == "transformer":
            return RenamedSource(source, naming.official)
    raise UserError(f"{path}: is no Wan DiT; check --base and --against")


def read_arch(transformer: Path, source: TensorSource, config: TrainConfig | None) -> WanArch:
    """The sizes by `config.json`: beside the weights, else the run's; without one, those of a published model.

    Raises:
        UserError: there is no `config.json` and the shapes are those of no published model, or the two disagree.
    """
    beside = (transformer if transformer.is_dir() else transformer.parent) / "config.json"
    if not beside.exists():
        for arch in PUBLISHED.values():
            if expected_shapes(arch) == source.shapes:
                return arch
        if config is not None:
            return load_arch(locate(config.model)[0].config_json, source.shapes)
    return load_arch(beside, source.shapes)


def _shape(source: TensorSource, name: str) -> str:
    return str(list(source.shapes[name])) if name in source.shapes else "missing"
