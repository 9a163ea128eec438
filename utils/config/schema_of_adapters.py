"""The keys of `[adapter]` and the tables inside it. See `utils.config.schema`."""

# ruff: noqa: RUF009 (`option` is a `dataclasses.field`)

from dataclasses import dataclass
from typing import Literal

from utils.config.option import option

DType = Literal["float32", "bfloat16"]
AdapterInit = Literal["zero", "closed_form"]


@dataclass(frozen=True, kw_only=True)
class SelfAttnApproval:
    """`[adapter.self_attn_approval]`: the written approval without which no adapter touches `self_attn.*`."""

    reason: str = option("Why self-attention has to be adapted, in a sentence.")
    blocks: tuple[int, ...] = option(
        "The blocks it is approved for; at most 4. self_attn adapters go nowhere else.", ge=0
    )


@dataclass(frozen=True, kw_only=True)
class ExpertAdapterConfig:
    """`[adapter.<expert>]`: what is different in the adapter of one expert. Keys left out are those of `[adapter]`."""

    rank: int | None = option("Overrides [adapter].", None, ge=1, le=1024)
    alpha: float | None = option("Overrides [adapter].", None, gt=0.0)
    dropout: float | None = option("Overrides [adapter].", None, ge=0.0, lt=1.0)
    include: tuple[str, ...] | None = option("Overrides [adapter], its include_file too.", None)
    exclude: tuple[str, ...] | None = option("Overrides [adapter], its include_file too.", None)
    include_file: str | None = option(
        "Overrides [adapter], its include, exclude and train_blocks_range too.", None
    )
    train_blocks_range: tuple[int, ...] | None = option(
        "Overrides [adapter], its include_file too.", None, ge=0
    )
    init_from_existing: str | None = option("Overrides [adapter].", None)
    self_attn_approval: SelfAttnApproval | None = option("Overrides [adapter].", None)


@dataclass(frozen=True, kw_only=True)
class ClosedFormConfig:
    """`[adapter.closed_form]`: how an adapter is solved for (docs/recipes/closed_form_translator.md)."""

    prompts: str | None = option(
        "File of neutral prompts, one per line: what is to be restored. Not set: 4,000 captions of the project's own "
        "grammar, judged by configs/prompts/neutral.txt.",
        None,
    )
    domain_prompts: str | None = option(
        "File of prompts with the new words: what is to stay as the tuned encoder made it. Private. Not set: nothing is "
        "asked to stay.",
        None,
    )
    keywords_file: str | None = option(
        "Instead: a private file of keywords, one per line; those of prompts that hold one are to stay.", None
    )
    ridge: float | Literal["auto"] = option(
        "Penalty on the change, in units of the tokens' mean second moment. auto: chosen by the error on held-out prompts.",
        "auto",
        ge=0.0,
    )
    keep_weight: float = option(
        "What all tokens of domain prompts weigh together; all neutral ones weigh 1.", 1.0, gt=0.0
    )
    max_delta_ratio: float | None = option(
        "Cap on ||dW||_F / ||W||_F of every solved module, met by a larger ridge. Not set: that of [budget], else none.",
        None,
        gt=0.0,
    )
    seed: int = option("Says which prompts are held out.", 0, ge=0)
    dtype: DType = option("What both encoders compute in.", "float32")
    device: str | None = option(
        "Where it is solved: cpu, cuda or cuda:N. Not set: where the first process trains.", None
    )
    reports_dir: str | None = option(
        "Where the report goes: <reports_dir>/closed_form_translator/<run>/. Not set: [probes] reports_dir, else reports.",
        None,
    )


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """`[adapter]`: the LoRA translator (dit_lora only)."""

    type: Literal["lora"] = option("Kind of adapter.", "lora")
    rank: int = option("Rank of each adapter.", 16, ge=1, le=1024)
    alpha: float | None = option("Scale is alpha / rank. Default: rank, i.e. scale 1.", None, gt=0.0)
    dropout: float = option("Dropout on the adapter's input. 0 is off.", 0.0, ge=0.0, lt=1.0)
    include: tuple[str, ...] = option(
        "Globs over module paths within a block; {a,b} expands. Each must match something.",
        ("cross_attn.{k,v}",),
    )
    exclude: tuple[str, ...] = option("Globs to leave out; wins over include.", ())
    include_file: str | None = option(
        "File with one module path of the whole model per line, instead of the other filters.", None
    )
    train_blocks_range: tuple[int, ...] | None = option(
        "First and last block to adapt, inclusive.", None, ge=0
    )
    init: AdapterInit = option(
        "How it begins where init_from_existing names nothing. zero: it changes nothing yet (B is 0, A random). closed_form: "
        "solved for from prompts, before training.",
        "zero",
    )
    init_from_existing: str | None = option("Adapter file or directory to start from.", None)
    self_attn_approval: SelfAttnApproval | None = option("Written approval for self_attn targets.", None)
    closed_form: ClosedFormConfig | None = option('How it is solved for; with init = "closed_form".', None)
    high_noise: ExpertAdapterConfig | None = option("What is different for the high-noise expert.", None)
    low_noise: ExpertAdapterConfig | None = option("What is different for the low-noise expert.", None)
