"""Checkpoints to resume from: one typed record of the loop's state, tensors by global name, one file per stage.

`global_stepN/` holds `loop.json` and per stage `stage_K.safetensors` (parameters as `param/<name>`, optimizer tensors as
`optim/<name>/<key>`) with `stage_K.json` (optimizer numbers). Where copies share the optimizer's state out, copy R > 0
adds its share as `stage_K_share_R`. Names do not mention stages or copies, so a run may resume with another number of
them. `latest` names the newest complete checkpoint and is replaced after the directory is in place.

This module knows the format and reads; `utils.checkpoint_writer` writes.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.errors import UserError
from utils.optim import group_counters, is_shared_out, local_optimizer, restore_group_counters
from utils.pipeline import Pipeline

FORMAT = 2
# Format 1 (2026) had no list of files, because there was no other than one pair per stage.
_FORMAT_WITHOUT_FILES = 1
LATEST = "latest"
LOOP_FILE = "loop.json"
SUFFIXES = (".safetensors", ".json")
_GROUPS = "(groups)"
_FOREIGN = ("mp_rank_*_model_states.pt", "layer_*-model_states.pt")


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
        descriptions: what each of these was, in words for a person: a path, a number of samples.
        optimizer: type of the optimizer whose state was saved; empty where that was not yet written down.
    """

    step: int
    samples_seen: int
    micro_batches_per_step: int
    train_seconds: float
    micro_batches_seen: int = 0
    fingerprints: dict[str, str] = field(default_factory=dict)
    descriptions: dict[str, str] = field(default_factory=dict)
    optimizer: str = ""


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after `step` optimizer steps."""
    return f"global_step{step}"


@dataclass(frozen=True)
class Share:
    """What one process contributes to a checkpoint: a file's name without its suffix, tensors and plain numbers."""

    stem: str
    tensors: dict[str, Tensor]
    numbers: dict[str, dict[str, Any]]

    @property
    def num_bytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def share_of(pipeline: Pipeline) -> Share | None:
    """This process's share: the stage's parameters on the first copy, and the optimizer state that it holds.

    The tensors are those that train, not copies. None where other processes have everything of this one.
    """
    is_first = pipeline.dp_rank == 0
    if not is_first and not is_shared_out(pipeline.optimizer):
        return None
    stem = f"stage_{pipeline.stage_id}" + ("" if is_first else f"_share_{pipeline.dp_rank}")
    share = Share(stem, {}, {_GROUPS: group_counters(pipeline.optimizer)})
    state_of = local_optimizer(pipeline.optimizer).state
    for name, parameter in pipeline.trainables.items():
        if is_first:
            share.tensors[f"param/{name}"] = parameter.detach()
        for key, value in state_of.get(parameter, {}).items():
            if isinstance(value, Tensor):
                share.tensors[f"optim/{name}/{key}"] = value.detach()
            else:
                share.numbers.setdefault(name, {})[key] = value
    return share


def loop_document(state: LoopState, num_stages: int, stems: list[str]) -> str:
    """Text of `loop.json` of a checkpoint that consists of these files."""
    files = [stem + suffix for stem in stems for suffix in SUFFIXES]
    document = {"format": FORMAT, "num_stages": num_stages, "files": files, **asdict(state)}
    return json.dumps(document, indent=2) + "\n"


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
    document = _read_document(checkpoint)
    for name in document.pop("files"):
        if not (checkpoint / name).is_file():
            raise UserError(
                f"{checkpoint / name}: missing; delete {checkpoint} to resume from the checkpoint before it"
            )
    try:
        return LoopState(**document)
    except TypeError as error:
        raise _damaged(checkpoint / LOOP_FILE, error) from error


def _read_document(checkpoint: Path) -> dict[str, Any]:
    """Content of `loop.json` without `format` and `num_stages`, its `files` also where the format has none."""
    path = checkpoint / LOOP_FILE
    if not path.exists() and any(list(checkpoint.glob(pattern)) for pattern in _FOREIGN):
        raise UserError(
            f"{checkpoint}: is a checkpoint of DeepSpeed's own format, which another program wrote; it cannot be continued "
            "here. Start a new run: an adapter goes into adapter.init_from_existing, an encoder into model.llm_path"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found, num_stages = document.pop("format"), document.pop("num_stages", 0)
        if found not in (FORMAT, _FORMAT_WITHOUT_FILES):
            raise UserError(
                f"{path}: checkpoint format {found}, this version reads formats {_FORMAT_WITHOUT_FILES} and {FORMAT}; use "
                "the version that wrote it"
            )
        if found == _FORMAT_WITHOUT_FILES:
            document["files"] = [
                f"stage_{stage}{suffix}" for stage in range(num_stages) for suffix in SUFFIXES
            ]
        if not all(Path(name).name == name for name in document["files"]):
            raise ValueError("files elsewhere")
        return dict(document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def load_checkpoint(checkpoint: Path, pipeline: Pipeline, *, with_optimizer: bool = True) -> None:
    """Put a checkpoint's parameters and optimizer state into this process's stage.

    Without the optimizer its state begins anew, as it has to where another kind of optimizer goes on.

    Raises:
        UserError: a file is missing or damaged, or its parameters are not this run's.
    """
    loaded: set[str] = set()
    for name in _read_document(checkpoint)["files"]:
        path = checkpoint / name
        if path.suffix == ".safetensors":
            _read_file(path, lambda file, path=path: loaded.update(_load_parameters(file, path, pipeline)))  # type: ignore[misc]
            if with_optimizer:
                _read_file(path, lambda file, path=path: _load_optimizer(file, path, pipeline))  # type: ignore[misc]
    missing = sorted(set(pipeline.trainables) - loaded)
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


def _load_parameters(file: Any, path: Path, pipeline: Pipeline) -> set[str]:
    """Fill this stage's parameters with those in the file; returns their names."""
    loaded, stored_names = set(), set(file.keys())
    for name, parameter in pipeline.trainables.items():
        if f"param/{name}" not in stored_names:
            continue
        stored = file.get_tensor(f"param/{name}")
        if stored.shape != parameter.shape:
            raise UserError(
                f"{path}: {name} has shape {list(stored.shape)} there and {list(parameter.shape)} in this run; "
                "adapter.rank and the model must not change between runs"
            )
        with torch.no_grad():
            parameter.copy_(stored)
        loaded.add(name)
    return loaded


def _load_optimizer(file: Any, path: Path, pipeline: Pipeline) -> None:
    """Fill the state of those parameters that this process's optimizer steps."""
    numbers = _read_numbers(path.with_suffix(".json"))
    optimizer_keys: dict[str, list[str]] = {}
    for entry in file.keys():  # noqa: SIM118 (not a dict)
        if entry.startswith("optim/"):
            name, key = entry.removeprefix("optim/").rsplit("/", 1)
            optimizer_keys.setdefault(name, []).append(key)
    restore_group_counters(pipeline.optimizer, numbers[_GROUPS])
    optimizer = local_optimizer(pipeline.optimizer)
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for name, parameter in pipeline.trainables.items():
        if id(parameter) not in own:
            continue
        state: dict[str, Any] = dict(numbers.get(name, {}))
        for key in optimizer_keys.get(name, []):
            value = file.get_tensor(f"optim/{name}/{key}")
            # Plain AdamW counts steps on the CPU, the fused one beside the parameter, where everything else is too.
            on_cpu = value.dim() == 0 and not fused
            state[key] = value.to("cpu" if on_cpu else parameter.device, copy=True)
        if state:
            optimizer.state[parameter] = state
