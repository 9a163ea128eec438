"""Opening the parts of a Wan 2.2 checkpoint under official names, whatever their layout, and checking them by header alone.

Where the parts are is said by `layouts`, under which names they are stored by `namings`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from models.wan.arch import (
    VARIANTS,
    VariantInfo,
    WanArch,
    describe_wan_21,
    load_arch,
    variant_of_shapes,
)
from models.wan.component_shapes import (
    Umt5Sizes,
    expected_umt5_shapes,
    text_encoder_sizes,
    vae_kind,
    vae_sizes,
)
from models.wan.downloads import EXPERT_DIRS, TEXT_ENCODER_FILE, TOKENIZER_DIR, VAE_FILES
from models.wan.layouts import CheckpointPaths, check_expert, is_undecided, locate, read_config_variant
from models.wan.namings import Kind, Naming, find_part, shown_names
from models.wan.tokenizer_place import TOKENIZER_FILES, has_tokenizer
from utils.config.experts import first_side
from utils.config.schema import ModelConfig, Problem
from utils.errors import UserError
from utils.scaled_source import has_mark, is_quantised, plain_weights
from utils.tensor_source import (
    RenamedSource,
    Shape,
    TensorSource,
    open_pth,
    open_safetensors,
    open_sharded,
    open_weights,
)

__all__ = [
    "EXPERT_DIRS",
    "TEXT_ENCODER_FILE",
    "TOKENIZER_DIR",
    "TOKENIZER_FILES",
    "VAE_FILES",
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
    "without_mistaken",
]

_T = TypeVar("_T")


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

    Args:
        path: a `.pth` or `.safetensors` file, or a directory of shards.

    Raises:
        UserError: the file is missing or damaged, is no UMT5 encoder, is quantised, or holds only a part of one.
    """
    source = open_text_encoder_part(path)
    _check_whole(Path(path), set(source.shapes))
    return source


def open_text_encoder_part(path: Path) -> TensorSource:
    """The same for a file that may hold only some tensors, as `save_text_encoder_full = false` writes it.

    Raises:
        UserError: the file is missing or damaged, holds tensors of another model, or is quantised.
    """
    path = Path(path)
    source = _open_files(path)
    quantised = any(is_quantised(name, dtype) for name, dtype in source.dtypes.items())
    if quantised or has_mark(source.shapes):
        raise UserError(
            f"{path}: is quantised to fp8, which cannot be trained or encoded with here; give the bf16 or fp16 file"
        )
    naming = find_part(path, source.shapes, "text_encoder")
    if naming.unknown:
        first = naming.unknown[0].removeprefix(naming.prefix)
        what = (
            "holds a decoder" if first.startswith(("decoder.", "lm_head.")) else "holds other tensors besides"
        )
        raise UserError(
            f"{path}: {what} ({naming.unknown[0]}); give UMT5's encoder alone (official or Hugging Face names)"
        )
    return _renamed(source, naming)


def open_transformer(path: Path) -> TensorSource:
    """Open a DiT and show it under official names, as plain numbers.

    Args:
        path: a directory of shards or one `.safetensors` file, official or diffusers' names, with or without the prefix of
            ComfyUI's files, also `fp8_scaled`.

    Raises:
        UserError: as `open_sharded`, `plain_weights` and `find_part`.
    """
    source = plain_weights(open_sharded(path))
    return _renamed(source, find_part(path, source.shapes, "transformer"))


def open_vae(path: Path) -> TensorSource:
    """Open a VAE and show it under official names.

    Args:
        path: `Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`, the same as `.safetensors`, or diffusers' directory or file.

    Raises:
        UserError: the file is missing or damaged, or is no VAE of Wan.
    """
    source = plain_weights(_open_files(Path(path)))
    return _renamed(source, find_part(path, source.shapes, "vae"))


def open_as_stored(path: Path, kind: Kind) -> tuple[TensorSource, Naming]:
    """A part's files as they are, and under which names they hold it: for whoever reads every byte.

    Raises:
        UserError: the files are damaged, or hold no such part.
    """
    source = _open_files(Path(path))
    return source, find_part(Path(path), source.shapes, kind)


def _open_files(path: Path) -> TensorSource:
    return open_sharded(path) if path.is_dir() else open_weights(path)


def _renamed(source: TensorSource, naming: Naming) -> TensorSource:
    shown = shown_names(naming, strict=True)
    if all(name == stored for name, stored in shown.items()) and len(shown) == len(source.shapes):
        return source
    return RenamedSource(source, shown)


def read_variant(model: ModelConfig) -> VariantInfo:
    """The variant by the DiT's `config.json` alone; where that is not there, what `model.variant` says. No weights.

    Raises:
        UserError: neither tells, the two differ, or `expert` is missing or out of place.
    """
    paths, problems = locate(model)
    about_expert = [p for p in without_mistaken(problems, paths) if p.key == "model.expert"]
    if about_expert:
        raise UserError("\n".join(map(str, about_expert)))
    found = read_config_variant(paths.config_json)
    if found is None and not paths.config_json.exists():
        found = _variant_of_headers(paths)
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


def _variant_of_headers(paths: CheckpointPaths) -> VariantInfo | None:
    """The variant of weights without a `config.json`, where they are those of a published model."""
    try:
        return load_arch(paths.config_json, open_transformer(paths.transformer_dir).shapes).variant
    except UserError:
        return None


def check_checkpoint(model: ModelConfig) -> list[Problem]:
    """Check a whole checkpoint by headers alone; no tensor is loaded. Returns every problem instead of raising.

    Covers existence, truncation, indices against shards, `config.json` against headers, `variant` and the VAE's kind
    against the DiT, and UMT5's width against the DiT's text input.
    """
    model = first_side(model)
    paths, problems = locate(model)
    arch = None
    if paths.transformer_dir.exists() and not is_undecided(model, paths):
        arch = _collect(problems, _key(model, "transformer_path"), lambda: _read_arch(paths))
    problems = without_mistaken(problems, paths)
    if arch is not None and read_config_variant(paths.config_json) is None:  # locate could not tell
        known = [problem for problem in problems if problem.key != "model.expert"]
        check_expert(model, paths.transformer_dir, paths.transformer_dir, arch.variant, known)
        problems = known
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


def without_mistaken(problems: list[Problem], paths: CheckpointPaths) -> list[Problem]:
    """The same without what was concluded about `expert` from a `config.json` that is not that of the weights."""
    if any(problem.key == "model.expert" for problem in problems) and _is_mistaken(paths):
        return [problem for problem in problems if problem.key != "model.expert"]
    return problems


def _is_mistaken(paths: CheckpointPaths) -> bool:
    """Whether the weights are whole but not those of the variant that `config.json` names."""
    try:
        open_sharded(paths.transformer_dir)
    except UserError:
        return False
    try:
        shapes = open_transformer(paths.transformer_dir).shapes
    except UserError:  # another model
        return True
    named, found = read_config_variant(paths.config_json), variant_of_shapes(shapes)
    return bool(describe_wan_21(shapes)) or (named is not None and found is not None and found is not named)


def _key(model: ModelConfig, option: str) -> str:
    """The config key that decides where this part is."""
    return f"model.{option}" if getattr(model, option) else "model.ckpt_path"


def _read_arch(paths: CheckpointPaths) -> WanArch | None:
    """The DiT's sizes, checked against its headers; None where there are no weights, which is said elsewhere."""
    place = paths.transformer_dir
    if place.is_dir() and not any(place.glob("*.safetensors*")):
        return None
    return load_arch(paths.config_json, open_transformer(place).shapes)


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
