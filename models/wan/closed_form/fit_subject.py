"""What a closed-form adapter is made for: the encoders, the DiT or both experts, and the adapter's targets, by a config."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from models.wan.arch import WanArch, load_arch
from models.wan.checkpoint import CheckpointPaths, find_checkpoint, open_transformer
from models.wan.layouts import tokenizers_in
from models.wan.tokenizer_place import has_tokenizer
from utils.config.experts import side_config, sides_of
from utils.config.guardrails import mode_of
from utils.config.load import load_config
from utils.config.schema import AdapterConfig, Expert, LoadedConfig, TrainConfig
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
        assert self.config.adapter is not None, "open_subject has checked it"
        return self.config.adapter


@dataclass(frozen=True)
class FitSubject:
    """Base and tuned encoder, the tokenizer, and the DiTs that share them."""

    loaded: LoadedConfig
    base: Path
    tuned: Path
    tokenizer: Path
    tuned_tokenizer: Path | None
    sides: tuple[FitSide, ...]


def open_subject(
    config: Path, overrides: Sequence[str], rank: int | None, blocks: tuple[int, int] | None
) -> FitSubject:
    """Read a `dit_lora` config; everything is opened by headers.

    Args:
        config: the TOML; its `model.llm_path` is the tuned encoder, that of `model.ckpt_path` the base.
        overrides: of `--set`.
        rank: of every adapter, in place of the config's.
        blocks: first and last block, in place of the config's targets' range.

    Raises:
        UserError: the config is not of that mode or names no tuned encoder, a part is missing, or a target is none that the
            text goes into, or breaks a guardrail.
    """
    loaded = load_config(config, overrides)
    train = loaded.train
    if mode_of(train) != "dit_lora" or train.adapter is None:
        raise UserError(f"{config}: trains the encoder; give the config of a DiT LoRA translator (dit_lora)")
    if train.model.llm_path is None:
        raise UserError(
            f"{config}: model.llm_path is not set, so there is no tuned encoder to translate; name it with --set "
            "model.llm_path=FILE"
        )
    sides = tuple(_open_side(train, expert, rank, blocks) for expert in sides_of(train) or (None,))
    paths = sides[0].paths
    own = find_checkpoint(replace(sides[0].config.model, llm_path=None))
    if own.text_encoder.resolve() == paths.text_encoder.resolve():
        raise UserError(
            f"{paths.text_encoder}: model.llm_path names the base encoder itself, so there is nothing to do; name the tuned one"
        )
    return FitSubject(
        loaded,
        own.text_encoder,
        paths.text_encoder,
        own.tokenizer_dir,
        _tokenizer_of(paths.text_encoder),
        sides,
    )


def _open_side(
    train: TrainConfig, expert: Expert | None, rank: int | None, blocks: tuple[int, int] | None
) -> FitSide:
    config = train if expert is None else side_config(train, expert)
    adapter = config.adapter
    assert adapter is not None, "the caller has checked it"
    if adapter.init_from_existing is not None:
        raise UserError(
            "adapter.init_from_existing would be ignored: the adapter is solved for and not trained; take it out"
        )
    if rank is not None:
        adapter = replace(adapter, rank=rank, alpha=None)
    if blocks is not None:
        if adapter.include_file is not None:
            raise UserError(
                "--blocks: adapter.include_file lists the exact modules; leave one of the two out"
            )
        adapter = replace(adapter, train_blocks_range=blocks)
    config = replace(config, adapter=adapter)
    paths = find_checkpoint(config.model)
    source = open_transformer(paths.transformer_dir)
    arch = load_arch(paths.config_json, source.shapes)
    targets = resolve_targets(linear_modules(source.shapes), adapter, config.budget)
    other = [target for target in targets if split_block_path(target)[1] not in SOLVABLE]
    if other:
        raise UserError(
            f"adapter.include: {other[0]} is not solved for: only {' and '.join(SOLVABLE)} read the text; take the others "
            "out, or train them"
        )
    if adapter.rank > arch.dim:
        raise UserError(
            f"--rank {adapter.rank}: the DiT is {arch.dim} wide, so no more than that has a meaning"
        )
    return FitSide(expert, config, paths, source, arch, tuple(targets))


def _tokenizer_of(encoder: Path) -> Path | None:
    """The tokenizer that a tuned encoder brings along, inside its file or in its own checkpoint; None where it has none."""
    for place in (encoder, *tokenizers_in(encoder.parent)):
        if has_tokenizer(place):
            return place
    return None
