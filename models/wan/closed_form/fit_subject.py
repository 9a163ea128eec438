"""What a closed-form adapter is made for: the encoders, the DiT or both experts, and the adapter's targets, by a config."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.wan.arch import WanArch, load_arch
from models.wan.checkpoint import CheckpointPaths, find_checkpoint, open_transformer
from models.wan.layouts import tokenizers_in
from models.wan.tokenizer_place import has_tokenizer
from utils.config.experts import EXPERTS, side_config, sides_of
from utils.config.guardrails import mode_of
from utils.config.load import load_config
from utils.config.schema import AdapterConfig, Expert, ModelConfig, Problem, TrainConfig
from utils.errors import UserError
from utils.lora_targets import linear_modules, resolve_targets, split_block_path
from utils.tensor_source import TensorSource

# The linear layers whose input is the text.
SOLVABLE = ("cross_attn.k", "cross_attn.v")


@dataclass(frozen=True)
class FitSide:
    """One DiT: of A14B one expert.

    Attributes:
        expert: None where there are none.
        config: of this side alone, its `[adapter]` as it is solved for.
        paths: of its checkpoint.
        source: its tensors under official names.
        arch: its sizes.
        targets: the modules that get an adapter.
    """

    expert: Expert | None
    config: TrainConfig
    paths: CheckpointPaths
    source: TensorSource
    arch: WanArch
    targets: tuple[str, ...]

    @property
    def adapter(self) -> AdapterConfig:
        """Its `[adapter]`."""
        return _adapter_of(self.config)


@dataclass(frozen=True)
class FitSubject:
    """Base and tuned encoder, the tokenizer, and the DiTs that share them."""

    base: Path
    tuned: Path
    tokenizer: Path
    tuned_tokenizer: Path | None
    sides: tuple[FitSide, ...]


def command_config(
    config: Path, overrides: Sequence[str], rank: int | None, blocks: tuple[int, int] | None
) -> TrainConfig:
    """Read a `dit_lora` config for the command, with its flags in place of what it says.

    Args:
        config: the TOML.
        overrides: of `--set`.
        rank: of every adapter, in place of the config's.
        blocks: first and last block, in place of the config's targets' range.

    Raises:
        UserError: the config is not of that mode or names no tuned encoder, or starts from an adapter.
    """
    train = load_config(config, overrides).train
    if mode_of(train) != "dit_lora" or train.adapter is None:
        raise UserError(f"{config}: trains the encoder; give the config of a DiT LoRA translator (dit_lora)")
    if train.model.llm_path is None:
        raise UserError(
            f"{config}: model.llm_path is not set, so there is no tuned encoder to translate; name it with --set "
            "model.llm_path=FILE"
        )
    experts: tuple[Expert | None, ...] = sides_of(train) or (None,)
    for adapter in (_adapter_of(_of_side(train, expert)) for expert in experts):
        if adapter.init_from_existing is not None:
            raise UserError(
                "adapter.init_from_existing would be ignored: the adapter is solved for and not trained; take it out"
            )
        if blocks is not None and adapter.include_file is not None:
            raise UserError(
                "--blocks: adapter.include_file lists the exact modules; leave one of the two out"
            )
    given: dict[str, Any] = {} if rank is None else {"rank": rank, "alpha": None}
    if blocks is not None:
        given["train_blocks_range"] = blocks
    return _with_adapter(train, given)


def open_subject(train: TrainConfig) -> FitSubject:
    """The parts of a checked `dit_lora` configuration; everything is opened by headers.

    Args:
        train: its `model.llm_path` is the tuned encoder, that of `model.ckpt_path` the base.

    Raises:
        UserError: a part is missing, the tuned encoder is the base, or a target is none that the text goes into, or breaks a
            guardrail.
    """
    experts: tuple[Expert | None, ...] = sides_of(train) or (None,)
    sides = tuple(_open_side(_of_side(train, expert), expert) for expert in experts)
    paths = sides[0].paths
    base = find_base(sides[0].config.model, paths.text_encoder)
    return FitSubject(
        base.text_encoder,
        paths.text_encoder,
        base.tokenizer_dir,
        _tokenizer_of(paths.text_encoder),
        sides,
    )


def find_base(model: ModelConfig, tuned: Path) -> CheckpointPaths:
    """The parts that the checkpoint itself has, the base encoder among them.

    Raises:
        UserError: there is none, or it is the tuned one.
    """
    try:
        own = find_checkpoint(replace(model, llm_path=None))
    except UserError as error:
        raise UserError(
            f"model.llm_path is held against the base encoder, that of ckpt_path: {error}"
        ) from error
    if own.text_encoder.resolve() == tuned.resolve():
        raise UserError(
            f"{tuned}: model.llm_path names the base encoder itself, so there is nothing to do; name the tuned one"
        )
    return own


def check_solvable(targets: Sequence[str], rank: int, dim: int) -> list[Problem]:
    """What of an adapter's targets and rank cannot be solved for, in a DiT that is `dim` wide."""
    problems = []
    other = [target for target in targets if split_block_path(target)[1] not in SOLVABLE]
    if other:
        reason = f"{other[0]} is not solved for: only {' and '.join(SOLVABLE)} read the text"
        problems.append(Problem("adapter.include", reason, "take the others out, or train them"))
    if rank > dim:
        reason = f"is {rank}, and the DiT is {dim} wide, so no more than that has a meaning"
        problems.append(Problem("adapter.rank", reason, "lower it"))
    return problems


def _of_side(train: TrainConfig, expert: Expert | None) -> TrainConfig:
    return train if expert is None else side_config(train, expert)


def _adapter_of(config: TrainConfig) -> AdapterConfig:
    assert config.adapter is not None, "the caller has checked it"
    return config.adapter


def _with_adapter(train: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """With these values in `[adapter]`, and in what it says of each expert."""
    adapter = replace(_adapter_of(train), **given)
    for expert in EXPERTS:
        own = getattr(adapter, expert)
        if own is not None:
            adapter = replace(adapter, **{expert: replace(own, **given)})
    return replace(train, adapter=adapter)


def _open_side(config: TrainConfig, expert: Expert | None) -> FitSide:
    adapter = _adapter_of(config)
    paths = find_checkpoint(config.model)
    source = open_transformer(paths.transformer_dir)
    arch = load_arch(paths.config_json, source.shapes)
    targets = resolve_targets(linear_modules(source.shapes), adapter, config.budget)
    for problem in check_solvable(targets, adapter.rank, arch.dim):
        raise UserError(str(problem))
    return FitSide(expert, config, paths, source, arch, tuple(targets))


def _tokenizer_of(encoder: Path) -> Path | None:
    """The tokenizer that a tuned encoder brings along, inside its file or in its own checkpoint; None where it has none."""
    for place in (encoder, *tokenizers_in(encoder.parent)):
        if has_tokenizer(place):
            return place
    return None
