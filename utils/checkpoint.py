"""Checkpoints to resume from: one typed record of the loop's state, tensors by global name, one file per stage.

`global_stepN/` holds `loop.json` and per stage `stage_K.safetensors` (parameters as `param/<name>`, optimizer tensors as
`optim/<name>/<key>`) with `stage_K.json` (optimizer numbers). Names do not mention stages, so a run may resume with
another number of them. `latest` names the newest complete checkpoint and is replaced after the directory is in place.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.distributed import on_main
from utils.errors import UserError
from utils.files import atomic_write_text
from utils.optim import group_counters, restore_group_counters
from utils.pipeline import Pipeline
from utils.saver import write_together

FORMAT = 1
LATEST = "latest"
_LOOP_FILE = "loop.json"
_GROUPS = "(groups)"
_STAGE_SUFFIXES = (".safetensors", ".json")


@dataclass(frozen=True)
class LoopState:
    """Everything the loop has to remember. The rest (order, noise, learning rate) follows from it.

    Attributes:
        step: optimizer steps done.
        samples_seen: samples that contributed to them.
        micro_batches_per_step: accumulation times data-parallel copies.
        train_seconds: time spent training, over all resumes.
        micro_batches_seen: position in the stream of micro-batches.
        fingerprints: content of what the run rests on, by what it is (dataset, DiT, VAE, ...).
    """

    step: int
    samples_seen: int
    micro_batches_per_step: int
    train_seconds: float
    micro_batches_seen: int = 0
    fingerprints: dict[str, str] = field(default_factory=dict)


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after `step` optimizer steps."""
    return f"global_step{step}"


def save_checkpoint(run_dir: Path, pipeline: Pipeline, state: LoopState, keep: int) -> None:
    """Write a checkpoint, point `latest` at it, and drop all but the newest `keep`. Every rank must call it.

    Raises:
        UserError: the disk is full; earlier checkpoints and `latest` are untouched.
    """

    def write_share(directory: Path) -> None:
        if pipeline.dp_rank == 0:
            _write_stage(directory, pipeline)

    def finish(directory: Path) -> None:
        document = {"format": FORMAT, "num_stages": pipeline.num_stages, **asdict(state)}
        (directory / _LOOP_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    target = run_dir / checkpoint_name(state.step)
    write_together(target, write_share, finish)

    def point_and_prune() -> None:
        atomic_write_text(run_dir / LATEST, target.name + "\n")
        others = [path for path in complete_checkpoints(run_dir) if path != target]
        for old in others[: max(0, len(others) + 1 - keep)]:
            shutil.rmtree(old)

    on_main(point_and_prune)


def _write_stage(directory: Path, pipeline: Pipeline) -> None:
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in pipeline.trainables.items():
        tensors[f"param/{name}"] = parameter.detach()
        for key, value in pipeline.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optim/{name}/{key}"] = value.detach()
            else:
                numbers.setdefault(name, {})[key] = value
    numbers[_GROUPS] = group_counters(pipeline.optimizer)
    # clone: safetensors refuses tensors that share memory (8-bit optimizers share their quantisation map)
    flat = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(flat, directory / f"stage_{pipeline.stage_id}.safetensors")
    text = json.dumps(numbers, indent=1) + "\n"
    (directory / f"stage_{pipeline.stage_id}.json").write_text(text, encoding="utf-8")


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. A directory gets its name only when it is whole."""
    prefix = checkpoint_name(0)[:-1]
    found = [path for path in run_dir.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)))


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that `latest` names; where the file is missing or names nothing, the newest complete one."""
    pointer, complete = run_dir / LATEST, complete_checkpoints(run_dir)
    if pointer.exists():
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        named = [path for path in complete if path.name == name]
        if named:
            return named[0]
    return complete[-1] if complete else None


def read_state(checkpoint: Path) -> LoopState:
    """The loop's state in a checkpoint.

    Raises:
        UserError: a file is missing, damaged or of another format.
    """
    path = checkpoint / _LOOP_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = document.pop("format")
        if found != FORMAT:
            raise UserError(
                f"{path}: checkpoint format {found}, this version reads format {FORMAT}; use the version that wrote it"
            )
        num_stages = document.pop("num_stages")
        for name in [f"stage_{stage}{suffix}" for stage in range(num_stages) for suffix in _STAGE_SUFFIXES]:
            if not (checkpoint / name).is_file():
                raise UserError(
                    f"{checkpoint / name}: missing; delete {checkpoint} to resume from the checkpoint before it"
                )
        return LoopState(**document)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged or incomplete ({type(error).__name__}: {error}); delete {checkpoint} to resume from the checkpoint before it"
        ) from error


def load_checkpoint(checkpoint: Path, pipeline: Pipeline) -> None:
    """Put a checkpoint's parameters and optimizer state into this stage.

    Raises:
        UserError: a stage file is missing or damaged, or its parameters are not this run's.
    """
    wanted = pipeline.trainables
    seen: set[str] = set()
    for path in sorted(checkpoint.glob("stage_*.safetensors")):
        _read_file(path, lambda file, path=path: seen.update(_load_stage(file, path, pipeline)))  # type: ignore[misc]
    missing = sorted(set(wanted) - seen)
    if missing:
        raise UserError(
            f"{checkpoint}: holds no {missing[0]} (and {len(missing) - 1} more of this run's trained parameters); what is "
            "trained must not change between runs"
        )


def _read_file(path: Path, use: Callable[[Any], None]) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            use(file)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _read_numbers(path: Path) -> dict[str, dict[str, Any]]:
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(numbers, dict) or _GROUPS not in numbers:
            raise ValueError("not the numbers of an optimizer")
        return numbers
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: damaged ({error}); delete {path.parent} to resume from the checkpoint before it"
    )


def _load_stage(file: Any, path: Path, pipeline: Pipeline) -> set[str]:
    numbers = _read_numbers(path.with_suffix(".json"))
    wanted = pipeline.trainables
    optimizer_keys: dict[str, list[str]] = {}
    for entry in file.keys():  # noqa: SIM118 (not a dict)
        if entry.startswith("optim/"):
            name, key = entry.removeprefix("optim/").rsplit("/", 1)
            optimizer_keys.setdefault(name, []).append(key)
    restore_group_counters(pipeline.optimizer, numbers[_GROUPS])
    fused = any(group.get("fused") for group in pipeline.optimizer.param_groups)
    loaded = set()
    for name, parameter in wanted.items():
        if f"param/{name}" not in file.keys():  # noqa: SIM118 (not a dict)
            continue
        stored = file.get_tensor(f"param/{name}")
        if stored.shape != parameter.shape:
            raise UserError(
                f"{path}: {name} has shape {list(stored.shape)} there and {list(parameter.shape)} in this run; "
                "adapter.rank and the model must not change between runs"
            )
        with torch.no_grad():
            parameter.copy_(stored)
        state: dict[str, Any] = dict(numbers.get(name, {}))
        for key in optimizer_keys.get(name, []):
            value = file.get_tensor(f"optim/{name}/{key}")
            # Plain AdamW counts steps on the CPU, the fused one beside the parameter, where everything else is too.
            on_cpu = value.dim() == 0 and not fused
            state[key] = value.to("cpu" if on_cpu else parameter.device, copy=True)
        if state:
            pipeline.optimizer.state[parameter] = state
        loaded.add(name)
    return loaded
