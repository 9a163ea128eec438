"""The keys of what looks at saves while training goes on: `[probes]` and `[samples]`. See `utils.config.schema`."""

# ruff: noqa: RUF009 (`option` is a `dataclasses.field`)

from dataclasses import dataclass
from typing import Literal

from utils.config.option import option

Expert = Literal["high_noise", "low_noise"]
SolverName = Literal["unipc", "euler", "dpm++"]


@dataclass(frozen=True, kw_only=True)
class ProbesConfig:
    """`[probes]`: probes that run on the saved files, in processes of their own, while training goes on."""

    run: tuple[str, ...] = option(
        "Their names. dit_lora: lora_delta_budget, attn_logit_probe, dit_lora_translator; encoder_ft: te_eval."
    )
    every_n_epochs: int = option(
        "They run after those saves of an epoch whose number N divides, and after the last save of the run.",
        1,
        ge=1,
    )
    timeout_minutes: float = option("A probe that takes longer is cut off.", 30.0, gt=0.0, le=100_000.0)
    on_fail: Literal["warn", "stop"] = option(
        "What a verdict of fail does. stop: the run ends after a checkpoint, with exit status 1. Whatever else may "
        "become of a probe only warns.",
        "warn",
    )
    reports_dir: str = option("Where the reports go: <reports_dir>/<probe>/<run>_epochN/.", "reports")


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """`[samples]`: a small grid of samples (prompt_grid) that is drawn from the saved files while training goes on."""

    every_n_epochs: int = option(
        "A grid is drawn of those saves of an epoch whose number N divides, and of the last save of the run. N is a "
        "multiple of save_every_n_epochs.",
        1,
        ge=1,
    )
    prompts: str | None = option(
        "File of neutral prompts, one per line, which should stay as they are. Not set: [budget] neutral_prompts, else "
        "configs/prompts/neutral.txt. The empty prompt is always among them.",
        None,
    )
    domain_prompts: str | None = option(
        "File of prompts that should change. Private: reports and TensorBoard show them as index and hash.",
        None,
    )
    max_prompts: int = option("Prompts of each file, from the top.", 4, ge=1)
    seeds: int = option("How many seeds each prompt is drawn with.", 2, ge=1)
    seed: int = option("The first of them.", 0, ge=0)
    size: str | None = option('Width x height in px, e.g. "832x480". Not set: the official size.', None)
    frames: int | None = option(
        "4n+1; 1 is a picture. Not set: 1, with a first frame the official number.", None, ge=1
    )
    solver: SolverName = option("diffusers' scheduler that walks the noise levels.", "unipc")
    steps: int | None = option("Not set: 50 for ti2v-5b, 40 for A14B.", None, ge=1, le=1000)
    shift: float | None = option(
        "Of the sampler's noise levels. Not set: 5, for t2v-a14b 12.", None, gt=0.0, le=1000.0
    )
    guidance: float | None = option(
        "Of classifier-free guidance; 1 is off. Without guidance_low it is that of both experts. Not set: the official "
        "one: 5; of the high-noise expert 4 (t2v-a14b), 3.5 (i2v-a14b).",
        None,
        ge=1.0,
        le=1000.0,
    )
    guidance_low: float | None = option(
        "A14B: of the low-noise expert. Not set, and guidance not either: 3 (t2v-a14b), 3.5 (i2v-a14b).",
        None,
        ge=1.0,
        le=1000.0,
    )
    negative_prompt: str | None = option(
        "What is guided away from; may be empty. Not set: Wan's own.", None, may_be_blank=True
    )
    image: str | None = option("The first frame: i2v-a14b needs one, ti2v-5b takes one.", None)
    expert: Expert | None = option(
        "A14B: make all steps with this expert alone, as where a checkpoint holds no other. Not set: both.",
        None,
    )
    reuse_text_keys: bool = option(
        "Compute the text's keys and values of each block once for all steps of a picture, and keep them. The picture is the "
        "same; false saves their memory.",
        True,
    )
    # There is no published limit: it is a convention that keeps pictures recognisable as the same one, and wants to be set by
    # looking at the sheet.
    max_neutral_change: float = option(
        "Cap on the mean of 1 - SSIM over neutral prompts. A grid above it is a warning and stops nothing.",
        0.1,
        gt=0.0,
    )
    device: str = option(
        "Where it is drawn: cpu, or cuda or cuda:N, which needs room beside the training.", "cpu"
    )
    timeout_minutes: float = option("A grid that takes longer is cut off.", 30.0, gt=0.0, le=100_000.0)
    reports_dir: str | None = option(
        "Where the reports go: <reports_dir>/prompt_grid/<run>_epochN/. Not set: [probes] reports_dir, else reports.",
        None,
    )
