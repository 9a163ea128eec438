"""A LoRA merged into its base: weight + strength * scale * B A, written shard by shard, one tensor in memory at a time."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from models.wan.probes.subject import Subject, base_remarks, read_fitting_adapter
from utils.errors import UserError
from utils.files import atomic_directory, atomic_path, combined_fingerprint
from utils.lora_names import AdapterFile
from utils.report import refuse_training_run
from utils.safetensors_header import tensor_bytes
from utils.safetensors_stream import SafetensorsStream
from utils.scaled_source import plain_weights
from utils.tensor_source import TensorSource, open_safetensors, open_sharded

if TYPE_CHECKING:
    from torch import Tensor

MergeDtype = Literal["keep", "bfloat16", "float16", "float32"]
_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_TORCH = {stored: name for name, stored in _STORED.items()} | {"F64": "float64"}


@dataclass(frozen=True)
class _Plan:
    """What is written: the base, shown as plain weights, and by its tensor names the adapter's modules and dtypes."""

    source: TensorSource
    adapter: AdapterFile
    module_of: dict[str, str]
    dtypes: dict[str, str]
    strength: float


def merge_lora(
    adapter: Path,
    base: Path,
    target: Path,
    *,
    dtype: MergeDtype = "keep",
    strength: float = 1.0,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Write `base` with the adapter in it, in the base's own layout: the same names in the same files.

    Args:
        adapter: the LoRA's file.
        base: a directory of shards (that of one expert for A14B) or one `.safetensors` file; files in scaled 8 bits are
            written as plain bfloat16 unless `dtype` says otherwise.
        target: the directory, or the file, to write; it must not be there yet.
        dtype: of all floating-point tensors; "keep" leaves each as it is stored.
        strength: factor on what the adapter adds.
        say: hears remarks and progress.

    Raises:
        UserError: the adapter does not fit the base, values are not finite or leave the range of `dtype`, `target` exists, or the
            disk is full.
    """
    if target.exists():
        raise UserError(f"{target}: exists already and is not overwritten; give another --out")
    refuse_training_run(target, "--out")
    if base.is_dir() and target.suffix == ".safetensors":
        raise UserError(
            f"{target}: the base is a directory of files, so --out names a directory too; mend --out"
        )
    source = plain_weights(open_sharded(base))
    subject = Subject(adapter, base, None, None, None, ())
    fitting, base_keys = read_fitting_adapter(subject, source)
    for remark in base_remarks(adapter, source):
        say(remark)
    stored = open_sharded(base)
    plan = _Plan(
        source,
        fitting,
        {key: module for module, key in base_keys.items()},
        {name: _stored_dtype(name, source, stored, dtype) for name in source.shapes},
        strength,
    )
    metadata = {"merged_lora": combined_fingerprint([fitting.path]), "strength": f"{strength:g}"}
    if base.is_file():
        if target.suffix != ".safetensors":
            raise UserError(f"{target}: the base is one file, so --out must end in .safetensors")
        with atomic_path(target) as temporary:
            _write(temporary, list(source.shapes), plan, open_safetensors([base]).metadata() | metadata)
        return
    with atomic_directory(target) as directory:
        _write_shards(directory, base, plan, metadata, say)


def _write_shards(
    directory: Path, base: Path, plan: _Plan, metadata: dict[str, str], say: Callable[[str], None]
) -> None:
    for number, path in enumerate(plan.source.files, start=1):
        shard = open_safetensors([path])
        say(f"{path.name} ({number} of {len(plan.source.files)})")
        names = [name for name in shard.shapes if name in plan.source.shapes]
        _write(directory / path.name, names, plan, shard.metadata() | metadata)
    for index in base.glob("*.safetensors.index.json"):
        document = json.loads(index.read_text(encoding="utf-8"))
        document["weight_map"] = {
            name: file for name, file in document["weight_map"].items() if name in plan.source.shapes
        }
        written = plan.source.shapes.items()
        document["metadata"] = {
            "total_size": sum(tensor_bytes(shape, plan.dtypes[name]) for name, shape in written)
        }
        (directory / index.name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if (base / "config.json").is_file():
        shutil.copyfile(base / "config.json", directory / "config.json")


def _write(path: Path, names: list[str], plan: _Plan, metadata: dict[str, str]) -> None:
    shapes = {name: plan.source.shapes[name] for name in names}
    with SafetensorsStream(path, shapes, plan.dtypes, metadata) as stream:
        for name in names:
            stream.write(name, _merged(name, plan))
    plan.source.release()


def _merged(name: str, plan: _Plan) -> "Tensor":
    import torch

    tensor = plan.source.get(name)
    module = plan.module_of.get(name)
    if module is not None:
        pair = plan.adapter.modules[module]
        # In float32, and rounded once: the sum in bfloat16 would lose most of a small adapter.
        added = pair.up.float().flatten(1) @ pair.down.float().flatten(1)
        tensor = tensor.float() + (plan.strength * pair.scale) * added.view(tensor.shape)
    if not tensor.is_floating_point():
        return tensor
    wanted: torch.dtype = getattr(torch, _TORCH[plan.dtypes[name]])
    result = tensor.to(wanted)
    if not result.isfinite().all():
        reason = (
            "holds NaN or infinite values" if not tensor.isfinite().all() else f"leaves the range of {wanted}"
        )
        place = plan.source.location(name)
        where = plan.source.files[0] if place is None else place[0]
        raise UserError(f"{where}: {name} {reason}; choose another --dtype or base")
    return result


def _stored_dtype(name: str, source: TensorSource, stored: TensorSource, dtype: MergeDtype) -> str:
    """What a tensor is written as; of a scaled file, weights that were in 8 bits become bfloat16."""
    before = stored.dtypes[name]
    if before not in _TORCH and not before.startswith("F8"):
        return before  # whole numbers stay what they are
    if dtype != "keep":
        return _STORED[dtype]
    return "BF16" if before.startswith("F8") else source.dtypes[name]
