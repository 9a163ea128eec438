"""The model of a plan: what the DiT's headers say, and what of a checkpoint is missing. No tensor is read."""

from dataclasses import dataclass, replace
from pathlib import Path

from models.wan.arch import WanArch, load_arch
from models.wan.checkpoint import (
    CheckpointPaths,
    check_checkpoint,
    locate,
    open_as_stored,
    open_text_encoder,
    open_transformer,
    read_variant,
    without_mistaken,
)
from models.wan.component_shapes import Umt5Sizes, expected_umt5_shapes, text_encoder_sizes
from models.wan.preflight import check_dit, check_pair
from utils.config.experts import EXPERTS, alternates, side_config
from utils.config.file_checks import (
    can_be_seen,
    check_adapter_paths,
    check_dataset_paths,
    check_model_paths,
    check_output_path,
)
from utils.config.load import ConfigError
from utils.config.schema import LoadedConfig, Problem, TrainConfig
from utils.lora_targets import linear_modules, resolve_targets
from utils.scaled_source import has_mark
from utils.tensor_source import Shape, TensorSource

UMT5_XXL = Umt5Sizes(
    vocab_size=256384, d_model=4096, num_heads=64, d_kv=64, d_ff=10240, num_layers=24, num_buckets=32
)
_PTH = ".pth"


@dataclass(frozen=True)
class PlannedModel:
    """What is trained, by headers.

    Attributes:
        arch: of the DiT.
        source: the DiT's headers; of two experts that take turns, the high-noise one's.
        second: the other one's; else None.
        targets: adapted modules.
        text_shapes: of UMT5 in encoder_ft; None in dit_lora, or where the encoder is missing and cannot be guessed.
        layout: how the DiT's files are laid out, for people.
        missing: what training will need and is not there.
        notes: what was assumed, or not looked at.
    """

    arch: WanArch
    source: TensorSource
    targets: tuple[str, ...]
    text_shapes: dict[str, Shape] | None
    layout: str
    missing: tuple[Problem, ...]
    notes: tuple[str, ...]
    second: TensorSource | None = None

    @property
    def sources(self) -> tuple[TensorSource, ...]:
        """All DiTs that take part."""
        return (self.source,) if self.second is None else (self.source, self.second)


def plan_model(loaded: LoadedConfig) -> PlannedModel:
    """Open the DiT's headers, resolve the targets, and list what is missing.

    Raises:
        ConfigError: the DiT is missing or damaged, or the configuration (or a part that is there) does not fit it.
        UserError: as `open_transformer`, `load_arch`.
    """
    config = loaded.train
    paths, problems = locate(config.model)
    faulty = [problem for problem in without_mistaken(problems, paths) if _is_about_dit(problem, paths)]
    if faulty:
        raise ConfigError(loaded.path, [replace(problem, file=loaded.path) for problem in faulty])
    source = open_transformer(paths.transformer_dir)
    arch = load_arch(paths.config_json, source.shapes)
    read_variant(config.model)
    # An adapter to start from is read by the run; a plan needs none.
    adapter = None if config.adapter is None else replace(config.adapter, init_from_existing=None)
    second = _open_second(config) if alternates(config) else None
    wrong = [] if second is not None else check_dit(replace(config, adapter=adapter), source, arch)
    if second is not None:
        for expert, one in zip(EXPERTS, (source, second), strict=True):
            wrong += check_dit(side_config(config, expert), one, arch)
        wrong += check_pair(config)
    notes: list[str] = []
    wrong += _check_other_parts(config, paths, notes)
    if wrong:
        raise ConfigError(loaded.path, [replace(problem, file=loaded.path) for problem in wrong])
    targets: list[str] = []
    if adapter is not None:
        targets = resolve_targets(linear_modules(source.shapes), adapter, config.budget)
    return PlannedModel(
        arch=arch,
        source=source,
        targets=tuple(targets),
        text_shapes=_text_shapes(config, paths, arch, notes),
        layout=_layout(paths) + (", both experts" if second is not None else ""),
        missing=_missing(config, problems),
        notes=tuple(notes),
        second=second,
    )


def _open_second(config: TrainConfig) -> TensorSource:
    """The low-noise expert's headers, checked against its `config.json`."""
    paths, _ = locate(side_config(config, EXPERTS[1]).model)
    source = open_transformer(paths.transformer_dir)
    load_arch(paths.config_json, source.shapes)
    return source


def _is_about_dit(problem: Problem, paths: CheckpointPaths) -> bool:
    if problem.key == "model.expert":
        return True
    if problem.fix.endswith("with transformer_path"):  # one of several has to be chosen
        return True
    place = paths.transformer_dir
    if not place.exists():
        # "<path> is missing" of another part is told once the DiT is there.
        others = (paths.text_encoder, paths.vae, paths.tokenizer_dir)
        is_other = any(problem.reason.startswith(f"{part} ") for part in others)
        return problem.key in ("model.ckpt_path", "model.transformer_path") and not is_other
    return problem.reason.startswith(f"{place} holds no DiT")


def _check_other_parts(config: TrainConfig, paths: CheckpointPaths, notes: list[str]) -> list[Problem]:
    """The parts that are there, against the DiT. A `.pth` has no header: in dit_lora it is not worth loading torch for."""
    present = [path for path in (paths.text_encoder, paths.vae) if path.exists()]
    unread = [path for path in present if path.suffix == _PTH]
    if unread and not config.model.train_text_encoder:
        names = ", ".join(path.name for path in unread)
        notes.append(f"not opened, because a {_PTH} file has no header: {names} (--dry_run checks them)")
        return []
    absent = {(problem.key, problem.reason) for problem in locate(config.model)[1]}
    return [
        problem for problem in check_checkpoint(config.model) if (problem.key, problem.reason) not in absent
    ]


def _text_shapes(
    config: TrainConfig, paths: CheckpointPaths, arch: WanArch, notes: list[str]
) -> dict[str, Shape] | None:
    if not config.model.train_text_encoder:
        return None
    if paths.text_encoder.exists():
        shapes = open_text_encoder(paths.text_encoder).shapes
    elif arch.text_dim == UMT5_XXL.d_model:
        notes.append("the text encoder is missing; planned with the published sizes of UMT5-XXL")
        shapes = expected_umt5_shapes(UMT5_XXL)
    else:
        notes.append("the text encoder is missing and its sizes are not known; planned without it")
        return None
    limit, wanted = text_encoder_sizes(shapes).num_layers, config.model.text_train_blocks
    if wanted > limit:
        reason = f"is {wanted}, but the encoder has {limit} blocks"
        raise ConfigError(
            "config", [Problem("model.text_train_blocks", reason, f"write at most {limit}, or 0 for all")]
        )
    return shapes


def _layout(paths: CheckpointPaths) -> str:
    """How the DiT is stored, such as `official directory, 3 files` or `fp8_scaled, single file, prefix model.diffusion_model.`."""
    stored, naming = open_as_stored(paths.transformer_dir, "transformer")
    words = ["fp8_scaled"] if has_mark(stored.shapes) else []
    if paths.transformer_dir.is_file():
        words += ["single file"] if naming.style == "official" else ["single file", f"{naming.style} names"]
    else:
        count = len(stored.files)
        words += [f"{naming.style} directory", f"{count} file{'s' if count != 1 else ''}"]
    return ", ".join(words + ([f"prefix {naming.prefix}"] if naming.prefix else []))


def _missing(config: TrainConfig, located: list[Problem]) -> tuple[Problem, ...]:
    problems = [*located, *check_model_paths(config.model), *check_output_path(config.output_dir)]
    if config.adapter is not None:
        problems += check_adapter_paths(config.adapter)
    by_key: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        # Keys of their own (llm_path) are told by both checks; the parts of ckpt_path are told apart.
        subject = problem.reason if problem.key == "model.ckpt_path" else ""
        by_key.setdefault((problem.key, subject), problem)
    return tuple(by_key.values())


def data_missing(loaded: LoadedConfig) -> list[Problem]:
    """Dataset TOMLs and folders that are not there."""
    problems = []
    named = [("dataset", loaded.dataset_path)]
    named += [
        (f"eval_datasets[{index}].config", one.config) for index, one in enumerate(loaded.train.eval_datasets)
    ]
    for key, path in named:
        if not can_be_seen(path):
            fix = "write it, or mend the path; it is relative to the working directory"
            problems.append(Problem(key, f'"{Path(path)}" does not exist', fix))
    for dataset in filter(None, (loaded.dataset, *loaded.eval_datasets)):
        problems += check_dataset_paths(dataset)
    return problems
