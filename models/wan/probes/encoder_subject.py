"""What a probe of an encoder looks at: the tuned encoder, the one it is held against, tokenizer, DiT, and the run.

Each comes from a flag, else from the config, else from the run that the encoder lies in, else from the newest run;
whatever no flag said becomes a remark, so that the report names it.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from models.wan.checkpoint import CheckpointPaths, has_tokenizer, locate
from models.wan.downloads import TEXT_ENCODER_FILE, TEXT_ENCODER_WEIGHTS
from models.wan.layouts import text_encoder_in, tokenizers_in
from models.wan.probes.subject import OUTPUT_ROOT, Cap, choose_optional_cap, choose_transformer, overrides_for
from utils.config.experts import only_expert
from utils.config.load import load_config
from utils.config.schema import TrainConfig
from utils.errors import UserError
from utils.saved_runs import (
    SavedKind,
    SavedRun,
    find_saved_file,
    last_saved,
    newest_saved_run,
    run_of_saved_file,
)

SAVED_ENCODER = SavedKind(
    TEXT_ENCODER_WEIGHTS,
    "a text encoder",
    "--text_encoder and --base_text_encoder",
    (TEXT_ENCODER_FILE,),
)
# Mean cosine of 0.98 on prompts that should not move. There is no published limit: this one is far above what rounding
# to bfloat16 does (about 0.00001) and below what another training objective would.
DEFAULT_MAX_NEUTRAL_DRIFT = 0.02


@dataclass(frozen=True)
class EncoderSubject:
    """What is measured against what; `remarks` say how it was chosen where no flag said it.

    `transformer` is None where there is none to look at, `run` where the encoder lies in no training run. `overrides`
    make the config name --base, where the checkpoint that it names has moved.
    """

    tuned: Path
    base: Path
    tokenizer: Path
    transformer: Path | None
    run: SavedRun | None
    config_path: Path | None
    config: TrainConfig | None
    remarks: tuple[str, ...]
    overrides: tuple[str, ...] = ()


def choose_encoders(args: argparse.Namespace) -> EncoderSubject:
    """Fill in what no flag says: from --config, else from the run that the tuned encoder lies in.

    Args:
        args: with `text_encoder`, `base_text_encoder`, `base`, `expert`, `tokenizer` and `config`.

    Raises:
        UserError: an encoder, the tokenizer or a DiT that was asked for is missing.
    """
    remarks: list[str] = []
    tuned = _choose_tuned(args, remarks)
    run = run_of_saved_file(tuned, SAVED_ENCODER)
    config_path = args.config or (run.config if run else None)
    overrides = overrides_for(config_path, args.base) if config_path else ()
    config = load_config(config_path, overrides).train if config_path else None
    parts = locate(config.model)[0] if config is not None else None
    transformer = _choose_dit(args, config, parts, config_path, remarks)
    base = _choose_base(args, tuned, parts, config_path, remarks)
    if base.resolve() == tuned.resolve():
        raise UserError(f"{tuned}: is held against itself; give the encoder that training started from")
    tokenizer = _choose_tokenizer(args, base, parts, config_path, remarks)
    return EncoderSubject(
        tuned, base, tokenizer, transformer, run, config_path, config, tuple(remarks), overrides
    )


def find_encoder(place: Path) -> Path:
    """The encoder that a path means: a file, a directory of shards, or that of a checkpoint, of a save or of a training run.

    Raises:
        UserError: as `find_saved_file`.
    """
    if any(place.glob("*.safetensors.index.json")) and not (place / TEXT_ENCODER_FILE).is_file():
        return place
    return text_encoder_in(place) or find_saved_file(place, SAVED_ENCODER)


def choose_drift_cap(flag: float | None, config: TrainConfig | None, where: Path | None) -> Cap:
    """The cap on neutral drift: the flag, else the run's [budget], else the default."""
    return choose_optional_cap("max_neutral_drift", flag, config, where) or Cap(
        DEFAULT_MAX_NEUTRAL_DRIFT, "default"
    )


def _choose_tuned(args: argparse.Namespace, remarks: list[str]) -> Path:
    if args.text_encoder is not None:
        tuned = find_encoder(args.text_encoder)
        if tuned != args.text_encoder:
            remarks.append(f"text encoder: {tuned} (found in {args.text_encoder})")
        return tuned
    if args.config is not None:
        own = last_saved(args.config.parent, SAVED_ENCODER)
        if own is not None:
            remarks.append(f"text encoder: {own} (the last save of {args.config.parent})")
            return own
    root = Path(load_config(args.config).train.output_dir) if args.config is not None else OUTPUT_ROOT
    tuned = newest_saved_run(root, SAVED_ENCODER).file
    remarks.append(f"text encoder: {tuned} (of the newest run below {root})")
    return tuned


def _choose_base(
    args: argparse.Namespace,
    tuned: Path,
    parts: CheckpointPaths | None,
    config_path: Path | None,
    remarks: list[str],
) -> Path:
    given: Path | None = args.base_text_encoder
    if given is not None:
        return find_encoder(given)
    if parts is not None:
        if not parts.text_encoder.exists():
            raise UserError(
                f"{parts.text_encoder}: is not there any more, and {config_path} names it as the base text encoder; name it "
                "with --base_text_encoder, or the checkpoint's directory with --base"
            )
        remarks.append(f"base text encoder: {parts.text_encoder} (from {config_path})")
        return parts.text_encoder
    found = None if args.base is None else text_encoder_in(args.base)
    if found is not None:
        remarks.append(f"base text encoder: {found} (of --base)")
        return found
    raise UserError(
        f"{tuned}: lies in no run that names its base; name it with --base_text_encoder, or --config"
    )


def _choose_tokenizer(
    args: argparse.Namespace,
    base: Path,
    parts: CheckpointPaths | None,
    config_path: Path | None,
    remarks: list[str],
) -> Path:
    given: Path | None = args.tokenizer
    if given is not None:
        if not has_tokenizer(given):
            raise UserError(
                f"{given}: holds no tokenizer; --tokenizer names the directory of google/umt5-xxl's files"
            )
        return given
    places = [(parts.tokenizer_dir, f"from {config_path}")] if parts is not None else []
    places += [(place, "beside the base text encoder") for place in tokenizers_in(base.parent)]
    if args.base is not None:
        places += [(place, "of --base") for place in tokenizers_in(args.base)]
    places.append((base, "inside the base text encoder"))
    for place, why in places:
        if has_tokenizer(place):
            remarks.append(f"tokenizer: {place} ({why})")
            return place
    raise UserError(f"{places[0][0]}: holds no tokenizer; name its directory with --tokenizer")


def _choose_dit(
    args: argparse.Namespace,
    config: TrainConfig | None,
    parts: CheckpointPaths | None,
    config_path: Path | None,
    remarks: list[str],
) -> Path | None:
    if args.base is not None:
        expert = args.expert or (only_expert(config) if config else None)
        return choose_transformer(args.base, expert, is_asked_for=args.expert is not None)
    if parts is None:
        remarks.append("without a DiT (--base) nothing is said about its text embedding")
        return None
    if not parts.transformer_dir.exists():
        remarks.append(
            f"the DiT that {config_path} names is not there ({parts.transformer_dir}), so nothing is said about its text "
            "embedding"
        )
        return None
    remarks.append(f"DiT: {parts.transformer_dir} (from {config_path})")
    return parts.transformer_dir
