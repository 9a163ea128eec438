"""Which of A14B's experts a file is for, as far as headers and names can tell: both have the same tensor names and shapes."""

import re
from pathlib import Path
from typing import get_args

from utils.adapter_runs import find_adapter_file
from utils.config.schema import Expert, ModelConfig, Problem
from utils.lora_names import SECOND_PREFIX
from utils.tensor_source import TensorSource, open_safetensors

# `wan2.2_t2v_high_noise_14B_fp16`, `Wan2_2-T2V-A14B-LOW_fp8`, `high_noise_model`. "high" alone may mean anything.
_IN_NAME = re.compile(
    r"(?<![a-z])(high|low)[ _.-]?noise(?![a-z])|a14b[ _.-](high|low)(?![a-z])", re.IGNORECASE
)
# diffusers keeps the low-noise expert in a folder of this name; `transformer` alone may be any model's.
_DIFFUSERS_LOW = "transformer_2"


def expert_in_name(path: Path) -> Expert | None:
    """The expert that a file or folder is named after; None where its name says neither or both."""
    if path.name == _DIFFUSERS_LOW:
        return "low_noise"
    found = {(high or low).lower() for high, low in _IN_NAME.findall(path.name)}
    if found == {"high"}:
        return "high_noise"
    return "low_noise" if found == {"low"} else None


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
    return expert_in_name(adapter)


def check_transformer_files(model: ModelConfig, source: TensorSource) -> list[Problem]:
    """The files of a DiT must not be those of the other expert, by their metadata, their names and their folder's."""
    told = _known(source.metadata().get("expert"))
    who = "their metadata say"
    if told is None:
        places = [Path(file) for file in source.files[:1]]
        places += [place.parent for place in places]
        named = next((place for place in places if expert_in_name(place) is not None), None)
        if named is None:
            return []
        told, who = expert_in_name(named), f"the name {named.name} says"
    if model.expert is None or told in (None, model.expert):
        return []
    reason = f"is {model.expert!r}, but {who} that {source.files[0]} is the {told} expert"
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
