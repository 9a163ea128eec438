"""Samples of a configuration's checkpoint: each part (encoder, DiT, VAE) is loaded when it is needed, and gone after.

With two experts all batches go through the high-noise one first, so that each is loaded once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.wan.caching import first_frame_condition
from models.wan.checkpoint import find_checkpoint, open_transformer
from models.wan.decoding import Tiling, decode_latents
from models.wan.denoisers import free_memory, open_dit, transformer_path
from models.wan.layouts import expert_model
from models.wan.media import video_tokens
from models.wan.sample_adapters import AdapterChoice, check_exclude, load_adapters
from models.wan.sampling import Trajectory
from models.wan.sampling_settings import SamplingSettings
from models.wan.text_encoder import MAX_TEXT_TOKENS, TextEncoder, WanTokenizer
from models.wan.vae import load_vae
from utils.added_lora import WeightedAdapter, adapters_added
from utils.config.schema import Expert, ModelConfig, TrainConfig
from utils.data.buckets import Bucket
from utils.data.images import load_image
from utils.data.media import fit_to_bucket, scale_frames
from utils.distributed import Processes, on_main
from utils.errors import UserError

Say = Callable[[str], None]
_ENCODED_TOGETHER = 16
_SHOWN_OF_CUT = 160


@dataclass(frozen=True)
class Variation:
    """One way to draw the same prompts: with these adapters, and this text encoder (None: that of the configuration)."""

    adapters: tuple[AdapterChoice, ...] = ()
    text_encoder: Path | None = None


@dataclass(frozen=True)
class SampleJob:
    """What to draw: every prompt with its seed, under every variation.

    Attributes:
        config: whose checkpoint, precision and stages.
        settings: size, steps and so on.
        prompts, seeds: of each sample.
        negative_prompt: of all of them.
        variations: one or more; the samples of each have the same noise.
        image: the first frame, where there is one.
        expert: make all steps with this expert alone, of two.
        adapter_exclude: modules of the adapters to leave out, as globs.
        batch_size: samples that go through the DiT together.
        tiling: of the VAE.
        show_prompts: whether warnings may quote prompts.
    """

    config: TrainConfig
    settings: SamplingSettings
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative_prompt: str
    variations: tuple[Variation, ...] = (Variation(),)
    image: Path | None = None
    expert: Expert | None = None
    adapter_exclude: tuple[str, ...] = ()
    batch_size: int = 1
    tiling: Tiling = "auto"
    show_prompts: bool = True

    @property
    def phases(self) -> tuple[Expert | None, ...]:
        """The experts in the order in which they work; (None,) where there is one model."""
        if not self.settings.variant.has_experts:
            return (None,)
        return ("high_noise", "low_noise") if self.expert is None else (self.expert,)

    def model(self, expert: Expert | None) -> ModelConfig:
        """The configuration of one expert's weights."""
        return expert_model(self.config.model, expert)


@dataclass(frozen=True)
class Where:
    """Where to compute, and whom to tell. `processes`: the stages of a pipeline; None is this process alone.

    `on_progress` hears how many batches times steps are done, at first that none is, once the DiT is loaded.
    """

    device: torch.device
    processes: Processes | None = None
    say: Say = lambda text: None
    on_progress: Callable[[int], None] = lambda done: None

    @property
    def is_main(self) -> bool:
        """Whether this process encodes, decodes and speaks."""
        return self.processes is None or self.processes.is_main

    def on_main(self, function: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What `function` returns on the main process, on all of them."""
        return function() if self.processes is None else on_main(function)


def check_job(job: SampleJob) -> None:
    """Everything about a job that headers tell: both experts are there, and every adapter fits.

    Raises:
        UserError: a part of the checkpoint or an adapter is missing or does not fit.
    """
    modules: dict[Path, list[str]] = {}
    for phase in job.phases:
        try:
            paths = find_checkpoint(job.model(phase))
        except UserError as error:
            hint = "; with one expert alone, write --expert" if len(job.phases) > 1 else ""
            raise UserError(f"{error}{hint}") from None
        source = open_transformer(paths.transformer_dir)
        for variation in job.variations:
            if variation.text_encoder is not None and not variation.text_encoder.is_file():
                raise UserError(f"{variation.text_encoder}: is no file; check --text_encoder")
            own = [choice for choice in variation.adapters if choice.expert == phase]
            loaded = load_adapters(own, phase, paths.transformer_dir, source)
            modules |= {choice.path: list(one.modules) for choice, one in zip(own, loaded, strict=True)}
    unused = {
        choice.path
        for variation in job.variations
        for choice in variation.adapters
        if choice.path not in modules
    }
    if unused:
        raise UserError(
            f"{min(unused)}: is for the other expert, and --expert {job.expert} draws alone; leave one out"
        )
    check_exclude(job.adapter_exclude, modules)
    if job.adapter_exclude:
        for phase in job.phases:
            for variation in job.variations:
                _adapters(job, variation, phase)


def sample(job: SampleJob, where: Where) -> list[Tensor]:
    """Latents of every variation, [N, C, F, H, W] float32 in the order of the prompts. All processes make the call.

    Raises:
        UserError: weights cannot be read.
    """
    negatives, texts = _encode(job, where)
    condition = _condition(job, where)
    batches = [slice(start, start + job.batch_size) for start in range(0, len(job.prompts), job.batch_size)]
    trajectories = [
        [
            Trajectory(
                texts[index][batch], job.seeds[batch], job.settings, negatives[index], condition, where.device
            )
            for batch in batches
        ]
        for index in range(len(job.variations))
    ]
    done = 0

    def on_step() -> None:
        nonlocal done
        done += 1
        where.on_progress(done)

    settings = job.settings
    tokens = video_tokens(settings.variant, Bucket(settings.width, settings.height, settings.num_frames))
    for phase in job.phases:
        until = phase if len(job.phases) > 1 else None
        if not any(_has_steps(one, settings, until) for row in trajectories for one in row):
            continue
        with open_dit(job.config, job.model(phase), tokens, where.device, where.processes) as dit:
            for row, variation in zip(trajectories, job.variations, strict=True):
                adapters = _adapters(job, variation, phase)
                with adapters_added(dit.layers, adapters, where.device):
                    if not done:
                        where.on_progress(0)
                    for trajectory in row:
                        trajectory.advance(dit, on_step, until)
    return [torch.cat([one.result().cpu() for one in row]) for row in trajectories]


def decode(job: SampleJob, latents: Sequence[Tensor], where: Where) -> Iterator[Tensor]:
    """Videos [N, 3, F, H, W] of each variation, float32 in [-1, 1] on the CPU; the VAE is loaded once, and freed behind.

    Raises:
        UserError: the VAE cannot be read, or memory does not suffice.
    """
    model = job.model(job.phases[0])
    vae = load_vae(find_checkpoint(model).vae, getattr(torch, model.vae_dtype), where.device)
    try:
        for one in latents:
            yield decode_latents(vae, one, job.tiling, where.say)
    finally:
        del vae
        free_memory(where.device)


def _has_steps(trajectory: Trajectory, settings: SamplingSettings, expert: Expert | None) -> bool:
    if not trajectory.steps_left:
        return False
    return expert is None or settings.expert_at(trajectory.next_timestep) == expert


def _adapters(job: SampleJob, variation: Variation, phase: Expert | None) -> list[WeightedAdapter]:
    if not any(choice.expert == phase for choice in variation.adapters):
        return []
    transformer = transformer_path(job.model(phase))
    source = open_transformer(transformer)
    return load_adapters(variation.adapters, phase, transformer, source, job.adapter_exclude)


def _encode(job: SampleJob, where: Where) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The states of the negative prompt and of every prompt, for each variation; each encoder is loaded once."""
    known: dict[Path | None, list[Tensor]] = {}
    for variation in job.variations:
        encoder = variation.text_encoder
        if encoder not in known:
            known[encoder] = where.on_main(lambda encoder=encoder: _states(job, encoder, where))  # type: ignore[misc]
    rows = [known[variation.text_encoder] for variation in job.variations]
    return [row[0] for row in rows], [row[1:] for row in rows]


def _states(job: SampleJob, text_encoder: Path | None, where: Where) -> list[Tensor]:
    model = job.model(job.phases[0])
    paths = find_checkpoint(model)
    tokenizer = WanTokenizer(paths.tokenizer_dir)
    if text_encoder is None or text_encoder == job.variations[0].text_encoder:
        numbered = enumerate(dict.fromkeys(job.prompts), start=1)
        named = {prompt: f"prompt {number}" for number, prompt in numbered}
        warn_of_cut_prompts(
            tokenizer, {job.negative_prompt: "the negative prompt"} | named, job.show_prompts, where.say
        )
    encoder = TextEncoder(
        text_encoder or paths.text_encoder,
        tokenizer,
        getattr(torch, model.dtype),
        where.device,
        model.text_attn_implementation,
    )
    texts = list(dict.fromkeys((job.negative_prompt, *job.prompts)))
    states: dict[str, Tensor] = {}
    for start in range(0, len(texts), _ENCODED_TOGETHER):
        some = texts[start : start + _ENCODED_TOGETHER]
        states |= dict(zip(some, encoder.encode(some), strict=True))
    del encoder
    free_memory(where.device)
    return [states[job.negative_prompt], *(states[prompt] for prompt in job.prompts)]


def warn_of_cut_prompts(tokenizer: WanTokenizer, names: Mapping[str, str], show: bool, say: Say) -> None:
    """Say which prompts, by their names, are longer than what Wan reads, and what is cut off."""
    for prompt, name in names.items():
        count = tokenizer.count(prompt)
        if count > MAX_TEXT_TOKENS:
            cut = f': "{_shortened(tokenizer.cut_off(prompt))}"' if show else ""
            say(
                f"warning: {name} has {count} tokens, and Wan reads {MAX_TEXT_TOKENS}; its end, "
                f"{count - MAX_TEXT_TOKENS} tokens, is not seen{cut}"
            )


def _shortened(text: str) -> str:
    """Both ends of a long text: where it is cut, and where it stops."""
    half = _SHOWN_OF_CUT // 2
    return text if len(text) <= _SHOWN_OF_CUT else f"{text[:half]} ... {text[-half:]}"


def _condition(job: SampleJob, where: Where) -> Tensor | None:
    """The first frame as the variant takes it, [1, C, F, H, W]; None without one."""
    if job.image is None:
        return None
    image = job.image

    def encode() -> list[Tensor]:
        model, settings = job.model(job.phases[0]), job.settings
        bucket = Bucket(settings.width, settings.height, 1)
        frame_CFHW = scale_frames(np.array(fit_to_bucket(load_image(image), 1.0, bucket)[None]))
        vae = load_vae(find_checkpoint(model).vae, getattr(torch, model.vae_dtype), where.device)
        if settings.variant.model_type == "i2v":
            video = torch.zeros(1, 3, settings.num_frames, settings.height, settings.width)
            video[0, :, :1] = frame_CFHW
            condition = first_frame_condition(video, vae)
        else:
            condition = vae.encode(frame_CFHW[None])
        condition = condition.float().cpu()
        del vae
        free_memory(where.device)
        return [condition]

    return where.on_main(encode)[0]
