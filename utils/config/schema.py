"""The configuration as typed, frozen dataclasses: the one list of keys, defaults, legal values and help texts.

`option` attaches to each field what the loader checks and what the reference documentation prints. Key names are
those that users of DeepSpeed diffusion trainers already write. Adapters have their classes in `schema_of_adapters`, what looks at saves
in `schema_of_saves`.
"""

# ruff: noqa: RUF009 (`option` is a `dataclasses.field`)

from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from utils.config.option import option
from utils.config.schema_of_adapters import (
    AdapterConfig,
    ClosedFormConfig,
    DType,
    ExpertAdapterConfig,
    SelfAttnApproval,
)
from utils.config.schema_of_saves import Expert, ProbesConfig, SamplesConfig, SolverName

__all__ = [
    "ActivationCheckpointing",
    "AdapterConfig",
    "BudgetConfig",
    "CaptionAugConfig",
    "CaptionMix",
    "ClosedFormConfig",
    "DType",
    "DatasetConfig",
    "DirectoryConfig",
    "EvalDatasetConfig",
    "Expert",
    "ExpertAdapterConfig",
    "ExpertChoice",
    "LoadedConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProbesConfig",
    "Problem",
    "SamplesConfig",
    "SelfAttnApproval",
    "SolverName",
    "TextEncoderFormat",
    "TrainConfig",
    "Variant",
]

ExpertChoice = Literal["high_noise", "low_noise", "both"]
Variant = Literal["ti2v-5b", "t2v-a14b", "i2v-a14b"]
TextEncoderFormat = Literal["hf", "official", "official_pth", "comfyui"]
ActivationCheckpointing = Literal[True, False, "selective", "offload"]


@dataclass(frozen=True, kw_only=True)
class CaptionMix:
    """`[model.caption_aug.mix]`: the law of caption augmentation as three shares that add up to 1."""

    single: float = option("Share of visits that see the keyword alone.", ge=0.0, le=1.0)
    short: float = option("Share of visits that see a short window round the keyword.", ge=0.0, le=1.0)
    verbose: float = option("Share of visits that see the whole caption.", ge=0.0, le=1.0)


@dataclass(frozen=True, kw_only=True)
class CaptionAugConfig:
    """`[model.caption_aug]`: at each visit the whole caption, a window round a keyword, or the keyword (encoder_ft)."""

    enable: bool = option("Whether captions are augmented.")
    keywords: tuple[str, ...] = option(
        "Domain keywords, whole words. They are written into run directories; keywords_file keeps them out.",
        (),
    )
    keywords_file: str | None = option(
        "Instead: a private UTF-8 text file outside the repository, one keyword per line.", None
    )
    case_insensitive: bool = option("Find a keyword also where its case differs.", True)
    single_token: float | None = option("Probability of the keyword alone. Not set: 0.", None, ge=0.0, le=1.0)
    trim_prob: float | None = option(
        "Else, probability of a short window round the keyword. Not set: 0.", None, ge=0.0, le=1.0
    )
    trim_window_words: int = option("Words in that window, the keyword's own included.", 8, ge=1, le=512)
    mix: CaptionMix | None = option("The same three probabilities, instead of the two above.", None)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """`[model]`: which weights, in which precision, and what is trained."""

    type: Literal["wan"] = option("The model family. Only Wan 2.2 exists here.")
    variant: Variant | None = option("If given, the checkpoint's headers must agree.", None)
    ckpt_path: str = option(
        "Checkpoint directory: official, diffusers', or a folder of ComfyUI's files. See checkpoints.md."
    )
    transformer_path: str | None = option(
        "DiT weights, if not those of ckpt_path: a directory or a .safetensors file, in any layout.", None
    )
    llm_path: str | None = option(
        "UMT5 weights, if not those of ckpt_path: a .pth or .safetensors file, e.g. one this project tuned, or a directory of "
        "shards.",
        None,
        alias="text_encoder_path",
    )
    vae_path: str | None = option(
        "VAE weights, if not those of ckpt_path: a .pth or .safetensors file, or diffusers' vae/.", None
    )
    tokenizer_path: str | None = option(
        "Tokenizer directory, if not that of ckpt_path; or a .safetensors file that holds spiece_model.", None
    )
    expert: ExpertChoice | None = option(
        "A14B only, and required there: which of the two experts to train on. both: in dit_lora first high_noise, then "
        "low_noise, a run and an adapter each; in encoder_ft the frozen experts in turn, step by step (docs/experts.md).",
        None,
    )
    dtype: DType = option("Compute precision, and storage of frozen weights.", "bfloat16")
    residual_dtype: DType = option(
        "Precision of the DiT's residual stream. bfloat16 saves memory and costs exactness.", "float32"
    )
    transformer_dtype: Literal["float8"] | None = option(
        "float8: keep the frozen weights of linear layers in the DiT's blocks in 8 bits (e4m3, one scale per output "
        "channel). Not set: in dtype.",
        None,
    )
    transformer_compute: Literal["float8"] | None = option(
        "float8: multiply in 8 bits too, with one scale per token; needs transformer_dtype = float8, dtype = bfloat16, and on a GPU "
        "one that has it (Ada, Hopper or newer). Faster and less exact (docs/engine.md). Not set: in dtype.",
        None,
    )
    attention: Literal["auto", "torch", "flash_attn_2", "flash_attn_3"] = option(
        "Attention of the DiT. torch: torch's own kernels; flash_attn_2, flash_attn_3: those of the packages flash-attn and "
        "flash-attn 3, where installed; auto: the fastest of these that is there and can be used; with compile, torch.",
        "auto",
    )
    lean_kernels: bool = option(
        "Compute what lies between the matrix products of the DiT's blocks (norms, modulation, rotation, gates) in few "
        "passes over memory, and keep less of it for the backward pass; and adapters in dtype, without casts of their inputs. "
        "false: by the plain formulas, adapters in float32. The numbers differ by the order of float32 roundings, and with adapters in "
        "bfloat16 by roundings to it (docs/numerics.md).",
        True,
    )
    vae_dtype: DType = option(
        "Precision of the VAE while caching. The official code uses float32.", "float32"
    )
    cache_text_embeddings: bool = option(
        "Encode captions once, before training. Must be true in dit_lora, false in encoder_ft."
    )
    train_text_encoder: bool = option("Train UMT5 (encoder_ft) or not (dit_lora).")
    freeze_transformer: bool = option("Keep the DiT's own weights as they are. True in both modes.")
    text_train_blocks: int = option(
        "encoder_ft: train the top N blocks of UMT5; 0 means all of them.", 0, ge=0
    )
    train_token_embedding: bool = option("encoder_ft: train the token table too.", False)
    text_encoder_dropout: float = option(
        "encoder_ft: dropout inside the trained UMT5 blocks. 0 is off.", 0.0, ge=0.0, lt=1.0
    )
    save_text_encoder_full: bool = option(
        "encoder_ft: save the whole encoder; false saves only trained tensors.", True
    )
    save_text_encoder_format: TextEncoderFormat = option(
        "encoder_ft: names and file of the saved encoder. hf: text_encoder.safetensors with Hugging Face names; official: the "
        "same file with Wan's own names; official_pth: Wan's names in models_t5_umt5-xxl-enc-bf16.pth, to be put into the "
        "official checkpoint; comfyui: as hf, with the tokenizer (spiece_model) inside.",
        "hf",
    )
    text_attn_implementation: Literal["sdpa", "eager"] = option(
        "Attention of UMT5. eager is bit-equal to the official code.", "sdpa"
    )
    timestep_sample_method: Literal["logit_normal", "uniform"] = option(
        "Law of the noise level before the shift.", "logit_normal"
    )
    sigmoid_scale: float = option("logit_normal: standard deviation in logit space.", 1.0, gt=0.0, le=100.0)
    shift: float = option(
        "sigma' = shift * sigma / (1 + (shift - 1) * sigma). 1 is off.", 1.0, gt=0.0, le=1000.0
    )
    min_t: float = option(
        "Lowest noise level (after the shift) that is trained. An expert begins at its boundary without it.",
        0.0,
        ge=0.0,
        lt=1.0,
    )
    max_t: float = option(
        "Highest noise level (after the shift) that is trained. An expert ends at its boundary without it.",
        1.0,
        gt=0.0,
        le=1.0,
    )
    first_frame_prob: float = option(
        "ti2v-5b only: probability that a visit of a video is image-conditioned: the first latent frame stays clean, is "
        "told as timestep 0 and is left out of the loss.",
        0.0,
        ge=0.0,
        le=1.0,
    )
    caption_aug: CaptionAugConfig | None = option("Caption augmentation; encoder_ft only.", None)


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """`[budget]`: how far training may move an adapter's weights (dit_lora) or the encoder's states (encoder_ft)."""

    max_delta_ratio: float = option(
        "dit_lora: cap on ||dW||_F / ||W||_F of every adapted module.", 0.05, gt=0.0, le=1.0
    )
    max_mean_delta_ratio: float | None = option(
        "dit_lora: cap on the mean of these ratios over all adapted modules. Not set: none.",
        None,
        gt=0.0,
        le=1.0,
    )
    max_neutral_drift: float | None = option(
        "encoder_ft: cap on 1 - mean cosine between the states of neutral prompts now and before training. Required "
        "there.",
        None,
        gt=0.0,
        le=1.0,
    )
    neutral_prompts: str | None = option(
        "encoder_ft: file of neutral prompts, one per line. Not set: configs/prompts/neutral.txt. The empty prompt and "
        "Wan's negative prompt are always added.",
        None,
    )
    action: Literal["warn", "project", "stop"] = option(
        "What to do above a cap: say so, scale the adapter back onto it (dit_lora), or stop.", "warn"
    )
    every_n_steps: int = option("How often it is measured.", 50, ge=1)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """`[optimizer]`: how the trained weights follow their gradients."""

    type: Literal["adamw", "adamw8bit", "adamw_kahan"] = option(
        "adamw keeps trained weights in float32; adamw8bit (bitsandbytes) its moments in 8 bits; "
        "adamw_kahan (optimi) trained weights in bfloat16 with Kahan summation.",
        "adamw",
    )
    lr: float = option("Peak learning rate.", ge=0.0, le=1.0)
    betas: tuple[float, ...] = option("Adam's two decay rates.", (0.9, 0.99), ge=0.0, lt=1.0)
    weight_decay: float = option("Decoupled weight decay.", 0.01, ge=0.0)
    eps: float = option("Adam's epsilon.", 1e-8, gt=0.0)


@dataclass(frozen=True, kw_only=True)
class EvalDatasetConfig:
    """`[[eval_datasets]]`: a dataset whose loss is measured while training goes on; a plain path is short for it."""

    name: str | None = option(
        "Its name in files and messages (letters, digits, `_`, `-`, `.`). Not set: the name of its file.",
        None,
    )
    config: str = option("Its dataset TOML. num_repeats is not read: every sample counts once.")

    @property
    def label(self) -> str:
        """The name that it goes by."""
        return PurePath(self.config).stem if self.name is None else self.name

    @property
    def first_frame_label(self) -> str:
        """The name of the same dataset's videos where they are evaluated image-conditioned (`first_frame_prob`)."""
        return f"{self.label}.first_frame"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The top level of a training TOML."""

    output_dir: str = option("Each run makes a time-stamped directory in it.")
    dataset: str = option("Dataset TOML.")
    epochs: int = option("Passes over the dataset.", 1, ge=1, le=100_000)
    max_steps: int | None = option(
        "Optimizer steps; where given it decides instead of epochs, also upward.", None, ge=1
    )
    micro_batch_size_per_gpu: int = option("Samples in one micro-batch.", 1, ge=1)
    gradient_accumulation_steps: int = option(
        "Micro-batches per optimizer step and data-parallel rank.", 1, ge=1
    )
    pipeline_stages: int = option("Processes that one copy of the model is split over.", 1, ge=1)
    zero_stage: int = option(
        "1: data-parallel copies share the optimizer's state out among themselves. 0 is off.", 0, ge=0, le=1
    )
    partition_method: Literal["cost", "uniform", "manual"] = option(
        "How layers are split over stages.", "cost"
    )
    partition_split: tuple[int, ...] = option(
        "manual: index of the first layer of stages 2, 3, ...", (), ge=1
    )
    gradient_clipping: float = option("Largest norm of the gradient over all stages. 0 is off.", 1.0, ge=0.0)
    activation_checkpointing: ActivationCheckpointing = option(
        "Recompute activations of each block in the backward pass: all (true), none (false), all but the outputs of "
        "attention and matrix products (selective), or all, with the blocks' inputs in host memory (offload). The "
        "numbers are the same, so it may differ between a run and its continuation.",
        True,
    )
    blocks_to_swap: int = option(
        "Blocks of the DiT whose frozen weights live in host memory and are copied to the GPU ahead of use; at most all "
        "but one. The numbers are the same.",
        0,
        ge=0,
    )
    compile: bool = option(
        "Compile the DiT's blocks with torch.compile (not those of blocks_to_swap): cheap operations are fused. The first steps, and "
        "the first of a new kind of batch, take longer. Rounding differs a little from that of false.",
        False,
    )
    uncond_fraction: float = option("Share of visits that see the empty caption.", 0.0, ge=0.0, le=1.0)
    lr_scheduler: Literal["constant", "linear", "cosine"] = option(
        "Course of the learning rate after warm-up.", "constant"
    )
    warmup_steps: int = option("Steps over which the learning rate rises from 0.", 0, ge=0)
    save_every_n_epochs: int = option("Write the adapter or encoder every N epochs. 0 is off.", 1, ge=0)
    save_every_n_steps: int | None = option("Write the adapter or encoder every N steps.", None, ge=1)
    checkpoint_every_n_epochs: int = option(
        "Write a checkpoint to resume from every N epochs. 0 is off.", 1, ge=0
    )
    checkpoint_every_n_steps: int | None = option("The same every N steps.", None, ge=1)
    checkpoint_every_n_minutes: float | None = option("The same every N minutes.", None, gt=0.0)
    keep_checkpoints: int = option(
        "How many checkpoints are kept; at least 2, so that one is there whatever happens to the other.",
        2,
        ge=2,
    )
    eval_datasets: tuple[EvalDatasetConfig, ...] = option(
        "Datasets whose loss is measured while training goes on.", (), shorthand="config"
    )
    eval_before_first_step: bool = option("Evaluate before the first step too.", True)
    eval_every_n_epochs: int = option(
        "Evaluate every N epochs, and at the end of the run. 0 is off.", 1, ge=0
    )
    eval_every_n_steps: int | None = option("The same every N steps.", None, ge=1)
    eval_quantiles: tuple[float, ...] = option(
        "Noise levels of an evaluation, as quantiles of the law that training draws from.",
        (0.1, 0.3, 0.5, 0.7, 0.9),
        gt=0.0,
        lt=1.0,
    )
    eval_micro_batch_size_per_gpu: int | None = option(
        "Samples in one micro-batch of an evaluation. Not set: micro_batch_size_per_gpu.", None, ge=1
    )
    seed: int = option("Everything random follows from it.", 0, ge=0)
    caching_batch_size: int = option(
        "Clips of one bucket that the VAE encodes together while caching. Above 1 the last bits of latents depend on it.",
        1,
        ge=1,
    )
    decode_workers: int | None = option(
        "Processes per rank that decode clips ahead while caching; 0 decodes in the rank itself. Not set: by the "
        "number of cores and ranks of the machine, at most 4.",
        None,
        ge=0,
        le=256,
    )
    timeout_minutes: float = option(
        "How long a process waits for a silent peer before it gives up.", 30.0, gt=0.0, le=100_000.0
    )
    model: ModelConfig = option("The model.")
    adapter: AdapterConfig | None = option("The adapter; dit_lora only.", None)
    budget: BudgetConfig | None = option("Limits on how far training may go.", None)
    probes: ProbesConfig | None = option("Probes that run after saves.", None)
    samples: SamplesConfig | None = option("Samples that are drawn after saves.", None)
    optimizer: OptimizerConfig = option("The optimizer.")


@dataclass(frozen=True, kw_only=True)
class DirectoryConfig:
    """`[[directory]]`: one folder of the dataset. Keys left out are those of the top level."""

    path: str = option("Folder of images and videos.")
    num_repeats: float = option(
        "How often each image or clip is seen per epoch; fractions work.", 1.0, gt=0.0, le=10_000.0
    )
    caption_prefix: str = option("Put before every caption.", "")
    mask_path: str | None = option(
        "Folder of loss masks: pictures with the stem of the file that they are for. White counts, black does not.",
        None,
    )
    resolutions: tuple[int, ...] | None = option("Overrides the top level.", None, ge=16, le=8192)
    enable_ar_bucket: bool | None = option("Overrides the top level.", None)
    min_ar: float | None = option("Overrides the top level, its ar_buckets too.", None, ge=0.05, le=20.0)
    max_ar: float | None = option("Overrides the top level, its ar_buckets too.", None, ge=0.05, le=20.0)
    num_ar_buckets: int | None = option("Overrides the top level, its ar_buckets too.", None, ge=1, le=100)
    ar_buckets: tuple[float, ...] | None = option("Overrides the top level.", None, ge=0.05, le=20.0)
    frame_buckets: tuple[int, ...] | None = option("Overrides the top level.", None, ge=1, le=4001)
    size_buckets: tuple[tuple[int, ...], ...] | None = option("Overrides the top level.", None, ge=1, le=8192)
    video_clip_mode: str | None = option("Overrides the top level.", None)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """A dataset TOML."""

    resolutions: tuple[int, ...] = option(
        "Side lengths in px; a bucket has about that many squared pixels.", (512,), ge=16, le=8192
    )
    enable_ar_bucket: bool = option("Several aspect ratios per resolution; false: square only.", True)
    min_ar: float = option("Narrowest width / height.", 0.5, ge=0.05, le=20.0)
    max_ar: float = option("Widest width / height.", 2.0, ge=0.05, le=20.0)
    num_ar_buckets: int = option("How many aspect ratios between the two.", 7, ge=1, le=100)
    ar_buckets: tuple[float, ...] | None = option(
        "The aspect ratios themselves (width / height), instead.", None, ge=0.05, le=20.0
    )
    size_buckets: tuple[tuple[int, ...], ...] | None = option(
        "[width, height, frames] triples, instead of all the above and frame_buckets.", None, ge=1, le=8192
    )
    frame_buckets: tuple[int, ...] = option(
        "Clip lengths in frames, each 4n+1; 1 is for images.", (1, 33), ge=1, le=4001
    )
    video_clip_mode: str = option(
        "Which part of a longer video is used: single_beginning or single_middle (one clip), multiple_overlapping "
        "(as few clips as cover it), or uniform:N (N clips, evenly spaced).",
        "single_beginning",
    )
    missing_caption: Literal["skip", "empty", "error"] = option(
        "What becomes of a file without a caption.", "skip"
    )
    on_bad_file: Literal["skip", "error"] = option(
        "What becomes of a file (or caption) that cannot be read.", "skip"
    )
    cache_dir: str | None = option(
        "Where latents and embeddings are kept. Default: .wan_cache in the first directory.", None
    )
    directory: tuple[DirectoryConfig, ...] = option("The folders.")


@dataclass(frozen=True)
class LoadedConfig:
    """What `load_config` returns: both documents, checked together, and where they came from.

    `dataset` is None only where the dataset TOML does not exist and files were not checked. `eval_datasets` are in the
    order of the training TOML's, without those that do not exist. `notes` are about keys of another trainer that were
    taken: worth telling, nothing to mend.
    """

    train: TrainConfig
    dataset: DatasetConfig | None
    path: str
    dataset_path: str
    overrides: tuple[str, ...] = ()
    eval_datasets: tuple[DatasetConfig, ...] = ()
    notes: tuple["Problem", ...] = ()


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration: dotted key, reason, what to do about it, and the file (or flag) it is in."""

    key: str
    reason: str
    fix: str = ""
    file: str = ""

    def __str__(self) -> str:
        place = f"{self.file}: {self.key}" if self.file else self.key
        return f"{place}: {self.reason}" + (f" -> {self.fix}" if self.fix else "")
