"""Writing solved adapters as training writes trained ones: the same names, metadata and checks, whole or not at all."""

from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from models.wan.caching import hash_part
from models.wan.closed_form.fit_job import Solved
from models.wan.closed_form.fit_search import Fitted
from models.wan.closed_form.fit_subject import FitSide
from models.wan.setup import file_metadata
from utils.files import atomic_directory, combined_fingerprint
from utils.lora import parameter_names, save_adapter, scale_of
from utils.lora_check import check_saved_adapter


def write_adapters(out: Path, solved: Solved) -> list[Path]:
    """Write the adapter of each side into `out`, of two experts into a directory each; returns the weight files.

    Raises:
        UserError: `out` exists, cannot be written, or what was written is not sound.
    """
    sides = solved.subject.sides
    encoder_hash = hash_part(solved.subject.tuned)
    written = []
    with atomic_directory(out) as temporary:
        for side, found in zip(sides, solved.fitted, strict=True):
            place = temporary if len(sides) == 1 else temporary / str(side.expert)
            place.mkdir(exist_ok=True)
            file = write_adapter(place, side, found, encoder_hash, solved.settings.keep_weight)
            written.append(file.relative_to(temporary))
    return [out / path for path in written]


def write_adapter(place: Path, side: FitSide, found: Fitted, encoder_hash: str, keep_weight: float) -> Path:
    """Write one side's adapter into the directory `place`; returns the weight file.

    Args:
        place: exists, and is renamed by the caller once it is whole.
        side: what it is for.
        found: what was solved.
        encoder_hash: of the tuned encoder (`models.wan.caching.hash_part`).
        keep_weight: for the metadata.

    Raises:
        UserError: it cannot be written, or what was written is not sound.
    """
    base_hash = combined_fingerprint(side.source.files)
    metadata = file_metadata(side.config, side.arch.variant, base_hash, encoder_hash, side.targets)
    metadata |= {
        "made_by": f"closed form {version('ai-model-sandbox')}",
        "ridge": f"{found.ridge:g}",
        "keep_weight": f"{keep_weight:g}",
    }
    parameters: dict[str, Tensor] = {}
    for one in found.solved:
        down_name, up_name = parameter_names(one.module)
        parameters[down_name] = one.down
        parameters[up_name] = one.up / scale_of(side.adapter)
    files = save_adapter(parameters, side.targets, side.adapter, place, metadata)
    check_saved_adapter(
        files[0], side.targets, side.source.shapes, side.adapter.rank, metadata, is_untrained=False
    )
    return files[0]
