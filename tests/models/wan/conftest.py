"""What the tests of the Wan models share: published key lists, small random DiTs and UMT5s, and building layers."""

import csv
import gzip
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from models.wan.arch import VARIANTS, Shape, WanArch, expected_shapes, load_arch
from models.wan.checkpoint import TEXT_ENCODER_FILE, TensorSource, open_sharded, open_text_encoder
from models.wan.layers import Workload, dit_layers, text_layers
from models.wan.stages import TextWire
from models.wan.transformer import WanTransformer
from utils.config.schema import AdapterConfig, ModelConfig, OptimizerConfig, TrainConfig
from utils.layers import LayerSpec

KEYS = Path(__file__).resolve().parents[2] / "assets" / "keys"
BY_MODEL_TYPE = {info.model_type: info for info in VARIANTS.values()}


@pytest.fixture(scope="session")
def published_rows() -> Callable[[str], list[list[str]]]:
    """Rows of a published key list, without its head."""

    def read(name: str) -> list[list[str]]:
        with gzip.open(KEYS / f"{name}.csv.gz", "rt", encoding="utf-8") as file:
            return list(csv.reader(file))[1:]

    return read


@pytest.fixture(scope="session")
def make_arch() -> Callable[..., WanArch]:
    """`make_arch("i2v", dim=64, ...)`: a narrow DiT. By default dim 256, two heads of the published width, 3 layers."""

    def make(model_type: str, **sizes: int) -> WanArch:
        info = BY_MODEL_TYPE[model_type]
        defaults = {
            "dim": 256,
            "ffn_dim": 512,
            "freq_dim": 256,
            "num_heads": 2,
            "num_layers": 3,
            "text_len": 512,
            "text_dim": 48,
            "in_dim": info.in_dim,
            "out_dim": info.out_dim,
        }
        return WanArch(model_type=model_type, eps=1e-6, **(defaults | sizes))

    return make


@pytest.fixture(scope="session")
def random_state() -> Callable[[WanArch, int], dict[str, Tensor]]:
    """Float32 weights under official names, drawn so that activations stay of order 1 and every tensor matters."""

    def draw(arch: WanArch, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(shape: Shape, std: float, mean: float = 0.0) -> Tensor:
            return torch.randn(shape, generator=generator) * std + mean

        state = {}
        for name, shape in expected_shapes(arch).items():
            if "modulation" in name:
                state[name] = normal(shape, arch.dim**-0.5)
            elif "norm" in name and name.endswith("weight"):
                state[name] = normal(shape, 0.1, 1.0)
            elif name.endswith("bias"):
                state[name] = normal(shape, 0.02)
            else:
                state[name] = normal(shape, math.prod(shape[1:]) ** -0.5)
        return state

    return draw


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """`relative_error(value, reference)`: L2 norm of the difference over that of the reference, in float64."""

    def error(value: Tensor, reference: Tensor) -> float:
        return ((value.double() - reference.double()).norm() / reference.double().norm()).item()

    return error


@pytest.fixture(scope="session")
def make_config() -> Callable[..., TrainConfig]:
    """`make_config("dit_lora", model={...}, adapter={...}, optimizer={...}, seed=3)`: a run in float32 by default."""

    def make(
        mode: str,
        *,
        model: dict[str, Any] | None = None,
        adapter: dict[str, Any] | None = None,
        optimizer: dict[str, Any] | None = None,
        **top: Any,
    ) -> TrainConfig:
        trains_text = mode == "encoder_ft"
        defaults = {
            "type": "wan",
            "ckpt_path": "unused",
            "dtype": "float32",
            "cache_text_embeddings": not trains_text,
            "train_text_encoder": trains_text,
            "freeze_transformer": True,
        }
        return TrainConfig(
            output_dir="unused",
            dataset="unused",
            model=ModelConfig(**(defaults | (model or {}))),
            adapter=None if trains_text else AdapterConfig(**({"rank": 4} | (adapter or {}))),
            optimizer=OptimizerConfig(**({"lr": 1e-3} | (optimizer or {}))),
            **top,
        )

    return make


class Checkpoint(NamedTuple):
    """A DiT opened by its headers, and its text encoder."""

    arch: WanArch
    source: TensorSource
    text: TensorSource


@pytest.fixture(scope="session")
def open_tiny() -> Callable[[Path], Checkpoint]:
    """Open a small checkpoint; of two experts the high-noise one."""

    def open_checkpoint(root: Path) -> Checkpoint:
        dit_dir = root / "high_noise_model" if (root / "high_noise_model").is_dir() else root
        source = open_sharded(dit_dir)
        text = open_text_encoder(root / TEXT_ENCODER_FILE)
        return Checkpoint(load_arch(dit_dir / "config.json", source.shapes), source, text)

    return open_checkpoint


@pytest.fixture(scope="session")
def build_layers() -> Callable[..., tuple[list[LayerSpec], nn.Sequential]]:
    """`build_layers(config, checkpoint, targets)`: all layers of the config's mode, as specs and in a row on the CPU."""

    def build(
        config: TrainConfig,
        checkpoint: Checkpoint,
        targets: Sequence[str] = (),
        initial: Mapping[str, Tensor] | None = None,
    ) -> tuple[list[LayerSpec], nn.Sequential]:
        workload = Workload(video_tokens=24.0, text_tokens=12.0)
        specs = text_layers(config, checkpoint.text, workload) if config.model.train_text_encoder else []
        specs += dit_layers(config, checkpoint.source, checkpoint.arch, targets, initial or {}, workload)
        return specs, nn.Sequential(*(spec.build(torch.device("cpu")) for spec in specs))

    return build


@pytest.fixture(scope="session")
def build_reference() -> Callable[..., WanTransformer]:
    """`build_reference(checkpoint, compute_dtype, residual_dtype, lean)`: the whole DiT as one module."""

    def build(checkpoint: Checkpoint, *settings: Any) -> WanTransformer:
        with torch.device("meta"):
            model = WanTransformer(checkpoint.arch, *settings)
        state = {
            name: checkpoint.source.get(name).to(parameter.dtype, copy=True)
            for name, parameter in model.named_parameters()
        }
        model.load_state_dict(state, strict=True, assign=True)
        return model.requires_grad_(False)

    return build


@pytest.fixture(scope="session")
def draw_wire() -> Callable[..., TextWire]:
    """`draw_wire(arch, text, lens)`: a micro-batch around token ids or text states; timesteps are fractions."""

    def draw(arch: WanArch, text: Tensor, lens: Sequence[int], seed: int = 0) -> TextWire:
        generator = torch.Generator().manual_seed(seed)
        batch = len(lens)
        return TextWire(
            text=text,
            lens_B=torch.tensor(lens),
            latents_BCFHW=torch.randn(batch, arch.in_dim, 2, 4, 6, generator=generator),
            timesteps_BT=torch.rand(batch, 1, generator=generator) * 1000,
            seed=torch.tensor([seed]),
        )

    return draw


@pytest.fixture
def sampling_inputs() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Two samples of a tiny A14B: latents, their timestep, and the states of two texts."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 16, 2, 4, 6, generator=generator)
    texts = [torch.randn(2, length, 64, generator=generator) for length in (5, 8)]
    return latents, torch.full((2, 1), 700.0), texts
