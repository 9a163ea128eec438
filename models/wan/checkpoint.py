"""Finding a Wan 2.2 checkpoint's parts in the official layout, opening them, and checking them by header alone.

The official layout is that of the published repositories: `config.json` and sharded `.safetensors` (A14B: in
`high_noise_model/` and `low_noise_model/`), UMT5 and VAE as `.pth`, and the tokenizer's directory.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from models.wan.arch import VARIANTS, VariantInfo, WanArch, load_arch
from models.wan.component_shapes import (
    Umt5Sizes,
    expected_umt5_shapes,
    text_encoder_sizes,
    vae_kind,
    vae_sizes,
)
from models.wan.names import umt5_to_official
from utils.config.experts import first_side
from utils.config.schema import ModelConfig, Problem
from utils.errors import UserError
from utils.tensor_source import (
    SCALED_FP8_MARK,
    RenamedSource,
    ScaledSource,
    Shape,
    TensorSource,
    open_pth,
    open_safetensors,
    open_sharded,
    open_weights,
)

__all__ = [
    "CheckpointPaths",
    "TensorSource",
    "Umt5Sizes",
    "check_checkpoint",
    "find_checkpoint",
    "has_tokenizer",
    "locate",
    "open_pth",
    "open_safetensors",
    "open_sharded",
    "open_text_encoder",
    "open_text_encoder_part",
    "open_transformer",
    "open_vae",
    "open_weights",
    "read_variant",
    "text_encoder_sizes",
    "vae_kind",
]

TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
VAE_FILES = {"2.1": "Wan2.1_VAE.pth", "2.2": "Wan2.2_VAE.pth"}
TOKENIZER_DIR = "google/umt5-xxl"
EXPERT_DIRS = {"high_noise": "high_noise_model", "low_noise": "low_noise_model"}
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
_BY_MODEL_TYPE = {info.model_type: info for info in VARIANTS.values()}
# In files for ComfyUI the tokenizer travels with the encoder, as bytes.
_NOT_WEIGHTS = ("spiece_model",)

_T = TypeVar("_T")


@dataclass(frozen=True)
class CheckpointPaths:
    """Where the parts of one checkpoint are. `transformer_dir` may also be a single `.safetensors` file."""

    transformer_dir: Path
    config_json: Path
    text_encoder: Path
    vae: Path
    tokenizer_dir: Path


def find_checkpoint(model: ModelConfig) -> CheckpointPaths:
    """Find every part: `*_path` keys first, then `ckpt_path`. Nothing is opened but `config.json`.

    Raises:
        UserError: parts are missing, or `expert` is given where there are none or not given where there are two.
    """
    paths, problems = locate(model)
    if problems:
        raise UserError("\n".join(map(str, problems)))
    return paths


def open_text_encoder(path: Path) -> TensorSource:
    """Open a UMT5 encoder, under official or Hugging Face names, and show it under official names.

    Raises:
        UserError: the file is missing or damaged, is no UMT5 encoder, is quantised, or holds only a part of one.
    """
    source = open_text_encoder_part(path)
    if Path(path).suffix == ".safetensors":
        _check_whole(Path(path), set(source.shapes))
    return source


def open_text_encoder_part(path: Path) -> TensorSource:
    """The same for a file that may hold only some tensors, as `save_text_encoder_full = false` writes it.

    Raises:
        UserError: the file is missing or damaged, holds tensors of another model, or is quantised.
    """
    path = Path(path)
    source = open_weights(path)
    if SCALED_FP8_MARK in source.shapes:
        raise UserError(
            f"{path}: is quantised to fp8, which cannot be trained or encoded with here; give the bf16 or fp16 file"
        )
    stored = [name for name in source.shapes if name not in _NOT_WEIGHTS]
    is_hf = any(name == "shared.weight" or name.startswith("encoder.") for name in stored)
    try:
        names = {umt5_to_official(name) if is_hf else name: name for name in stored}
    except UserError as error:
        raise UserError(
            f"{path}: {error}; give UMT5's encoder alone (official or Hugging Face names)"
        ) from None
    return RenamedSource(source, names)


def open_transformer(path: Path) -> TensorSource:
    """Open a DiT: a directory of shards or one `.safetensors` file, also one of ComfyUI's `fp8_scaled` files.

    Raises:
        UserError: as `open_sharded`, or scales and weights of a scaled file do not fit each other.
    """
    source = open_sharded(path)
    return ScaledSource(source) if SCALED_FP8_MARK in source.shapes else source


def open_vae(path: Path) -> TensorSource:
    """Open a VAE with official names (`Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`, or the same as `.safetensors`).

    Raises:
        UserError: the file is missing or damaged.
    """
    return open_weights(path)


def read_variant(model: ModelConfig) -> VariantInfo:
    """The variant by the DiT's `config.json` alone; where that is not there, what `model.variant` says. No weights.

    Raises:
        UserError: neither tells, the two differ, or `expert` is missing or out of place.
    """
    paths, problems = locate(model)
    about_expert = [problem for problem in problems if problem.key == "model.expert"]
    if about_expert:
        raise UserError("\n".join(map(str, about_expert)))
    found = _read_variant(paths.config_json)
    if found is None and model.variant is None:
        raise UserError(
            f"{paths.config_json}: missing, or not the config.json of a Wan 2.2 DiT, so the variant is not known; mend "
            "model.ckpt_path, or write model.variant"
        )
    if found is not None and model.variant not in (None, found.name):
        raise UserError(
            f"model.variant: is {model.variant!r}, but {paths.config_json} is that of {found.name!r}; write "
            f'variant = "{found.name}", leave it out, or give another ckpt_path'
        )
    return found or VARIANTS[str(model.variant)]


def has_tokenizer(directory: Path) -> bool:
    """Whether the files of a tokenizer are there."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def check_checkpoint(model: ModelConfig) -> list[Problem]:
    """Check a whole checkpoint by headers alone; no tensor is loaded. Returns every problem instead of raising.

    Covers existence, truncation, indices against shards, `config.json` against headers, `variant` and the VAE's kind
    against the DiT, and UMT5's width against the DiT's text input.
    """
    paths, problems = locate(model)
    arch = None
    if paths.transformer_dir.exists() and not _is_undecided(model, paths):
        arch = _collect(problems, _key(model, "transformer_path"), lambda: _read_arch(paths))
    if arch is not None and model.variant is not None and model.variant != arch.variant.name:
        problems.append(
            Problem(
                "model.variant",
                f"is {model.variant!r}, but {paths.config_json} and the weights are those of {arch.variant.name!r}",
                f'write variant = "{arch.variant.name}", leave it out, or give another ckpt_path',
            )
        )
    if paths.text_encoder.exists():
        _check_text_encoder(paths.text_encoder, _key(model, "llm_path"), arch, problems)
    if paths.vae.exists():
        _check_vae(paths.vae, _key(model, "vae_path"), arch, problems)
    return problems


def locate(model: ModelConfig) -> tuple[CheckpointPaths, list[Problem]]:
    """Where each part is or should be, and what is missing. Of a pair: what both share, and the first expert."""
    asked, model = model, first_side(model)
    root, problems = Path(model.ckpt_path), list[Problem]()
    base = Path(model.transformer_path) if model.transformer_path else root
    transformer = _expert_dir(base, model.expert)
    config_json = (transformer if transformer.is_dir() else transformer.parent) / "config.json"
    if model.transformer_path and not config_json.exists():
        config_json = _expert_dir(root, model.expert) / "config.json"
    info = _read_variant(config_json)
    paths = CheckpointPaths(
        transformer_dir=transformer,
        config_json=config_json,
        text_encoder=Path(model.llm_path) if model.llm_path else root / TEXT_ENCODER_FILE,
        vae=Path(model.vae_path) if model.vae_path else root / _default_vae_file(root, info),
        tokenizer_dir=Path(model.tokenizer_path) if model.tokenizer_path else root / TOKENIZER_DIR,
    )
    if not root.is_dir():
        problems.append(
            Problem("model.ckpt_path", f"{root} is not a directory", "give the checkpoint's directory")
        )
    _check_expert(asked, base, info, problems)
    _check_present(model, paths, problems)
    return paths, problems


def _expert_dir(base: Path, expert: str | None) -> Path:
    """The expert's directory in an A14B checkpoint; `base` itself where there are no experts, or none is chosen."""
    if expert is None or not _has_expert_dirs(base):
        return base
    return base / EXPERT_DIRS[expert]


def _has_expert_dirs(base: Path) -> bool:
    return any((base / name).is_dir() for name in EXPERT_DIRS.values())


def _check_expert(model: ModelConfig, base: Path, info: VariantInfo | None, problems: list[Problem]) -> None:
    has_experts = info.has_experts if info else _has_expert_dirs(base)
    if has_experts and model.expert is None:
        reason = f"is missing, but {base} is an A14B model, which has two experts"
        problems.append(Problem("model.expert", reason, 'write expert = "high_noise", "low_noise" or "both"'))
    if info and not info.has_experts and model.expert is not None:
        problems.append(
            Problem("model.expert", f"is {model.expert!r}, but {info.name} has no experts", "leave it out")
        )
    other = next((name for key, name in EXPERT_DIRS.items() if key != model.expert), "")
    if model.expert is not None and base.name == other:
        reason = f"is {model.expert!r}, but the weights are in {base}"
        problems.append(Problem("model.expert", reason, "choose the expert whose weights these are"))


def _check_present(model: ModelConfig, paths: CheckpointPaths, problems: list[Problem]) -> None:
    if not Path(model.ckpt_path).is_dir() and not model.transformer_path:
        return  # said already; that its parts are missing too helps nobody
    expected = {
        "transformer_path": () if _is_undecided(model, paths) else (paths.transformer_dir, paths.config_json),
        "llm_path": (paths.text_encoder,),
        "vae_path": (paths.vae,),
        "tokenizer_path": (paths.tokenizer_dir,),
    }
    for option, needed in expected.items():
        fix = (
            f"download it, or give its place as {option}"
            if _key(model, option) == "model.ckpt_path"
            else "check the path"
        )
        for path in needed:
            if not path.exists():
                problems.append(Problem(_key(model, option), f"{path} is missing", fix))
    tokenizer = paths.tokenizer_dir
    if tokenizer.exists() and not has_tokenizer(tokenizer):
        reason = f"{tokenizer} holds neither {' nor '.join(TOKENIZER_FILES)}"
        problems.append(
            Problem(
                _key(model, "tokenizer_path"), reason, "give the directory of google/umt5-xxl's tokenizer"
            )
        )


def _key(model: ModelConfig, option: str) -> str:
    """The config key that decides where this part is."""
    return f"model.{option}" if getattr(model, option) else "model.ckpt_path"


def _read_variant(config_json: Path) -> VariantInfo | None:
    """The variant that `config.json` names, or None where it cannot be read: `load_arch` says why."""
    try:
        values = json.loads(config_json.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    model_type = values.get("model_type") if isinstance(values, dict) else None
    return _BY_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None


def _default_vae_file(root: Path, info: VariantInfo | None) -> str:
    if info is not None:
        return VAE_FILES[info.vae_kind]
    return next((name for name in VAE_FILES.values() if (root / name).exists()), VAE_FILES["2.2"])


def _is_undecided(model: ModelConfig, paths: CheckpointPaths) -> bool:
    """True where there are two experts and none is chosen, so that no transformer can be looked at."""
    return model.expert is None and _has_expert_dirs(paths.transformer_dir)


def _read_arch(paths: CheckpointPaths) -> WanArch | None:
    """The DiT's sizes, checked against its headers; None where `config.json` is missing, which is said elsewhere."""
    shapes = open_transformer(paths.transformer_dir).shapes
    return load_arch(paths.config_json, shapes) if paths.config_json.exists() else None


def _check_text_encoder(path: Path, key: str, arch: WanArch | None, problems: list[Problem]) -> None:
    sizes = _collect(problems, key, lambda: _sizes_of(path, open_text_encoder(path), text_encoder_sizes))
    if sizes is not None and arch is not None and sizes.d_model != arch.text_dim:
        reason = f"{path} gives text states of width {sizes.d_model}, the DiT takes {arch.text_dim}"
        problems.append(Problem(key, reason, "use the encoder and the DiT of one checkpoint"))


def _check_vae(path: Path, key: str, arch: WanArch | None, problems: list[Problem]) -> None:
    sizes = _collect(problems, key, lambda: _sizes_of(path, open_vae(path), vae_sizes))
    if sizes is not None and arch is not None and sizes.kind != arch.variant.vae_kind:
        needed = arch.variant.vae_kind
        reason = (
            f"{path} is the VAE of Wan {sizes.kind}, but {arch.variant.name} works with that of Wan {needed}"
        )
        problems.append(Problem(key, reason, f"give {VAE_FILES[needed]}"))


def _sizes_of(path: Path, source: TensorSource, read: Callable[[dict[str, Shape]], _T]) -> _T:
    try:
        return read(source.shapes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _collect(problems: list[Problem], key: str, check: Callable[[], _T]) -> _T | None:
    """Run a check; what it raises for the user becomes one more problem."""
    try:
        return check()
    except UserError as error:
        problems.append(Problem(key, str(error)))
        return None


def _check_whole(path: Path, names: set[str]) -> None:
    """Refuse a file that holds only the trained tensors of an encoder."""
    blocks = [
        int(name.split(".")[1])
        for name in names
        if name.startswith("blocks.") and name.split(".")[1].isdigit()
    ]
    num_layers = max(blocks, default=-1) + 1
    if num_layers > len(names):  # a made-up block number must not make us list a million names
        num_layers = len(names)
    whole = expected_umt5_shapes(Umt5Sizes(0, 0, 0, 0, 0, num_layers, 0))
    missing = [name for name in whole if name not in names]
    if missing and names & set(whole):
        raise UserError(
            f"{path}: holds only a part of the encoder ({len(names)} tensors; {missing[0]} is missing). Files written "
            "with save_text_encoder_full = false hold the trained tensors alone; save with true and give that file"
        )
