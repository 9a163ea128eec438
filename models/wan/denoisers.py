"""The DiT as a denoiser: the layers that training runs, in a row in this process or as stages of a pipeline."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.wan.arch import WanArch, load_arch
from models.wan.checkpoint import find_checkpoint, open_transformer
from models.wan.layer_memory import Workload
from models.wan.layers import dit_layers
from models.wan.stages import DitBlockLayer, DitInputLayer, TextWire
from models.wan.text_reuse import TextReuse
from utils.config.schema import ModelConfig, TrainConfig
from utils.distributed import Processes, on_every_rank
from utils.layers import LayerSpec, PipelineLayer, PreparedBatch
from utils.partition import plan_stages

_TEXT_TOKENS = 512.0


class OpenDit(Protocol):
    """A DiT whose weights are loaded: a denoiser, and this process's layers by their prefix."""

    layers: dict[str, nn.Module]

    def velocities(
        self, latents_BCFHW: Tensor, timesteps_BT: Tensor, texts_BLD: Sequence[Tensor]
    ) -> list[Tensor]:
        """See `models.wan.sampling.Denoiser`."""
        ...

    def keeping(self, texts_BLD: Sequence[Tensor]) -> AbstractContextManager[None]:
        """See `models.wan.sampling.Denoiser`."""
        ...

    def close(self) -> None:
        """Let go of the weights."""
        ...


def sampling_config(config: TrainConfig, model: ModelConfig) -> TrainConfig:
    """The configuration with which a DiT's layers are built for sampling: no adapter of its own, nothing trained.

    Nothing is compiled: a process that draws a grid would mostly compile.
    """
    split = {"partition_method": "cost", "partition_split": ()} if config.model.train_text_encoder else {}
    return replace(config, model=model, adapter=None, activation_checkpointing=False, compile=False, **split)  # type: ignore[arg-type]


@contextmanager
def open_dit(
    config: TrainConfig,
    model: ModelConfig,
    num_tokens: int,
    device: torch.device,
    processes: Processes | None,
) -> Iterator[OpenDit]:
    """Load a DiT for the body, and let its memory go after it.

    Args:
        config: of the training: precision, blocks that are swapped, stages.
        model: which weights, of one expert.
        num_tokens: video tokens of a sample, by which stages are balanced.
        device: where to; with stages each process has its own.
        processes: the group whose processes are the stages; None is this process alone.

    Raises:
        UserError: the weights are missing or cannot be read.
    """
    settled = sampling_config(config, model)
    paths = find_checkpoint(model)
    source = open_transformer(paths.transformer_dir)
    arch = load_arch(paths.config_json, source.shapes)
    specs = dit_layers(settled, source, arch, (), {}, Workload(float(num_tokens), _TEXT_TOKENS))
    dit: OpenDit
    if processes is None or processes.world_size == 1:
        dit = LayeredDit(specs, device)
    else:
        dit = _StagedDit(specs, settled, arch, processes)
    try:
        yield dit
    finally:
        dit.close()  # whoever has opened it may still name it
        free_memory(device)


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def transformer_path(model: ModelConfig) -> Path:
    """Where the DiT of a configuration is."""
    return find_checkpoint(model).transformer_dir


def _wire(latents_BCFHW: Tensor, timesteps_BT: Tensor, text_BLD: Tensor, reuse: TextReuse) -> TextWire:
    lens_B = torch.full((text_BLD.shape[0],), text_BLD.shape[1], device=text_BLD.device)
    # On the CPU, where the layers of this process read it without waiting for a GPU; the engine moves what it sends.
    number = torch.tensor([reuse.number_of(text_BLD)], dtype=torch.int64)
    return TextWire(text_BLD, lens_B, latents_BCFHW, timesteps_BT, number)


def _let_reuse(layer: PipelineLayer, reuse: TextReuse) -> None:
    if isinstance(layer, DitInputLayer | DitBlockLayer):
        layer.reuse = reuse


class LayeredDit:
    """All layers in this process."""

    def __init__(self, specs: Sequence[LayerSpec], device: torch.device) -> None:
        built = [spec.build(device).eval() for spec in specs]
        self.layers: dict[str, nn.Module] = {
            spec.name: layer.inner for spec, layer in zip(specs, built, strict=True)
        }
        self._row = nn.Sequential(*built)
        self._reuse = TextReuse()
        for layer in built:
            _let_reuse(layer, self._reuse)

    def velocities(
        self, latents_BCFHW: Tensor, timesteps_BT: Tensor, texts_BLD: Sequence[Tensor]
    ) -> list[Tensor]:
        """One pass for each text."""
        return [self._row(_wire(latents_BCFHW, timesteps_BT, text, self._reuse)) for text in texts_BLD]

    def keeping(self, texts_BLD: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Keep what the layers make of these texts."""
        return self._reuse.keeping(texts_BLD)

    def close(self) -> None:
        """Let go of the weights."""
        self.layers.clear()
        self._row = nn.Sequential()


class _StagedDit:
    """The layers of this process's stage. All processes make the same calls, and all get the velocities."""

    def __init__(
        self, specs: Sequence[LayerSpec], config: TrainConfig, arch: WanArch, processes: Processes
    ) -> None:
        from utils.pipeline import build_pipeline  # deepspeed takes seconds to import

        self.layers: dict[str, nn.Module] = {}
        self._channels = arch.out_dim
        self._outputs: list[Tensor] = []
        self._reuse = TextReuse()
        watched = [replace(spec, build=partial(self._build, spec)) for spec in specs]
        bounds = on_every_rank(lambda: plan_stages(specs, config)).bounds
        self._pipeline = build_pipeline(
            watched,
            bounds,
            self._keep,
            lambda trainables, tables, copies: torch.optim.AdamW([{"params": list(trainables.values())}]),
            micro_batch_size=1,
            gradient_accumulation_steps=1,
            gradient_clipping=0.0,
            processes=processes,
        )
        self._last = processes.world_size - 1

    def velocities(
        self, latents_BCFHW: Tensor, timesteps_BT: Tensor, texts_BLD: Sequence[Tensor]
    ) -> list[Tensor]:
        """Each text is a micro-batch, so that stages work at the same time; the last one tells all what came out."""
        nothing = (torch.zeros(1),)
        batches = [
            PreparedBatch(
                _wire(latents_BCFHW, timesteps_BT, text, self._reuse) if self._pipeline.is_first else None,
                nothing if self._pipeline.is_last else None,
            )
            for text in texts_BLD
        ]
        self._outputs.clear()
        self._pipeline.forward_only(batches)
        batch, _, *places = latents_BCFHW.shape
        velocities = []
        for index in range(len(texts_BLD)):
            empty = torch.empty(batch, self._channels, *places, device=latents_BCFHW.device)
            velocity = self._outputs[index].contiguous() if self._pipeline.is_last else empty
            dist.broadcast(velocity, src=self._last)
            velocities.append(velocity)
        self._outputs.clear()
        return velocities

    def keeping(self, texts_BLD: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Keep what the layers of this stage make of these texts; all processes make the call."""
        return self._reuse.keeping(texts_BLD)

    def close(self) -> None:
        """Let go of the weights, whatever of DeepSpeed still refers to the engine."""
        for parameter in self._pipeline.module.parameters():
            parameter.data = torch.empty(0, device=parameter.device)
        self.layers.clear()
        del self._pipeline

    def _build(self, spec: LayerSpec, device: torch.device) -> PipelineLayer:
        layer = spec.build(device)
        self.layers[spec.name] = layer.inner
        _let_reuse(layer, self._reuse)
        return layer

    def _keep(self, output: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
        """In the place of a loss."""
        self._outputs.append(output.detach().float())
        return output.new_zeros(())
