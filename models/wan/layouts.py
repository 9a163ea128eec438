"""Where the parts of a Wan 2.2 checkpoint are, in each layout that it is handed on in, and what of them is missing.

official    `config.json` and shards (A14B: in `high_noise_model/` and `low_noise_model/`), UMT5 and VAE as `.pth`,
            `google/umt5-xxl/`: the published repositories.
diffusers   `transformer/`, `transformer_2/` (the low-noise expert), `text_encoder/`, `vae/`, `tokenizer/`.
files       single files, as ComfyUI has them: in the directory itself or in `diffusion_models/`, `text_encoders/`, `vae/`.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from models.wan.arch import VARIANTS, VariantInfo
from models.wan.config_json import read_config_json
from models.wan.downloads import (
    DIFFUSERS_EXPERTS,
    EXPERT_DIRS,
    TEXT_ENCODER_FILE,
    TOKENIZER_DIR,
    VAE_FILES,
    DownloadPart,
    download_command,
)
from models.wan.namings import Kind, find_naming, split_prefixes
from models.wan.tokenizer_place import TOKENIZER_FILES, has_tokenizer
from utils.config.experts import BOTH, expert_of_model, first_side
from utils.config.schema import Expert, ModelConfig, Problem
from utils.errors import UserError
from utils.safetensors_header import read_safetensors_header
from utils.tensor_source import open_sharded

_BY_MODEL_TYPE = {info.model_type: info for info in VARIANTS.values()}
_INDEX_GLOB = "*.safetensors.index.json"
_DIFFUSERS_ENCODER, _DIFFUSERS_TOKENIZER = "text_encoder", "tokenizer"
# Folders of ComfyUI's models/, and the directory itself.
_FOLDERS_OF: dict[Kind, tuple[str, ...]] = {
    "transformer": ("diffusion_models", "unet", "."),
    "text_encoder": ("text_encoders", "clip", "."),
    "vae": ("vae", "."),
}
# `wan2.2_t2v_high_noise_14B_fp16`, `Wan2_2-T2V-A14B-LOW_fp8`, `high_noise_model`. "high" alone may mean anything.
_EXPERT_IN_NAME = re.compile(
    r"(?<![a-z])(high|low)[ _.-]?noise(?![a-z])|a14b[ _.-](high|low)(?![a-z])", re.IGNORECASE
)


@dataclass(frozen=True)
class CheckpointPaths:
    """Where the parts of one checkpoint are.

    Attributes:
        transformer_dir: a directory of shards, or one `.safetensors` file.
        config_json: of the DiT, official or diffusers'; it may be missing where the sizes are published ones.
        text_encoder: a file, or a directory of shards.
        vae: the same.
        tokenizer_dir: a directory, or the encoder's own file where the tokenizer is inside it.
    """

    transformer_dir: Path
    config_json: Path
    text_encoder: Path
    vae: Path
    tokenizer_dir: Path


def locate(model: ModelConfig) -> tuple[CheckpointPaths, list[Problem]]:
    """Where each part is or should be, and what is missing. Nothing is read but `config.json` and headers of single files.

    Of both experts: what they share, and the first of the two.
    """
    asked, model = model, first_side(model)
    root, problems = Path(model.ckpt_path), list[Problem]()
    base = Path(model.transformer_path) if model.transformer_path else root
    expert = expert_of_model(model)
    transformer = _find_transformer(base, expert, problems, _key(model, "transformer_path"))
    config_json = _find_config_json(transformer, root, model)
    info = read_config_variant(config_json)
    text_encoder = _find_text_encoder(model, root, problems)
    paths = CheckpointPaths(
        transformer_dir=transformer,
        config_json=config_json,
        text_encoder=text_encoder,
        vae=_find_vae(model, root, info, problems),
        tokenizer_dir=_find_tokenizer(model, root, text_encoder),
    )
    if not root.is_dir():
        command = download_command("everything", _variant(model, info), expert, root)
        fix = f"give the checkpoint's directory, or download it: {command}"
        problems.append(Problem("model.ckpt_path", f"{root} is not a directory", fix))
    check_expert(asked, base, transformer, info, problems)
    _check_present(model, paths, info, problems)
    return paths, problems


def transformer_place(base: Path, expert: Expert | None) -> Path:
    """The DiT's directory below a checkpoint's: that of the expert, where there are two.

    `base` itself where the DiT lies in it, where it is a file, or where there are two and none is chosen.
    """
    if any((base / name).is_dir() for name in EXPERT_DIRS.values()):
        return base if expert is None else base / EXPERT_DIRS[expert]
    plain = base / DIFFUSERS_EXPERTS["high_noise"]
    if not plain.is_dir() and not (base / DIFFUSERS_EXPERTS["low_noise"]).is_dir():
        return base
    if has_two_experts(base):
        return base if expert is None else base / DIFFUSERS_EXPERTS[expert]
    info = read_config_variant(plain / "config.json")
    is_second = expert == "low_noise" and (info is None or info.has_experts)
    return base / DIFFUSERS_EXPERTS["low_noise"] if is_second else plain


def text_encoder_in(root: Path) -> Path | None:
    """The encoder of a checkpoint's directory, official or diffusers'; None where it has none."""
    if (root / TEXT_ENCODER_FILE).is_file():
        return root / TEXT_ENCODER_FILE
    folder = root / _DIFFUSERS_ENCODER
    return folder if folder.is_dir() and any(folder.glob("*.safetensors*")) else None


def tokenizers_in(root: Path) -> tuple[Path, Path]:
    """Where a checkpoint's directory has its tokenizer: official, diffusers'."""
    return root / TOKENIZER_DIR, root / _DIFFUSERS_TOKENIZER


def has_two_experts(base: Path) -> bool:
    """Whether a checkpoint's directory holds two DiTs, official or diffusers'."""
    folders = (*EXPERT_DIRS.values(), DIFFUSERS_EXPERTS["low_noise"])
    return any((base / name).is_dir() for name in folders)


def expert_model(model: ModelConfig, expert: Expert | None) -> ModelConfig:
    """`[model]` with another expert of the same checkpoint; a `transformer_path` of one expert stays that one's."""
    other = replace(model, expert=expert)
    place = model.transformer_path
    if place is None or expert == model.expert or has_two_experts(Path(place)):
        return other
    return replace(other, transformer_path=None)


def is_undecided(model: ModelConfig, paths: CheckpointPaths) -> bool:
    """True where there are two experts and none is chosen, so that no transformer can be looked at."""
    return model.expert is None and has_two_experts(paths.transformer_dir)


def read_config_variant(config_json: Path) -> VariantInfo | None:
    """The variant that `config.json` names, or None where it cannot be read: `load_arch` says why."""
    try:
        values = read_config_json(config_json)
    except (OSError, UserError):
        return None
    model_type = values.get("model_type") if isinstance(values, dict) else None
    return _BY_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None


def weight_files(place: Path) -> tuple[Path, ...]:
    """The weight files of a part: the file itself, or the shards of a directory.

    Raises:
        UserError: as `open_sharded`.
    """
    return open_sharded(place).files if place.is_dir() else (place,)


def named_expert(place: Path) -> Expert | None:
    """The expert that a file's or folder's own name says (`..._high_noise_...`, `low_noise_model`, `transformer_2`)."""
    if place.name in DIFFUSERS_EXPERTS.values() and has_two_experts(place.parent):
        return next(expert for expert, name in DIFFUSERS_EXPERTS.items() if name == place.name)
    found = {(match[1] or match[2]).lower() for match in _EXPERT_IN_NAME.finditer(place.name)}
    return next((one for one in get_args(Expert) if found == {one.partition("_")[0]}), None)


def _find_transformer(base: Path, expert: Expert | None, problems: list[Problem], key: str) -> Path:
    place = transformer_place(base, expert)
    is_bare = place == base and base.is_dir() and not has_two_experts(base)
    # The one DiT of a directory, in shards or not; several files without an index are a folder of single files.
    is_dit = (base / "config.json").is_file() and len(list(base.glob("*.safetensors"))) <= 1
    is_dit = is_dit or any(base.glob("*-of-*.safetensors"))
    if not is_bare or is_dit or any(base.glob(_INDEX_GLOB)):
        return place
    files = _files_of("transformer", base)
    fitting = [file for file in files if named_expert(file) in (None, expert)] if expert else files
    return _only(fitting, key, "transformer_path", "DiTs", problems) or place


def _find_config_json(transformer: Path, root: Path, model: ModelConfig) -> Path:
    beside = (transformer if transformer.is_dir() else transformer.parent) / "config.json"
    is_foreign = transformer.is_file() and is_config_of_another_part(beside)
    if (model.transformer_path or is_foreign) and (is_foreign or not beside.exists()):
        return transformer_place(root, expert_of_model(model)) / "config.json"
    return beside


def is_config_of_another_part(config_json: Path) -> bool:
    """Whether it is the `config.json` of an encoder or a VAE: a folder of single files may hold such a one."""
    try:
        values = read_config_json(config_json)
    except (OSError, UserError):
        return False
    return isinstance(values, dict) and ("d_model" in values or "z_dim" in values or "base_dim" in values)


def _find_text_encoder(model: ModelConfig, root: Path, problems: list[Problem]) -> Path:
    place = Path(model.llm_path) if model.llm_path else root
    inside = text_encoder_in(place)
    if inside is not None or model.llm_path:
        return inside or place
    if is_diffusers_root(root):
        return root / _DIFFUSERS_ENCODER
    files = _files_of("text_encoder", root)
    return _only(files, "model.ckpt_path", "llm_path", "encoders", problems) or root / TEXT_ENCODER_FILE


def _find_vae(model: ModelConfig, root: Path, info: VariantInfo | None, problems: list[Problem]) -> Path:
    place = Path(model.vae_path) if model.vae_path else root
    names = [VAE_FILES[info.vae_kind]] if info is not None else list(VAE_FILES.values())
    official = [place / name for name in names if (place / name).is_file()]
    folder = place / "vae"
    if model.vae_path and not official and not is_diffusers_root(place):
        return place
    if official or is_diffusers_root(place):
        return official[0] if official else folder
    files = _files_of("vae", place)
    return _only(files, "model.ckpt_path", "vae_path", "VAEs", problems) or place / names[-1]


def _find_tokenizer(model: ModelConfig, root: Path, text_encoder: Path) -> Path:
    if model.tokenizer_path:
        return Path(model.tokenizer_path)
    official, diffusers = tokenizers_in(root)
    places = (official, diffusers, text_encoder)
    default = diffusers if is_diffusers_root(root) else official
    return next((place for place in places if has_tokenizer(place)), default)


def is_diffusers_root(root: Path) -> bool:
    """Whether a directory is laid out as diffusers does."""
    return (root / "model_index.json").is_file() or any(
        (root / name).is_dir() for name in DIFFUSERS_EXPERTS.values()
    )


def _files_of(kind: Kind, root: Path) -> list[Path]:
    """Single files below a directory whose header is that of `kind`; what is not readable is passed over."""
    found = []
    for folder in _FOLDERS_OF[kind]:
        for file in sorted((root / folder).glob("*.safetensors")):
            try:
                names = read_safetensors_header(file).shapes
            except UserError:
                continue  # some other model's, or damaged: named by path it would be told
            if any(
                find_naming(group, prefix).kind == kind for prefix, group in split_prefixes(names).items()
            ):
                found.append(file)
    return found


def _only(files: list[Path], key: str, option: str, what: str, problems: list[Problem]) -> Path | None:
    """The file where there is one; of several the first, with the problem that it is not the only one."""
    if len(files) > 1:
        listed = ", ".join(str(file) for file in files[:4])
        reason = f"holds {len(files)} {what} ({listed}{', ...' if len(files) > 4 else ''})"
        problems.append(Problem(key, reason, f"say which with {option}"))
    return files[0] if files else None


def check_expert(
    model: ModelConfig, base: Path, transformer: Path, info: VariantInfo | None, problems: list[Problem]
) -> None:
    """Add what is wrong with `model.expert`: missing, out of place, or not that of the weights by their own name."""
    has_experts = info.has_experts if info else has_two_experts(base)
    if has_experts and model.expert is None:
        reason = f"is missing, but {base} is an A14B model, which has two experts"
        problems.append(Problem("model.expert", reason, 'write expert = "high_noise", "low_noise" or "both"'))
    if info and not info.has_experts and model.expert is not None:
        problems.append(
            Problem("model.expert", f"is {model.expert!r}, but {info.name} has no experts", "leave it out")
        )
    named = named_expert(transformer)
    # The place of both is that of the first of them, unless there is only one.
    is_found_below = model.expert == BOTH and transformer != base
    if model.expert is not None and named not in (None, model.expert) and not is_found_below:
        reason = f"is {model.expert!r}, but the weights are in {transformer}"
        problems.append(Problem("model.expert", reason, "choose the expert whose weights these are"))


def _check_present(
    model: ModelConfig, paths: CheckpointPaths, info: VariantInfo | None, problems: list[Problem]
) -> None:
    if not Path(model.ckpt_path).is_dir() and not model.transformer_path:
        return  # said already; that its parts are missing too helps nobody
    expected: dict[str, tuple[DownloadPart, Path]] = {}
    if not is_undecided(model, paths):
        expected["transformer_path"] = ("transformer", paths.transformer_dir)
    expected |= {
        "llm_path": ("text_encoder", paths.text_encoder),
        "vae_path": ("vae", paths.vae),
        "tokenizer_path": ("tokenizer", paths.tokenizer_dir),
    }
    for option, (part, path) in expected.items():
        reason = _why_absent(part, path)
        if reason is None:
            continue
        is_own = getattr(model, option) is not None
        root = path.parent if is_own else Path(model.ckpt_path)
        layout = not is_own and is_diffusers_root(root)
        command = download_command(
            part, _variant(model, info), expert_of_model(model), root, diffusers=layout
        )
        if is_own:
            fix = f"check the path, or download it: {command}"
        else:
            fix = f"download it ({command}), or give its place as {option}"
        problems.append(Problem(_key(model, option), reason, fix))


def _why_absent(part: DownloadPart, path: Path) -> str | None:
    """Why there is no such part at `path`; None where something is."""
    if not path.exists():
        return f"{path} is missing"
    if part == "tokenizer" and not has_tokenizer(path):
        return f"{path} holds neither {' nor '.join(TOKENIZER_FILES)}"
    if part == "transformer" and path.is_dir() and not any(path.glob("*.safetensors*")):
        return f"{path} holds no DiT (no .safetensors files)"
    return None


def _variant(model: ModelConfig, info: VariantInfo | None) -> VariantInfo | None:
    return info or (VARIANTS[model.variant] if model.variant else None)


def _key(model: ModelConfig, option: str) -> str:
    """The config key that decides where this part is."""
    return f"model.{option}" if getattr(model, option) else "model.ckpt_path"
