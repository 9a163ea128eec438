"""The DiT that a probe looks into: its tensors under official names, and its sizes."""

from pathlib import Path

from models.wan.arch import PUBLISHED, WanArch, expected_shapes, load_arch
from models.wan.checkpoint import open_transformer
from models.wan.names import dit_to_official
from utils.errors import UserError
from utils.tensor_source import RenamedSource, TensorSource

PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def open_official(path: Path) -> TensorSource:
    """Open a DiT, whatever its layout, and show it under official names.

    Raises:
        UserError: as `open_transformer`, or two tensors have one official name.
    """
    source = open_transformer(path)
    names: dict[str, str] = {}
    is_diffusers = any(".attn2." in name for name in source.shapes)
    for stored in source.shapes:
        shown = stored
        for prefix in PREFIXES:
            shown = shown.removeprefix(prefix)
        if is_diffusers:
            shown = dit_to_official(shown)
        if names.setdefault(shown, stored) != stored:
            raise UserError(
                f"{path}: {stored} and {names[shown]} are one tensor of the model; keep one of them"
            )
    return RenamedSource(source, names)


def arch_of(path: Path, source: TensorSource) -> WanArch:
    """The sizes of a DiT: by the `config.json` beside it, else those of the published model that it is.

    Args:
        path: directory or file.
        source: the DiT under official names.

    Raises:
        UserError: there is no `config.json` and the shapes are those of no published model, or the two disagree.
    """
    config = (path if path.is_dir() else path.parent) / "config.json"
    if config.is_file() and _is_official(config):
        return load_arch(config, source.shapes)
    for arch in PUBLISHED.values():
        if expected_shapes(arch) == source.shapes:
            return arch
    raise UserError(
        f"{path}: its sizes are those of no published Wan 2.2, and there is no official config.json beside it that says how "
        "many heads it has; put one there"
    )


def _is_official(config: Path) -> bool:
    """Whether it is the official one; that of a diffusers directory has other keys."""
    try:
        return '"model_type"' in config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return True  # load_arch says what is wrong with it
