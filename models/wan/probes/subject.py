"""What a probe of an adapter looks at: the adapter, the base it belongs to, and the run's config.

Each comes from a flag, else from the config, else from the run that the adapter lies in, else from the newest run;
whatever no flag said becomes a remark, so that the report names it.
"""

import argparse
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from models.wan.arch import PUBLISHED, Shape, expected_shapes
from models.wan.downloads import DIFFUSERS_EXPERTS, EXPERT_DIRS
from models.wan.expert_files import expert_of_adapter
from models.wan.layouts import has_two_experts, transformer_place
from models.wan.names import dit_to_diffusers
from models.wan.probes.base import official_names
from utils.adapter_runs import find_adapter_file, last_save, newest_adapter_run, run_of_adapter
from utils.config.experts import is_pair, only_expert, side_config
from utils.config.load import load_config
from utils.config.schema import BudgetConfig, Expert, TrainConfig
from utils.errors import UserError
from utils.files import combined_fingerprint
from utils.lora_names import (
    AdapterFile,
    AdapterPair,
    adapted_shape,
    kohya_aliases,
    matrix_shape,
    read_adapter,
)
from utils.safetensors_header import FLOAT_DTYPES
from utils.tensor_source import TensorSource, open_safetensors

OUTPUT_ROOT = Path("output")
_TEXT_ENCODER_MODULES = ("lora_te", "text_encoder")


@dataclass(frozen=True)
class Cap:
    """A limit, and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True)
class Subject:
    """What is measured against what; `remarks` say how it was chosen where no flag said it.

    `overrides` make the config name the base, where what it names has moved.
    """

    adapter: Path
    transformer: Path
    config_path: Path | None
    config: TrainConfig | None
    expert: Expert | None
    remarks: tuple[str, ...]
    overrides: tuple[str, ...] = ()


def overrides_for(config_path: Path, base: Path | None) -> tuple[str, ...]:
    """What makes a run's config name `base`, where the checkpoint that it names has moved: for `load_config`."""
    if base is None or not base.is_dir() or Path(load_config(config_path).train.model.ckpt_path).is_dir():
        return ()
    # Someone may have named the expert itself, as the config cannot.
    root = base.parent if base.name in EXPERT_DIRS.values() else base
    return (f"model.ckpt_path={json.dumps(str(root))}",)


def choose_subject(args: argparse.Namespace) -> Subject:
    """Fill in what no flag says: from --config, else from the run that the adapter lies in.

    Args:
        args: with `adapter`, `base`, `expert` and `config` (see `utils.probe_cli.add_flags`).

    Raises:
        UserError: an adapter or its base is missing, or which expert is meant is open.
    """
    remarks: list[str] = []
    adapter = choose_adapter(args, remarks)
    run = run_of_adapter(adapter)
    config_path = args.config or (run.config if run else None)
    overrides = overrides_for(config_path, args.base) if config_path else ()
    config = load_config(config_path, overrides).train if config_path else None
    base = args.base
    if base is None:
        if config is None:
            raise UserError(
                f"{adapter}: lies in no run that names its base; name it with --base, or --config"
            )
        base = Path(config.model.transformer_path or config.model.ckpt_path)
        remarks.append(f"base: {base} (from {config_path})")
    saved_for = expert_of_adapter(adapter)
    expert = args.expert or (only_expert(config) if config else None) or saved_for
    if saved_for not in (None, expert):
        remarks.append(
            f"{adapter} says that it is for the expert {saved_for}, but it is held against {expert}"
        )
    transformer = choose_transformer(base, expert, is_asked_for=args.expert is not None)
    if config is not None and expert is not None and is_pair(config):
        config = side_config(config, expert)
    return Subject(adapter, transformer, config_path, config, expert, tuple(remarks), overrides)


def base_remarks(adapter: Path, source: TensorSource) -> list[str]:
    """A warning where the file says that it was trained on other weights than these."""
    trained_on = open_safetensors([adapter]).metadata().get("base_hash")
    if trained_on in (None, combined_fingerprint(source.files)):
        return []
    return [
        f"warning: {adapter} was trained on other base weights than those in {source.files[0].parent} "
        "(fingerprints differ); the latter are used"
    ]


def choose_adapter(args: argparse.Namespace, remarks: list[str]) -> Path:
    """The adapter's file: the one named, else that of the config's run, else the one that was saved last."""
    if args.adapter is not None:
        adapter = find_adapter_file(args.adapter)
        if adapter != args.adapter:
            remarks.append(f"adapter: {adapter} (found in {args.adapter})")
        return adapter
    if args.config is not None:
        own = last_save(args.config.parent)
        if own is not None:
            remarks.append(f"adapter: {own} (the last save of {args.config.parent})")
            return own
    root = Path(load_config(args.config).train.output_dir) if args.config is not None else OUTPUT_ROOT
    adapter = newest_adapter_run(root).adapter
    remarks.append(f"adapter: {adapter} (of the newest run below {root})")
    return adapter


def choose_transformer(base: Path, expert: Expert | None, *, is_asked_for: bool) -> Path:
    """The directory or file of the DiT itself: in an A14B checkpoint, that of one expert.

    Raises:
        UserError: there is no such checkpoint, it has two experts and none was chosen, or one was asked for in vain.
    """
    if not base.exists():
        raise UserError(f"{base}: no such checkpoint; check --base or the config's ckpt_path")
    if has_two_experts(base):
        if expert is None:
            raise UserError(f"{base}: is an A14B checkpoint with two experts; say which with --expert")
        return transformer_place(base, expert)
    if (base / DIFFUSERS_EXPERTS["high_noise"]).is_dir():
        return transformer_place(base, expert)
    if is_asked_for and expert is not None and base.is_dir() and base.name != EXPERT_DIRS[expert]:
        raise UserError(
            f"{base}: holds no {EXPERT_DIRS[expert]}/, which --expert {expert} asks for; check both"
        )
    return base


def read_fitting_adapter(subject: Subject, source: TensorSource) -> tuple[AdapterFile, dict[str, str]]:
    """The adapter, and the name in the base's files of each weight that it adapts.

    Raises:
        UserError: the base is no DiT or is quantised, or the adapter was made for another one; up to ten mismatches
            are named.
    """
    base_keys = {
        name.removesuffix(".weight"): stored
        for name, stored in official_names(subject.transformer, source).items()
        if name.endswith(".weight") and len(source.shapes[stored]) >= 2
    }
    diffusers_aliases = {dit_to_diffusers(module): module for module in base_keys}
    adapter = read_adapter(subject.adapter, diffusers_aliases | kohya_aliases(base_keys))
    mismatches = [
        problem
        for module, pair in adapter.modules.items()
        if (problem := _mismatch(module, pair, source, base_keys)) is not None
    ]
    if mismatches:
        more = "; ..." if len(mismatches) > 10 else ""
        raise UserError(
            f"{adapter.path}: {len(mismatches)} of {len(adapter.modules)} modules do not fit {subject.transformer}: "
            f"{'; '.join(mismatches[:10])}{more}; give the base that the adapter was trained on"
        )
    dtypes = {module: source.dtypes[base_keys[module]] for module in adapter.modules}
    quantised = next((module for module in dtypes if dtypes[module] not in FLOAT_DTYPES), None)
    if quantised is not None:
        raise UserError(
            f"{subject.transformer}: {quantised} is stored as {dtypes[quantised]}, whose scale is kept elsewhere; give the "
            "unquantised checkpoint"
        )
    return adapter, {module: base_keys[module] for module in adapter.modules}


def _mismatch(module: str, pair: AdapterPair, source: TensorSource, base_keys: dict[str, str]) -> str | None:
    """Why a module's adapter does not fit the base, with the variants that both shapes belong to; None where it does."""
    adapted = adapted_shape(pair.down.shape, pair.up.shape)
    assert adapted is not None, "read_adapter has checked it"
    if module not in base_keys:
        if module.startswith(_TEXT_ENCODER_MODULES):
            return f"{module} belongs to a text encoder"
        names = _variants(module, adapted)
        return f"the base has no {module}{f' (that of {names} fits)' if names else ''}"
    shape = matrix_shape(source.shapes[base_keys[module]])
    if adapted == shape:
        return None
    return f"{module} adapts {_with_variants(module, adapted)}, the base has {_with_variants(module, shape)}"


def _with_variants(module: str, shape: tuple[int, int]) -> str:
    names = _variants(module, shape)
    return f"{list(shape)}{f' ({names})' if names else ''}"


def _variants(module: str, shape: tuple[int, int]) -> str:
    """The published models whose weight of this name has this shape, such as `t2v-a14b, i2v-a14b`."""
    return ", ".join(
        name
        for name, shapes in _published_shapes().items()
        if (found := shapes.get(f"{module}.weight")) is not None and matrix_shape(found) == shape
    )


@cache
def _published_shapes() -> dict[str, dict[str, Shape]]:
    return {name: expected_shapes(arch) for name, arch in PUBLISHED.items()}


def choose_cap(name: str, flag: float | None, config: TrainConfig | None, where: Path | None) -> Cap:
    """The cap `name`: the flag, else the key of the config's [budget], else that key's default.

    Raises:
        ValueError: nothing gives it a value (see `choose_optional_cap`).
    """
    cap = choose_optional_cap(name, flag, config, where)
    if cap is None:
        raise ValueError(f"budget.{name} has no default")
    return cap


def choose_optional_cap(
    name: str, flag: float | None, config: TrainConfig | None, where: Path | None
) -> Cap | None:
    """The same for a cap that need not be set: None where nothing sets it."""
    if flag is not None:
        return Cap(flag, f"--{name}")
    if config is not None and config.budget is not None and getattr(config.budget, name) is not None:
        return Cap(getattr(config.budget, name), f"[budget] of {where}")
    default = getattr(BudgetConfig(), name)
    return None if default is None else Cap(default, "default")
