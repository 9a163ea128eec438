"""The DiT that a probe looks into: its tensors under official names, and its sizes."""

from pathlib import Path

from models.wan.arch import WanArch, load_arch
from models.wan.layouts import is_config_of_another_part
from models.wan.namings import find_part, shown_names
from utils.scaled_source import plain_weights
from utils.tensor_source import RenamedSource, TensorSource, open_sharded


def open_official(path: Path) -> TensorSource:
    """Open a DiT, whatever its layout, and show it under official names.

    Raises:
        UserError: as `open_sharded`, `plain_weights` and `official_names`.
    """
    source = plain_weights(open_sharded(path))
    return RenamedSource(source, official_names(path, source))


def official_names(path: Path, source: TensorSource) -> dict[str, str]:
    """The stored name of each tensor of the DiT in a source, by its official name; what else is there is left out.

    Args:
        path: of the source, for messages.
        source: names with or without a prefix of ComfyUI's, official or diffusers'.

    Raises:
        UserError: there is no DiT of Wan 2.2.
    """
    return shown_names(find_part(path, source.shapes, "transformer"), strict=False)


def arch_of(path: Path, source: TensorSource) -> WanArch:
    """The sizes of a DiT: by the `config.json` beside it (official or diffusers'), else those of the published model that it is.

    Args:
        path: directory or file.
        source: the DiT under official names.

    Raises:
        UserError: there is no `config.json` and the shapes are those of no published model, or the two disagree.
    """
    config = (path if path.is_dir() else path.parent) / "config.json"
    if path.is_file() and is_config_of_another_part(config):
        config = (
            path.parent / f"{path.stem}.config.json"
        )  # none: that of the folder is an encoder's or a VAE's
    return load_arch(config, source.shapes)
