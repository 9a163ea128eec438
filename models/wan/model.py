"""Wan 2.2 as the loop sees it: layers, micro-batches, loss labels and exports of both modes."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.wan import costs
from models.wan.arch import load_arch
from models.wan.caching import EMPTY_CAPTION, WanCache
from models.wan.checkpoint import (
    CheckpointPaths,
    TensorSource,
    open_sharded,
    open_text_encoder,
    text_encoder_sizes,
)
from models.wan.names import umt5_to_hf, umt5_to_official
from models.wan.stages import (
    DitBlockLayer,
    DitHeadLayer,
    DitInputLayer,
    TextBlockLayer,
    TextNormLayer,
    TextWire,
    TokenLayer,
)
from models.wan.text_encoder import (
    WanTokenizer,
    build_umt5_block,
    build_umt5_norm,
    pad_token_ids,
    umt5_config,
)
from models.wan.transformer import WanBlock, WanEmbedding, WanHead
from utils.config.guardrails import mode_of
from utils.config.schema import TrainConfig
from utils.data.manifest import SampleRecord
from utils.data.sampler import MicroBatch
from utils.delta_budget import delta_norm, weight_norm
from utils.flow_matching import NUM_TRAIN_TIMESTEPS, SigmaLaw, add_noise, velocity_target
from utils.layers import LayerSpec, PipelineLayer, PreparedBatch
from utils.lora import (
    add_lora,
    load_initial_adapter,
    parameter_names,
    resolve_targets,
    save_adapter,
    scale_of,
    split_block_path,
)
from utils.optim import trainable_dtype
from utils.rng import derive_seed, generator

TEXT_ENCODER_WEIGHTS = "text_encoder.safetensors"
TEXT_ENCODER_CONFIG = "config.json"
_TEXT_PREFIX = "text_encoder."
_TOKENS = "text_encoder.shared"
_TEXT_NORM = "text_encoder.encoder.final_layer_norm"


class WanModel:
    """One configured Wan 2.2: opened by headers, built layer by layer on the stages that own them."""

    def __init__(self, config: TrainConfig, paths: CheckpointPaths) -> None:
        self._config = config
        self._mode = mode_of(config)
        self._paths = paths
        self._dit: TensorSource = open_sharded(paths.transformer_dir)
        self.arch = load_arch(paths.config_json, self._dit.shapes)
        self._compute_dtype: torch.dtype = getattr(torch, config.model.dtype)
        self._residual_dtype: torch.dtype = getattr(torch, config.model.residual_dtype)
        self._trained_dtype = trainable_dtype(config.optimizer)
        self._law = SigmaLaw(
            config.model.timestep_sample_method,
            config.model.sigmoid_scale,
            config.model.shift,
            config.model.min_t,
            config.model.max_t,
        )
        self.targets: list[str] = []
        self._initial: dict[str, Tensor] = {}
        self._base_norms: dict[str, float] = {}
        if config.adapter is not None:
            self.targets = resolve_targets(linear_modules(self._dit.shapes), config.adapter, config.budget)
            if config.adapter.init_from_existing is not None:
                self._initial = load_initial_adapter(
                    Path(config.adapter.init_from_existing), self.targets, config.adapter
                )
        self._tokenizer: WanTokenizer | None = None
        self._samples: Sequence[SampleRecord] = ()
        self._cache: WanCache | None = None
        self._mean_video_tokens, self._mean_text_tokens = 1.0, 1.0

    @property
    def base_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Header of the base DiT: official names and shapes."""
        return self._dit.shapes

    @property
    def base_files(self) -> Sequence[Path]:
        """Files that hold the base DiT."""
        return self._dit.files

    @property
    def base_dtypes(self) -> Mapping[str, str]:
        """Header of the base DiT: official names and stored dtypes."""
        return self._dit.dtypes

    @property
    def tokenizer(self) -> WanTokenizer:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = WanTokenizer(self._paths.tokenizer_dir)
        return self._tokenizer

    def attach_data(self, samples: Sequence[SampleRecord], cache: WanCache) -> None:
        """Give the model its data; layer costs are estimated at the mean sample."""
        self._samples, self._cache = samples, cache
        tokens = [self._sample_tokens(sample) for sample in samples]
        self._mean_video_tokens = sum(tokens) / len(tokens)
        self._mean_text_tokens = sum(len(self.tokenizer(sample.caption)) for sample in samples) / len(samples)

    # ------------------------------------------------------------------ layers

    def layer_specs(self) -> list[LayerSpec]:
        """All layers of the mode, first to last."""
        text = self._text_specs() if self._mode == "encoder_ft" else []
        return text + self._dit_specs()

    def _text_specs(self) -> list[LayerSpec]:
        source = open_text_encoder(self._paths.text_encoder)
        sizes = text_encoder_sizes(source.shapes)
        model = self._config.model
        umt5 = umt5_config(sizes, model.text_attn_implementation, model.text_encoder_dropout)
        first_trained = 0 if model.text_train_blocks == 0 else sizes.num_layers - model.text_train_blocks
        recompute = self._config.activation_checkpointing

        def build_tokens(device: torch.device) -> PipelineLayer:
            with torch.device("meta"):
                table = nn.Embedding(sizes.vocab_size, sizes.d_model)
            self._load_text(table, "shared", source, device, trained=model.train_token_embedding)
            return TokenLayer(table)

        def build_block(index: int, device: torch.device) -> PipelineLayer:
            with torch.device("meta"):
                block = build_umt5_block(umt5, index)
            trained = index >= first_trained
            self._load_text(block, f"encoder.block.{index}", source, device, trained=trained)
            dropout = model.text_encoder_dropout if trained else 0.0
            if not trained:
                _disable_dropout(block)
            name = f"{_TEXT_PREFIX}encoder.block.{index}"
            return TextBlockLayer(block, name, self._compute_dtype, recompute, dropout)

        def build_norm(device: torch.device) -> PipelineLayer:
            with torch.device("meta"):
                norm = build_umt5_norm(umt5)
            self._load_text(norm, "encoder.final_layer_norm", source, device, trained=True)
            return TextNormLayer(norm)

        specs = [
            LayerSpec(_TOKENS, build_tokens, 0.0, model.train_token_embedding, model.train_token_embedding)
        ]
        for index in range(sizes.num_layers):
            trained = index >= first_trained
            flops = costs.umt5_block_flops(sizes, self._mean_text_tokens)
            name = f"{_TEXT_PREFIX}encoder.block.{index}"
            specs.append(LayerSpec(name, partial(build_block, index), flops, trained, trained, recompute))
        specs.append(LayerSpec(_TEXT_NORM, build_norm, 0.0, True, True))
        return specs

    def _dit_specs(self) -> list[LayerSpec]:
        adapted = {split_block_path(target)[0] for target in self.targets}
        recompute = self._config.activation_checkpointing
        block_flops = costs.dit_block_flops(self.arch, self._mean_video_tokens)
        specs = [LayerSpec("", self._build_input, costs.dit_input_flops(self.arch, self._mean_video_tokens))]
        for index in range(self.arch.num_layers):
            build = partial(self._build_block, index)
            specs.append(
                LayerSpec(f"blocks.{index}", build, block_flops, index in adapted, recompute=recompute)
            )
        specs.append(
            LayerSpec("head", self._build_head, costs.dit_head_flops(self.arch, self._mean_video_tokens))
        )
        return specs

    def _build_input(self, device: torch.device) -> PipelineLayer:
        with torch.device("meta"):
            module = WanEmbedding(self.arch, self._compute_dtype, self._residual_dtype)
        self._load_dit(module, "", device)
        return DitInputLayer(module)

    def _build_block(self, index: int, device: torch.device) -> PipelineLayer:
        with torch.device("meta"):
            block = WanBlock(self.arch, self._compute_dtype)
        self._load_dit(block, f"blocks.{index}.", device)
        adapter = self._config.adapter
        paths = [path for number, path in map(split_block_path, self.targets) if number == index]
        dropout = 0.0
        if adapter is not None and paths:
            add_lora(block, index, paths, adapter, self._trained_dtype, self._config.seed)
            block.to(device)
            dropout = adapter.dropout
            self._start_from_existing(block, index, paths)
        return DitBlockLayer(block, f"blocks.{index}", self._config.activation_checkpointing, dropout)

    def _start_from_existing(self, block: nn.Module, index: int, paths: Sequence[str]) -> None:
        parameters = dict(block.named_parameters())
        for path in paths:
            for name in parameter_names(path):
                initial = self._initial.get(f"blocks.{index}.{name}")
                if initial is not None:
                    with torch.no_grad():
                        parameters[name].copy_(initial)

    def _build_head(self, device: torch.device) -> PipelineLayer:
        with torch.device("meta"):
            head = WanHead(self.arch)
        self._load_dit(head, "head.", device)
        return DitHeadLayer(head)

    def _load_dit(self, module: nn.Module, prefix: str, device: torch.device) -> None:
        state = {
            name: self._dit.get(prefix + name).to(device=device, dtype=parameter.dtype, copy=True)
            for name, parameter in module.named_parameters()
        }
        module.load_state_dict(state, strict=True, assign=True)
        module.requires_grad_(False)

    def _load_text(
        self, module: nn.Module, prefix: str, source: TensorSource, device: torch.device, *, trained: bool
    ) -> None:
        dtype = self._trained_dtype if trained else self._compute_dtype
        state = {
            name: source.get(umt5_to_official(f"{prefix}.{name}")).to(device=device, dtype=dtype, copy=True)
            for name, _ in module.named_parameters()
        }
        module.load_state_dict(state, strict=True, assign=True)
        module.requires_grad_(trained)

    # ------------------------------------------------------------------ data

    def prepare(
        self, batch: MicroBatch, weight: float, *, need_inputs: bool, need_labels: bool
    ) -> PreparedBatch:
        """Read, noise and label one micro-batch. Every draw is named by (seed, sample, visit)."""
        assert self._cache is not None, "attach_data comes first"
        seed = self._config.seed
        noisy, targets, sigmas = [], [], []
        for visit in batch.visits:
            sample = self._samples[visit.sample_index]
            identity = (sample.sample_id, visit.visit)
            item = self._cache.read_latents(visit.sample_index)
            latents = item["latents"].float()
            noise = torch.randn(latents.shape, generator=generator(seed, "noise", *identity))
            sigma = self._law.sample(generator(seed, "sigma", *identity))
            mixed = add_noise(latents, noise, sigma)
            noisy.append(torch.cat((mixed, item["cond"].float())) if "cond" in item else mixed)
            targets.append(velocity_target(latents, noise))
            sigmas.append(sigma)
        sigma_B = torch.tensor(sigmas, dtype=torch.float32)
        inputs = None
        if need_inputs:
            text, lens_B = self._text_inputs(batch)
            names = "/".join(f"{self._samples[v.sample_index].sample_id}:{v.visit}" for v in batch.visits)
            micro_seed = torch.tensor([derive_seed(seed, "micro_batch", names)], dtype=torch.int64)
            timesteps_BT = (sigma_B * NUM_TRAIN_TIMESTEPS).unsqueeze(1)
            inputs = tuple(TextWire(text, lens_B, torch.stack(noisy), timesteps_BT, micro_seed))
        labels = None
        if need_labels:
            indices = torch.tensor([visit.sample_index for visit in batch.visits], dtype=torch.int64)
            labels = (torch.stack(targets), sigma_B, torch.full_like(sigma_B, weight), indices)
        return PreparedBatch(inputs, labels)

    def _text_inputs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Token ids (encoder_ft) or cached states (dit_lora) of the micro-batch, and true lengths."""
        assert self._cache is not None
        captions = [self._caption(visit.sample_index, visit.visit) for visit in batch.visits]
        if self._mode == "encoder_ft":
            return pad_token_ids([self.tokenizer(caption) for caption in captions])
        states = [self._cache.read_text(caption) for caption in captions]
        lens_B = torch.tensor([len(rows) for rows in states], dtype=torch.int64)
        return nn.utils.rnn.pad_sequence(states, batch_first=True), lens_B

    def _caption(self, sample_index: int, visit: int) -> str:
        sample = self._samples[sample_index]
        if self._config.uncond_fraction > 0:
            draw = torch.rand(
                (), generator=generator(self._config.seed, "uncond", sample.sample_id, visit)
            ).item()
            if draw < self._config.uncond_fraction:
                return EMPTY_CAPTION
        return sample.caption

    def num_tokens(self, batch: MicroBatch) -> int:
        """Video tokens of a micro-batch."""
        return sum(self._sample_tokens(self._samples[visit.sample_index]) for visit in batch.visits)

    def _sample_tokens(self, sample: SampleRecord) -> int:
        variant, bucket = self.arch.variant, sample.bucket
        multiple = variant.pixel_multiple
        return (
            variant.latent_frames(bucket.num_frames)
            * (bucket.width // multiple)
            * (bucket.height // multiple)
        )

    def describe_sample(self, sample_index: int) -> str:
        """The sample's file."""
        return str(self._samples[sample_index].path)

    # ------------------------------------------------------------------ results

    def deltas(self, parameters: Mapping[str, Tensor]) -> dict[str, float]:
        """||dW||_F / ||W||_F of each adapted module among one stage's parameters."""
        adapter = self._config.adapter
        ratios: dict[str, float] = {}
        for target in self.targets:
            down_name, up_name = parameter_names(target)
            if adapter is None or down_name not in parameters:
                continue
            if target not in self._base_norms:  # the base never changes
                self._base_norms[target] = weight_norm(parameters[f"{target}.base_layer.weight"])
            delta = delta_norm(parameters[down_name], parameters[up_name], scale_of(adapter))
            ratios[target] = delta / self._base_norms[target]
        return ratios

    def export(
        self, trained: Mapping[str, Tensor], directory: Path, metadata: Mapping[str, str]
    ) -> list[Path]:
        """Write the adapter (dit_lora) or the encoder (encoder_ft) into `directory`."""
        if self._config.adapter is not None:
            return save_adapter(trained, self.targets, self._config.adapter, directory, metadata)
        return self._save_text_encoder(trained, directory, metadata)

    def _save_text_encoder(
        self, trained: Mapping[str, Tensor], directory: Path, metadata: Mapping[str, str]
    ) -> list[Path]:
        """Hugging Face names, in the compute dtype, which is the precision that the encoder was trained to run in."""
        source = open_text_encoder(self._paths.text_encoder)
        tensors = {
            name.removeprefix(_TEXT_PREFIX): tensor.to(self._compute_dtype)
            for name, tensor in trained.items()
        }
        sizes = text_encoder_sizes(source.shapes)
        if self._config.model.save_text_encoder_full:
            for official in source.shapes:
                name = umt5_to_hf(official)
                if name not in tensors:
                    tensors[name] = source.get(official).to(self._compute_dtype)
        weights = directory / TEXT_ENCODER_WEIGHTS
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, weights, metadata=dict(metadata)
        )
        description = directory / TEXT_ENCODER_CONFIG
        config = umt5_config(sizes).to_dict() | {"architectures": ["UMT5EncoderModel"]}
        description.write_text(
            json.dumps(config, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
        )
        return [weights, description]


def linear_modules(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Every linear layer inside the blocks, from a header: names whose weight has two dimensions."""
    return [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2
    ]


def _disable_dropout(module: nn.Module) -> None:
    """Frozen blocks never drop anything, also where trained ones do."""
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        elif isinstance(getattr(child, "dropout", None), float):
            setattr(child, "dropout", 0.0)  # noqa: B010 (attention keeps its rate as a number)
