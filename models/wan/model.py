"""Wan 2.2 as the loop sees it: layers, micro-batches and exports of the configured mode."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from models.wan.arch import load_arch
from models.wan.batches import WanBatches
from models.wan.caching import WanCache
from models.wan.checkpoint import (
    CheckpointPaths,
    TensorSource,
    find_checkpoint,
    open_text_encoder,
    open_transformer,
)
from models.wan.evaluation import WanEvalBatches
from models.wan.export import EncoderFormat, save_text_encoder
from models.wan.layers import dit_layers, text_layers
from models.wan.neutral_drift import NeutralDrift
from models.wan.noise import describe_noise
from utils.config.experts import alternates, side_config, side_model, sides_of
from utils.config.schema import TrainConfig
from utils.data.manifest import SampleRecord
from utils.data.sampler import MicroBatch
from utils.delta_budget import ModuleDelta, module_delta, weight_norm
from utils.layers import LayerSpec, PreparedBatch
from utils.lora import (
    adapters_off,
    load_initial_adapter,
    parameter_names,
    save_adapter,
    scale_of,
)
from utils.lora_check import check_saved_adapter
from utils.lora_targets import describe_targets, linear_modules, resolve_targets


class WanModel:
    """One configured Wan 2.2: opened by headers, built layer by layer on the stages that own them."""

    def __init__(self, config: TrainConfig, paths: CheckpointPaths) -> None:
        """Open the checkpoint and resolve the adapter's targets; no weight is read.

        Raises:
            UserError: the checkpoint or the adapter's targets are not right.
        """
        self._config = config
        self._paths = paths
        self.base: TensorSource = open_transformer(paths.transformer_dir)
        self.arch = load_arch(paths.config_json, self.base.shapes)
        # The low-noise expert, where one encoder is trained through both.
        self.second: TensorSource | None = None
        if alternates(config):
            other = find_checkpoint(side_config(config, "low_noise").model)
            self.second = open_transformer(other.transformer_dir)
            load_arch(other.config_json, self.second.shapes)
        self.targets: list[str] = []
        self._initial: dict[str, Tensor] = {}
        self._base_norms: dict[str, float] = {}
        self._batches: WanBatches | None = None
        adapter = config.adapter
        if adapter is not None:
            self.targets = resolve_targets(linear_modules(self.base.shapes), adapter, config.budget)
            if adapter.init_from_existing is not None:
                self._initial = load_initial_adapter(Path(adapter.init_from_existing), self.targets, adapter)

    def start_from(self, directory: Path) -> None:
        """Begin with the solved adapter in `directory`. Comes before `layer_specs`.

        Raises:
            UserError: it is damaged, or not one for these targets.
        """
        assert self._config.adapter is not None, "an adapter is trained"
        self._initial = load_initial_adapter(
            directory, self.targets, self._config.adapter, 'adapter.init = "closed_form":'
        )

    @property
    def base_files(self) -> list[Path]:
        """All files of DiTs that take part."""
        sources = [self.base] if self.second is None else [self.base, self.second]
        return [Path(file) for source in sources for file in source.files]

    def attach_data(self, samples: Sequence[SampleRecord], cache: WanCache) -> None:
        """Give the model its data. Comes before everything below."""
        variant = self.arch.variant
        self._batches = WanBatches(self._config, variant, samples, cache, self._paths.tokenizer_dir)

    @property
    def batches(self) -> WanBatches:
        """The maker of micro-batches."""
        assert self._batches is not None, "attach_data comes first"
        return self._batches

    def eval_batches(
        self,
        samples: Sequence[SampleRecord],
        cache: WanCache,
        quantiles: Sequence[float],
        *,
        first_frame: bool = False,
    ) -> WanEvalBatches:
        """The maker of micro-batches of a dataset that is evaluated, with `first_frame` image-conditioned."""
        return WanEvalBatches(
            self._config,
            self.arch.variant,
            samples,
            cache,
            self._paths.tokenizer_dir,
            quantiles,
            first_frame=first_frame,
        )

    def describe(self) -> list[str]:
        """What is trained, for people."""
        variant, law = self.arch.variant, self.batches.sigma_law
        chosen = self._config.model.expert
        expert = "" if chosen is None else ", both experts" if chosen == "both" else f", {chosen} expert"
        lines = [
            f"{variant.name}{expert}: {self.arch.num_layers} blocks of width {self.arch.dim}; noise levels "
            f"{law.min_t:g}-{law.max_t:g}, {law.method} with shift {law.shift:g}"
        ]
        if self.targets:
            lines.append(f"{len(self.targets)} adapter targets: {'; '.join(describe_targets(self.targets))}")
        if alternates(self._config):
            lines.append("the experts take turns by optimizer step, each at its own noise levels")
        sides = [side_model(self._config.model, side) for side in sides_of(self._config)]
        for model in sides or [self._config.model]:
            lines += describe_noise(model, variant)
        return lines + self.batches.describe_first_frame() + self.batches.describe_captions()

    def layer_specs(self) -> list[LayerSpec]:
        """All layers of the mode, first to last."""
        config, workload = self._config, self.batches.workload
        text = []
        if config.model.train_text_encoder:
            text = text_layers(config, open_text_encoder(self._paths.text_encoder), workload)
        return text + dit_layers(
            config, self.base, self.arch, self.targets, self._initial, workload, self.second
        )

    def prepare(
        self, batch: MicroBatch, weight: float, *, need_inputs: bool, need_labels: bool
    ) -> PreparedBatch:
        """See `TrainableModel`."""
        return self.batches.prepare(batch, weight, need_inputs=need_inputs, need_labels=need_labels)

    def num_tokens(self, batch: MicroBatch) -> int:
        """See `TrainableModel`."""
        return self.batches.num_tokens(batch)

    def describe_sample(self, sample_index: int) -> str:
        """See `TrainableModel`."""
        return self.batches.describe_sample(sample_index)

    def adapters_off(self, stage: nn.Module) -> AbstractContextManager[None] | None:
        """See `TrainableModel`."""
        return None if self._config.adapter is None else adapters_off(stage)

    def deltas(self, parameters: Mapping[str, Tensor]) -> list[ModuleDelta]:
        """See `TrainableModel`."""
        adapter = self._config.adapter
        deltas = []
        for target in self.targets:
            down_name, up_name = parameter_names(target)
            if adapter is None or down_name not in parameters:
                continue
            if target not in self._base_norms:  # the base never changes
                # The file's, whatever precision and place the weight has here: ratios depend on no layout, and are those
                # that lora_delta_budget reports.
                self._base_norms[target] = weight_norm(self.base.get(f"{target}.weight"))
                self.base.release()
            down, up, norm = parameters[down_name], parameters[up_name], self._base_norms[target]
            deltas.append(module_delta(target, down, up, scale_of(adapter), norm))
        return deltas

    def scale_adapters(self, parameters: Mapping[str, Tensor], factors: Mapping[str, float]) -> None:
        """See `TrainableModel`. B is scaled; A, and so the directions that are read, stay as they are."""
        with torch.no_grad():
            for module, factor in factors.items():
                _, up_name = parameter_names(module)
                if up_name in parameters:
                    parameters[up_name].mul_(factor)

    def neutral_drift(self) -> NeutralDrift | None:
        """What measures the encoder's drift for `[budget]`; None where nothing has to be measured.

        Raises:
            UserError: the file of neutral prompts cannot be used.
        """
        budget = self._config.budget
        if budget is None or budget.max_neutral_drift is None:
            return None
        return NeutralDrift(self.arch, self._paths.tokenizer_dir, budget.neutral_prompts)

    def export(
        self, trained: Mapping[str, Tensor], directory: Path, metadata: Mapping[str, str]
    ) -> list[Path]:
        """Write the adapter (dit_lora) or the encoder (encoder_ft), and read it again.

        Raises:
            UserError: what was written is not sound.
        """
        config = self._config
        if config.adapter is not None:
            files = save_adapter(trained, self.targets, config.adapter, directory, metadata)
            ups = [trained[parameter_names(target)[1]] for target in self.targets]
            check_saved_adapter(
                files[0],
                self.targets,
                self.base.shapes,
                config.adapter.rank,
                metadata,
                is_untrained=not any(bool(up.any()) for up in ups),
            )
            return files
        source = open_text_encoder(self._paths.text_encoder)
        dtype: torch.dtype = getattr(torch, config.model.dtype)
        model = config.model
        how = EncoderFormat(
            model.save_text_encoder_format, model.save_text_encoder_full, self._paths.tokenizer_dir
        )
        return save_text_encoder(trained, source, dtype, directory, metadata, how)
