"""Which of A14B's experts a file is for, as far as headers and names can tell: both have the same tensor names and shapes."""

from pathlib import Path
from typing import get_args

from models.wan.layouts import named_expert
from utils.adapter_runs import find_adapter_file
from utils.config.schema import Expert, ModelConfig, Problem
from utils.lora_names import SECOND_PREFIX
from utils.tensor_source import TensorSource, open_safetensors, open_sharded


def expert_of_adapter(adapter: Path) -> Expert | None:
    """The expert that the file is for, if it says so: by its metadata, which this project writes, or by diffusers' names,
    or by its own.

    In diffusers `transformer_2` is the low-noise expert. `transformer` says nothing: each expert's own file has it too.
    """
    source = open_safetensors([adapter])
    value = source.metadata().get("expert")
    if value is not None:
        return _known(value)
    if source.shapes and all(key.startswith(SECOND_PREFIX) for key in source.shapes):
        return "low_noise"
    return named_expert(adapter)


def expert_of_transformer(transformer: Path) -> Expert | None:
    """The expert whose weights these are, by their metadata or their name; None where neither says so.

    Raises:
        UserError: as `open_sharded`.
    """
    return _known(open_sharded(transformer).metadata().get("expert")) or named_expert(transformer)


def check_transformer_files(model: ModelConfig, source: TensorSource) -> list[Problem]:
    """The files of a DiT must not be those of the other expert by their metadata; names are `layouts.check_expert`'s."""
    told = _known(source.metadata().get("expert"))
    if model.expert is None or told in (None, model.expert):
        return []
    reason = f"is {model.expert!r}, but the metadata of {source.files[0]} say that it is the {told} expert"
    return [
        Problem("model.expert", reason, "choose the expert whose weights these are, or give the other file")
    ]


def check_initial_adapter(path: Path, expert: str | None) -> list[Problem]:
    """An adapter to start from must not be one of the other expert.

    Raises:
        UserError: there is no adapter there.
    """
    file = find_adapter_file(path)
    told = expert_of_adapter(file)
    if told is None or told == expert:
        return []
    if expert is None:
        reason = f"{file} is an adapter for the {told} expert of an A14B model, and this model has no experts"
        return [Problem("adapter.init_from_existing", reason, "start from an adapter of this model")]
    reason = f"{file} is an adapter for the {told} expert, and model.expert is {expert!r}"
    return [
        Problem(
            "adapter.init_from_existing",
            reason,
            f"start from one for the {expert} expert, or train the other one",
        )
    ]


def _known(value: str | None) -> Expert | None:
    return next((expert for expert in get_args(Expert) if expert == value), None)
