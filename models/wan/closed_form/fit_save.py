"""Writing solved adapters as training writes trained ones: the same names, metadata and checks, whole or not at all."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from models.wan.caching import hash_part
from models.wan.closed_form.fit_search import Fitted
from models.wan.closed_form.fit_subject import FitSide, FitSubject
from models.wan.setup import file_metadata
from utils.files import atomic_directory, combined_fingerprint
from utils.lora import parameter_names, save_adapter, scale_of
from utils.lora_check import check_saved_adapter


def write_adapters(
    out: Path, subject: FitSubject, fitted: Sequence[Fitted], keep_weight: float
) -> list[Path]:
    """Write the adapter of each side into `out`, of two experts into a directory each; returns the weight files.

    Raises:
        UserError: `out` exists, cannot be written, or what was written is not sound.
    """
    encoder_hash = hash_part(subject.tuned)
    written = []
    with atomic_directory(out) as temporary:
        for side, found in zip(subject.sides, fitted, strict=True):
            place = temporary if len(subject.sides) == 1 else temporary / str(side.expert)
            place.mkdir(exist_ok=True)
            written.append(_write(place, side, found, encoder_hash, keep_weight).relative_to(temporary))
    return [out / path for path in written]


def _write(place: Path, side: FitSide, found: Fitted, encoder_hash: str, keep_weight: float) -> Path:
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
