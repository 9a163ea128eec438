"""LoRA files: the names that trainers give their tensors, the names this project writes, and reading a file.

Understood, for a module `blocks.3.cross_attn.k`:

    diffusion_model.blocks.3.cross_attn.k.lora_A.weight      this project, ComfyUI (also lora_B, and alpha)
    base_model.model.blocks.3.cross_attn.k.lora_A.weight     PEFT, also with the adapter's name: lora_A.default.weight
    blocks.3.cross_attn.k.lora_down.weight                   without a prefix, and lora_down/lora_up for A/B
    lora_unet_blocks_3_cross_attn_k.lora_down.weight         kohya, given the names of the base's modules
    transformer.blocks.3.attn2.to_k.lora_A.weight            diffusers, likewise; transformer_2. for a second transformer

The module paths of other namings (kohya's, where '_' stands for '.', or diffusers', where modules have other names)
are translated by `aliases`, which whoever knows the model supplies. Names are parsed without torch; only `read_adapter`
needs it.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.adapter_runs import find_adapter_file
from utils.errors import UserError
from utils.tensor_source import open_safetensors

if TYPE_CHECKING:
    from torch import Tensor

Part = Literal["A", "B", "alpha"]
ScaleSource = Literal["alpha", "adapter_config.json", "none"]
DEFAULT_PREFIX = "diffusion_model."
KOHYA_PREFIX = "lora_unet_"
# diffusers' name for the second transformer of a pipeline.
SECOND_PREFIX = "transformer_2."
_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", SECOND_PREFIX, "model.")
_SUFFIXES: dict[Part, str] = {"A": "lora_A.weight", "B": "lora_B.weight", "alpha": "alpha"}
_PART = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?P<A>lora_A(?:\.[^.]+)?\.weight|lora_down\.weight|lora\.down\.weight)"
    r"|(?P<B>lora_B(?:\.[^.]+)?\.weight|lora_up\.weight|lora\.up\.weight)"
    r"|(?P<alpha>alpha))"
)
_UNSUPPORTED = (
    ("DoRA", re.compile(r"\.(dora_scale|lora_magnitude_vector)(\.|$)")),
    ("LoKr", re.compile(r"\.lokr_\w+(\.|$)")),
    ("LoHa", re.compile(r"\.hada_\w+(\.|$)")),
    ("OFT", re.compile(r"\.(oft_\w+|boft_\w+)(\.|$)")),
    ("(IA)^3", re.compile(r"\.ia3_\w+(\.|$)")),
    ("LoCon with a middle tensor", re.compile(r"\.lora_mid\.")),
    ("LoRA with a bias", re.compile(r"\.lora_[AB](\.[^.]+)?\.bias$")),
    ("LoRA on an embedding", re.compile(r"\.lora_embedding_[AB](\.|$)")),
    ("full difference", re.compile(r"\.diff(_b)?$")),
)


@dataclass(frozen=True)
class AdapterTensor:
    """One tensor of a LoRA file. `module` is the official path of the adapted module."""

    key: str
    module: str
    part: Part


@dataclass(frozen=True)
class AdapterKeys:
    """The tensors that adapt one module: A [rank, in], B [out, rank] and, where the file has it, alpha []."""

    module: str
    a: str
    b: str
    alpha: str | None


@dataclass(frozen=True)
class AdapterPair:
    """The adapter of one module: weight + scale * up @ down.

    Attributes:
        down: A, [rank, in] (a convolution's has more axes).
        up: B, [out, rank].
        scale: alpha / rank.
        scale_source: where alpha was found; "none" means nowhere, and scale is 1.
    """

    down: "Tensor"
    up: "Tensor"
    scale: float
    scale_source: ScaleSource

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.down.shape[0]


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA file: its adapters by official module path, in the file's order, and its metadata."""

    path: Path
    modules: dict[str, AdapterPair]
    metadata: dict[str, str]


def adapter_key(module: str, part: Part) -> str:
    """The name under which this project saves a tensor: `diffusion_model.<module>.lora_A.weight` and so on."""
    return f"{DEFAULT_PREFIX}{module}.{_SUFFIXES[part]}"


def kohya_aliases(modules: Iterable[str]) -> dict[str, str]:
    """Translation of kohya's flattened module names to the paths of `modules`, for `parse_adapter_key`.

    Raises:
        ValueError: two modules flatten to one name.
    """
    aliases: dict[str, str] = {}
    for module in modules:
        if aliases.setdefault(module.replace(".", "_"), module) != module:
            raise ValueError(
                f"{module} and {aliases[module.replace('.', '_')]} have one name in kohya's naming"
            )
    return aliases


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """[out, in] of a weight as an adapter sees it: the places of a convolution's kernel count as inputs."""
    return shape[0], math.prod(shape[1:])


def adapted_shape(down: Sequence[int], up: Sequence[int]) -> tuple[int, int] | None:
    """[out, in] of the weight that A [rank, in, ...] and B [out, rank, ...] adapt; None where they do not fit together."""
    if len(down) < 2 or len(up) < 2 or down[0] != up[1] or not math.prod(down):
        return None
    return up[0], math.prod(down[1:])


def parse_adapter_key(key: str, aliases: Mapping[str, str] | None = None) -> AdapterTensor | None:
    """What the tensor `key` is, or None if its name is not one of a LoRA.

    A module path that `aliases` does not translate is returned as it stands: whether the base has such a module is
    for the caller to check.

    Raises:
        UserError: the tensor belongs to a kind of adapter that is not supported; the message names the kind.
    """
    for kind, pattern in _UNSUPPORTED:
        if pattern.search(key):
            raise UserError(
                f"{key}: this is a {kind} adapter, which is not supported; only plain LoRA (A and B, maybe alpha) is"
            )
    match = _PART.fullmatch(key)
    if match is None:
        return None
    part: Part = "A" if match["A"] else "B" if match["B"] else "alpha"
    module = _strip_prefixes(match["module"])
    return AdapterTensor(key, (aliases or {}).get(module, module), part)


def pair_adapter_keys(
    keys: Iterable[str], where: str, aliases: Mapping[str, str] | None = None
) -> dict[str, AdapterKeys]:
    """Sort all the tensor names of a LoRA file by module, in the order of the file.

    Args:
        keys: the names.
        where: the file, for messages.
        aliases: see `parse_adapter_key`.

    Raises:
        UserError: the file holds no LoRA (such as merged full weights), a kind that is not supported, names that
            belong to no LoRA, two tensors for one place, or an A without its B.
    """
    found: dict[str, dict[Part, str]] = {}
    foreign: list[str] = []
    for key in keys:
        try:
            tensor = parse_adapter_key(key, aliases)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if tensor is None:
            foreign.append(key)
            continue
        parts = found.setdefault(tensor.module, {})
        if tensor.part in parts:
            raise UserError(
                f"{where}: {parts[tensor.part]} and {key} are both the {tensor.part} of {tensor.module}; "
                "a file must hold one adapter"
            )
        parts[tensor.part] = key
    if not found:
        raise UserError(
            f"{where}: holds no LoRA tensor{_instead(foreign)}; give the file that training saved"
        )
    if foreign:
        raise UserError(
            f"{where}: {_some(foreign)} are not tensors of a LoRA; give a file that holds an adapter and nothing else"
        )
    incomplete = [module for module, parts in found.items() if not {"A", "B"} <= parts.keys()]
    if incomplete:
        raise UserError(
            f"{where}: A or B is missing for {_some(incomplete)}; the file is incomplete, save or download it again"
        )
    return {
        module: AdapterKeys(module, parts["A"], parts["B"], parts.get("alpha"))
        for module, parts in found.items()
    }


def read_adapter(path: Path, aliases: Mapping[str, str] | None = None) -> AdapterFile:
    """Read a LoRA file.

    alpha is the file's own; without it, that of an `adapter_config.json` beside the file (as PEFT writes it); without
    both the scale is 1, as in every loader.

    Args:
        path: a `.safetensors` file, the directory it is in, or a training run (see `find_adapter_file`).
        aliases: see `parse_adapter_key`.

    Raises:
        UserError: there is no such file, it cannot be read, holds no plain LoRA (see `pair_adapter_keys`), shapes that
            do not fit together, or values that are not finite.
    """
    from safetensors import SafetensorError

    path = find_adapter_file(Path(path))
    source = open_safetensors([path])
    found = pair_adapter_keys(source.shapes, str(path), aliases)
    config = _read_peft_config(path.parent / "adapter_config.json")
    modules = {}
    try:
        for module, keys in found.items():
            tensors = {key: source.get(key) for key in (keys.a, keys.b, keys.alpha) if key}
            modules[module] = _pair(keys, tensors, config, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not readable as safetensors ({error}); save or download it again") from None
    return AdapterFile(path, modules, source.metadata())


def _pair(
    keys: AdapterKeys, tensors: Mapping[str, "Tensor"], config: Mapping[str, Any], path: Path
) -> AdapterPair:
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(
                f"{path}: {key} holds {tensor.dtype}, not floating-point numbers; save the adapter unquantised"
            )
        if not tensor.float().isfinite().all():
            raise UserError(
                f"{path}: {key} holds NaN or infinite values; the training broke, use an earlier save"
            )
    down, up = tensors[keys.a], tensors[keys.b]
    if adapted_shape(down.shape, up.shape) is None:
        raise UserError(
            f"{path}: {keys.module}: A is {list(down.shape)} and B is {list(up.shape)}, but they should be [rank, in] and [out, rank]"
        )
    rank = down.shape[0]
    if keys.alpha is None:
        scale, source = _peft_scale(config, _own_name(keys.a), rank, path)
        return AdapterPair(down, up, scale, source)
    if tensors[keys.alpha].numel() != 1:
        raise UserError(
            f"{path}: {keys.alpha} is {list(tensors[keys.alpha].shape)}, but alpha is a single number"
        )
    return AdapterPair(down, up, tensors[keys.alpha].item() / rank, "alpha")


def _read_peft_config(path: Path) -> dict[str, Any]:
    """The content of an `adapter_config.json`, empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not readable as JSON ({error}); it says how strong the adapter beside it is, so mend it"
        ) from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a PEFT adapter_config.json; mend or remove it")
    if config.get("use_dora"):
        raise UserError(
            f"{path}: use_dora: this is a DoRA adapter, which is not supported; only plain LoRA is"
        )
    return config


def _peft_scale(config: Mapping[str, Any], module: str, rank: int, path: Path) -> tuple[float, ScaleSource]:
    """PEFT's scale: alpha / rank, or alpha / sqrt(rank) where rank-stabilised; `alpha_pattern` holds exceptions.

    Patterns are on the names that the trainer's model had, which are those of the file.
    """
    patterns = config.get("alpha_pattern") or {}
    alpha = config.get("lora_alpha")
    try:
        alpha = next(
            (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)), alpha
        )
        if alpha is None:
            return 1.0, "none"
        scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise UserError(
            f"{path.parent / 'adapter_config.json'}: lora_alpha or alpha_pattern is not usable ({error})"
        ) from None
    if not math.isfinite(scale):
        raise UserError(f"{path.parent / 'adapter_config.json'}: lora_alpha is {alpha}, not a finite number")
    return scale, "adapter_config.json"


def _own_name(key: str) -> str:
    """The module that the tensor `key` adapts, as the file names it."""
    match = _PART.fullmatch(key)
    return _strip_prefixes(match["module"]) if match else key


def _strip_prefixes(module: str) -> str:
    if module.startswith(KOHYA_PREFIX):
        return module.removeprefix(KOHYA_PREFIX)
    while prefix := next((prefix for prefix in _PREFIXES if module.startswith(prefix)), None):
        module = module.removeprefix(prefix)
    return module


def _instead(foreign: list[str]) -> str:
    if not foreign:
        return " (it is empty)"
    if any(key.endswith(".weight") for key in foreign):
        return f", but full weights such as {foreign[0]}"
    return f", but {_some(foreign)}"


def _some(names: list[str]) -> str:
    more = f" (and {len(names) - 10} more)" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
