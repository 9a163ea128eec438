"""The DiT that a probe looks into: its tensors under official names, and its sizes."""

from pathlib import Path

from models.wan.arch import PUBLISHED, WanArch, expected_shapes, load_arch
from models.wan.checkpoint import open_transformer
from models.wan.probes.namings import find_naming, looks_like, split_prefixes
from utils.errors import UserError
from utils.tensor_source import RenamedSource, TensorSource


def open_official(path: Path) -> TensorSource:
    """Open a DiT, whatever its layout, and show it under official names.

    Raises:
        UserError: as `open_transformer` and `official_names`.
    """
    source = open_transformer(path)
    return RenamedSource(source, official_names(path, source))


def official_names(path: Path, source: TensorSource) -> dict[str, str]:
    """The stored name of each tensor of the DiT in a source, by its official name; what else is there is left out.

    Args:
        path: of the source, for messages.
        source: names with or without a prefix of ComfyUI's, official or diffusers'.

    Raises:
        UserError: there is no DiT of Wan 2.2.
    """
    groups = split_prefixes(source.shapes)
    found = [find_naming(names, prefix) for prefix, names in groups.items()]
    naming = next((one for one in found if one.kind == "transformer"), None)
    if naming is None:
        raise UserError(f"{path}: is no Wan DiT ({looks_like(list(source.shapes))}); check --base")
    return naming.official


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
