"""Finding the weight files below a path, in every layout that Wan 2.2 is handed on in, and recognising each.

Official directories (one DiT, or an A14B root with both experts), diffusers' (`transformer/`, `transformer_2/`,
`text_encoder/`, `vae/`), folders of single files as ComfyUI has them, what a training run saved, or one file.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from models.wan.checkpoint import EXPERT_DIRS, TEXT_ENCODER_FILE, TOKENIZER_DIR, VAE_FILES, has_tokenizer
from models.wan.downloads import DIFFUSERS_EXPERTS, TEXT_ENCODER_WEIGHTS
from models.wan.namings import Kind
from models.wan.probes.parts import Part, recognise
from utils.adapter_runs import ADAPTER_NAME, RUN_CONFIG_NAME
from utils.config.schema import Expert, TrainConfig
from utils.errors import UserError
from utils.tensor_source import open_pth, open_safetensors, open_sharded, open_weights

# Folders in which parts of a checkpoint lie, of the official layout, diffusers' and ComfyUI's.
_FOLDERS = (
    *EXPERT_DIRS.values(),
    "transformer",
    "transformer_2",
    "unet",
    "diffusion_models",
    "text_encoder",
    "text_encoders",
    "clip",
    "vae",
)
_ORDER = get_args(Kind)
_INDEX_SUFFIX = ".safetensors.index.json"
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
_EXPERT_IN_NAME = re.compile(r"(?<![a-z])(high|low)[ _-]?(?:noise)?(?![a-z])", re.IGNORECASE)
_SAVE = re.compile(r"(?:epoch|step)(\d+)")
_SAVED = (ADAPTER_NAME, TEXT_ENCODER_WEIGHTS, TEXT_ENCODER_FILE)
_AS_WAN21 = "Wan 2.1's 14B text-to-video model has the same names and shapes as an expert of T2V-A14B, so it may be that"
_DIFFUSERS_EXPERTS: dict[str, Expert] = {folder: expert for expert, folder in DIFFUSERS_EXPERTS.items()}


@dataclass(frozen=True)
class Checkpoint:
    """What lies at a path.

    Attributes:
        path: as it was given.
        layout: what kind of directory or file it is.
        parts: everything that was recognised, and what was not.
        problems: parts that are missing as a whole.
        remarks: what else is worth knowing.
    """

    path: Path
    layout: str
    parts: tuple[Part, ...]
    problems: tuple[str, ...]
    remarks: tuple[str, ...]


def open_checkpoint(path: Path, expert: Expert | None = None) -> Checkpoint:
    """Find and recognise everything at `path`; headers only.

    Args:
        path: a weight file, an index, or a directory.
        expert: of an A14B checkpoint look at this expert alone; of one file, the user's word for which it is.

    Raises:
        UserError: there is nothing, a file is damaged, or the expert asked for is not there.
    """
    path = Path(path)
    if path.name.endswith(_INDEX_SUFFIX) and path.is_file():
        path = path.parent
    units = _units(path)
    if not units:
        raise UserError(
            f"{path}: holds no weights ({_found_instead(path)}); give a checkpoint's directory, or a .safetensors or .pth file"
        )
    parts = [part for unit in units for part in _open_unit(unit)]
    parts = [_name_expert(part, expert, is_only=units == [path]) for part in parts]
    parts.sort(key=lambda part: _ORDER.index(part.kind))
    if expert is not None and units != [path]:
        parts = _only(parts, expert, path)
    return Checkpoint(
        path=path,
        layout=_layout(path, parts),
        parts=tuple(parts),
        problems=(*_missing_experts(path, parts, expert), *_missing_second(path)),
        remarks=tuple(_remarks(path, parts)),
    )


def checkpoint_of_config(config: TrainConfig, expert: Expert | None) -> Checkpoint:
    """The checkpoint that a run's config names: `ckpt_path`, with the parts that other keys replace.

    Raises:
        UserError: as `open_checkpoint`.
    """
    model = config.model
    root = Path(model.ckpt_path)
    whole = open_checkpoint(root, None if model.transformer_path else expert)
    parts = list(whole.parts)
    replaced = {"transformer": model.transformer_path, "text_encoder": model.llm_path, "vae": model.vae_path}
    for kind, given in replaced.items():
        if given:
            other = open_checkpoint(Path(given), expert if kind == "transformer" else None)
            parts = [part for part in parts if part.kind != kind] + list(other.parts)
    problems = () if model.transformer_path else whole.problems
    return Checkpoint(root, whole.layout, tuple(parts), problems, whole.remarks)


def _units(path: Path) -> list[Path]:
    """Files, and directories of one set of shards, in the order in which they are shown."""
    if not path.exists():
        raise UserError(f"{path}: no such file or directory; check the path")
    if not path.is_dir():
        return [path]
    save = _last_save(path)
    if save is not None:
        return _units_in(save)
    units = _units_in(path)
    for folder in _FOLDERS:
        if (path / folder).is_dir():
            units += _units_in(path / folder)
    return units


def _units_in(directory: Path) -> list[Path]:
    """Sets of shards (the directory itself) and single files right inside a directory."""
    try:
        files = sorted(entry for entry in directory.iterdir() if entry.is_file())
    except OSError as error:
        raise UserError(f"{directory}: cannot be read ({error.strerror}); check its rights") from None
    has_index = any(file.name.endswith(_INDEX_SUFFIX) for file in files)
    shards = [file for file in files if _SHARD.fullmatch(file.name)]
    listed = _listed_in_index(files)
    units = [directory] if has_index or shards else []
    for file in files:
        if file.suffix in (".pth", ".pt") or (
            file.suffix == ".safetensors" and file not in shards and file.name not in listed
        ):
            units.append(file)
    return units


def _listed_in_index(files: Iterable[Path]) -> set[str]:
    """Names of files that an index names, so that shards under unusual names are not taken for files of their own."""
    names: set[str] = set()
    for file in files:
        if file.name.endswith(_INDEX_SUFFIX):
            try:
                values = json.loads(file.read_text(encoding="utf-8"))
                names |= {str(shard) for shard in values["weight_map"].values()}
            except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
                continue  # open_sharded says what is wrong with it
    return names


def _open_unit(unit: Path) -> list[Part]:
    if unit.is_dir():
        return recognise(unit, open_sharded(unit))
    if unit.suffix in (".pth", ".pt"):
        return recognise(unit, open_pth(unit))
    if unit.suffix == ".safetensors":
        return recognise(unit, open_safetensors([unit]))
    open_weights(unit)  # says what to give instead
    raise UserError(f"{unit}: not a weight file that can be read here")


def _name_expert(part: Part, flag: Expert | None, *, is_only: bool) -> Part:
    """The part with the expert that it is, as far as anything tells; contradictions become remarks."""
    if part.kind != "transformer" or part.variant is None or not part.variant.has_experts:
        return part
    told = _who_tells(part, flag if is_only else None)
    if not told:
        remarks = [_AS_WAN21] if part.variant.name == "t2v-a14b" else []
        return part.with_expert(
            None,
            "nothing: neither folder, file name nor metadata name the expert; say it with --expert",
            remarks,
        )
    basis, expert = told[0]
    others = [f"{who} says {other}" for who, other in told[1:] if other != expert]
    remarks = [f"warning: {basis} says {expert}, but {'; '.join(others)}"] if others else []
    return part.with_expert(expert, basis, remarks)


def _who_tells(part: Part, flag: Expert | None) -> list[tuple[str, Expert]]:
    """Everything that names the expert, what counts most first."""
    told: list[tuple[str, Expert]] = [("the flag --expert", flag)] if flag else []
    value = part.source.metadata().get("expert")
    told += [("the file's metadata", expert) for expert in get_args(Expert) if expert == value]
    path = part.path.absolute()
    names = [path] if path.is_dir() else [path, path.parent]
    for one in names:
        what = "the folder" if one.is_dir() else "the file name"
        if one.name in _DIFFUSERS_EXPERTS and (
            one.name == "transformer_2" or (one.parent / "transformer_2").is_dir()
        ):
            told.append((f"{what} {one.name}/ (diffusers)", _DIFFUSERS_EXPERTS[one.name]))
        found = {match[1].lower() for match in _EXPERT_IN_NAME.finditer(one.name)}
        if len(found) == 1:
            told.append((f"{what} {one.name}", "high_noise" if found == {"high"} else "low_noise"))
    return told


def _only(parts: Sequence[Part], expert: Expert, path: Path) -> list[Part]:
    """Without the transformers of the other expert."""
    kept = [part for part in parts if part.kind != "transformer" or part.expert == expert]
    if not any(part.kind == "transformer" for part in kept):
        raise UserError(f"{path}: holds no {expert} expert, which --expert asks for; check both")
    return kept


def _missing_experts(path: Path, parts: Sequence[Part], flag: Expert | None) -> list[str]:
    """The other expert, where a root should hold both and holds one."""
    experts = {part.expert for part in parts if part.kind == "transformer" and part.expert}
    if flag is not None or len(experts) != 1 or not path.is_dir():
        return []
    official = [name for name in EXPERT_DIRS.values() if (path / name).is_dir()]
    lacking: Expert = "low_noise" if experts == {"high_noise"} else "high_noise"
    if official:
        return [
            f"{path / EXPERT_DIRS[lacking]} is missing: {path} is an A14B checkpoint, which has two experts"
        ]
    if (path / "transformer_2").is_dir():
        return [f"{path / 'transformer'} is missing, which holds the high_noise expert"]
    return []


def _missing_second(path: Path) -> list[str]:
    """diffusers' second transformer, where `model_index.json` has a boundary between two."""
    try:
        values = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    has_boundary = isinstance(values, dict) and values.get("boundary_ratio") is not None
    if has_boundary and not (path / "transformer_2").is_dir():
        return [
            f"{path / 'transformer_2'} is missing, which holds the low_noise expert (model_index.json has a boundary_ratio)"
        ]
    return []


def _layout(path: Path, parts: Sequence[Part]) -> str:
    if not path.is_dir():
        return "one file" if len(parts) <= 1 else f"one file with {len(parts)} parts"
    if any((path / name).is_dir() for name in EXPERT_DIRS.values()):
        return "official A14B directory"
    if (path / "transformer").is_dir() or (path / "model_index.json").is_file():
        return "diffusers directory"
    if any((path / name).is_file() for name in (TEXT_ENCODER_FILE, *VAE_FILES.values())):
        return "official directory"
    if (path / RUN_CONFIG_NAME).is_file() or _SAVE.fullmatch(path.absolute().name):
        return "what a training run saved"
    if len(parts) == 1 and parts[0].path.is_dir():
        return "directory of shards"
    return "folder of weight files"


def _remarks(path: Path, parts: Sequence[Part]) -> list[str]:
    """What a checkpoint in the official layout lacks; each may be given to training by a path of its own."""
    if _layout(path, parts) not in ("official A14B directory", "official directory"):
        return []
    kinds = {part.kind for part in parts}
    remarks = []
    if "text_encoder" not in kinds:
        remarks.append(f"there is no text encoder in {path} ({TEXT_ENCODER_FILE})")
    if "vae" not in kinds:
        remarks.append(f"there is no VAE in {path} ({' or '.join(VAE_FILES.values())})")
    if not has_tokenizer(path / TOKENIZER_DIR):
        remarks.append(f"there is no tokenizer in {path} ({TOKENIZER_DIR}/)")
    return remarks


def _last_save(path: Path) -> Path | None:
    """The newest `epochN/` or `stepN/` of a training run; None for any other directory."""
    if not (path / RUN_CONFIG_NAME).is_file():
        return None
    saves = [
        folder
        for folder in path.iterdir()
        if _SAVE.fullmatch(folder.name) and any((folder / name).is_file() for name in _SAVED)
    ]
    return max(saves, key=lambda folder: (folder.stat().st_mtime_ns, folder.name), default=None)


def _found_instead(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    if not names:
        return "it is empty"
    return f"there are {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
