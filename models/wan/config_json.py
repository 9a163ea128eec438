"""A DiT's `config.json` in either form: the official one, or that of a diffusers directory, read as the official one."""

import json
from pathlib import Path
from typing import Any

from utils.errors import UserError

# In diffusers nothing names the variant; these are facts of the published models (`in_dim` of each).
_MODEL_TYPE_BY_CHANNELS = {16: "t2v", 36: "i2v", 48: "ti2v"}
# `text_len` is an argument of diffusers' pipeline and not of its transformer; it is the same in all of Wan 2.2.
_TEXT_LEN = 512
_RENAMED = {
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "num_attention_heads": "num_heads",
    "num_layers": "num_layers",
    "eps": "eps",
}


def read_config_json(path: Path) -> Any:
    """The values of a `config.json` under the official keys; whatever else the file holds is returned as it stands.

    Raises:
        UserError: the file is not readable as JSON, or is that of diffusers' Wan 2.1 image-to-video model.
        FileNotFoundError: it is not there.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); download it again") from None
    return _to_official(Path(path), values) if is_diffusers(values) else values


def is_diffusers(values: Any) -> bool:
    """Whether these are the values of diffusers' WanTransformer3DModel."""
    return isinstance(values, dict) and "model_type" not in values and "num_attention_heads" in values


def _to_official(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    if values.get("image_dim") is not None or values.get("added_kv_proj_dim") is not None:
        raise UserError(
            f"{path}: has image_dim or added_kv_proj_dim, so it is a Wan 2.1 image-to-video model; this project trains "
            "Wan 2.2 only"
        )
    official = {name: values[key] for key, name in _RENAMED.items() if key in values}
    heads, width = values.get("num_attention_heads"), values.get("attention_head_dim")
    if type(heads) is int and type(width) is int:
        official["dim"] = heads * width
    channels = values.get("in_channels")
    if type(channels) is int and channels in _MODEL_TYPE_BY_CHANNELS:
        official["model_type"] = _MODEL_TYPE_BY_CHANNELS[channels]
    elif channels is not None:
        raise UserError(
            f"{path}: in_channels {channels!r} is no Wan 2.2 variant (known: "
            f"{', '.join(f'{number} ({name})' for number, name in _MODEL_TYPE_BY_CHANNELS.items())})"
        )
    return official | {"text_len": _TEXT_LEN}
