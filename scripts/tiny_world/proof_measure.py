"""What a tuned encoder and adapters draw, held against the base: pictures of the same noise, read by the checker.

Sampled with the project's sampler, each expert with its own adapter; padding is taken as one row (`compact.py`).
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from models.wan.checkpoint import EXPERT_DIRS, open_text_encoder, open_transformer
from models.wan.sample_adapters import AdapterChoice, load_adapters
from models.wan.text_encoder import load_umt5
from scripts.tiny_world.asset import TinyWan
from scripts.tiny_world.captions import Prompt
from scripts.tiny_world.drawing import Drawing, draw
from scripts.tiny_world.proof_data import (
    LENGTHS,
    Amounts,
    held_out_prompts,
    known_prompts,
    neutral_prompts,
    new_prompts,
)
from scripts.tiny_world.quality import outcomes_of
from scripts.tiny_world.world import Pixels
from utils.added_lora import adapters_added
from utils.config.schema import Expert
from utils.files import atomic_write_bytes
from utils.rng import derive_seed

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Weights:
    """What is put into the base: a tuned encoder, and an adapter for each expert."""

    encoder: Path | None = None
    adapters: Mapping[Expert, Path] | None = None


@dataclass(frozen=True)
class Painter:
    """The base, where its files are, and how it is sampled."""

    model: TinyWan
    checkpoint: Path
    drawing: Drawing

    def with_encoder(self, encoder: Path | None) -> "Painter":
        """The same with a tuned encoder."""
        if encoder is None:
            return self
        umt5 = load_umt5(open_text_encoder(encoder), torch.float32, _CPU)
        return replace(self, model=replace(self.model, umt5=umt5))

    @contextmanager
    def adapted(self, expert: Expert, adapters: Mapping[Expert, Path] | None) -> Iterator[None]:
        """With the adapter of one expert put on."""
        if not adapters:
            yield
            return
        place = self.checkpoint / EXPERT_DIRS[expert]
        choices = [AdapterChoice(adapters[expert], 1.0, expert)]
        loaded = load_adapters(choices, expert, place, open_transformer(place))
        with adapters_added({"": self.model.dit}, loaded, _CPU) as count:
            if count != len(loaded[0].modules):
                raise ValueError(f"{adapters[expert]}: {count} of {len(loaded[0].modules)} modules found")
            yield


def cells_of(amounts: Amounts, seed: int) -> dict[str, list[Prompt]]:
    """All prompts with an answer, by cell."""
    cells = {"known": known_prompts(amounts.known_prompts, seed)}
    cells |= {length: new_prompts(length, amounts.new_prompts, seed) for length in LENGTHS}
    return cells | {"held_out": held_out_prompts(amounts.held_out_prompts, seed)}


def measure(
    painter: Painter, weights: Weights, seed: int, amounts: Amounts, base_file: Path, keep: Path | None = None
) -> dict[str, Any]:
    """Outcomes of every prompt, in order, which are the same prompts from the same noise for the same seed.

    Args:
        painter: the base.
        weights: what is put into it.
        seed: of prompts and noise.
        amounts: how many prompts.
        base_file: the base's latents of the same prompts. The base itself, `Weights()`, writes it.
        keep: where to write all pictures, uint8 [N, 48, 48, 3] by cell, in numpy's format; None is not at all.

    Returns:
        By cell `text` of each prompt, and 0 or 1 as of `outcomes_of`; of `known` and `neutral` prompts `distance`, the
        relative distance of the latents to the base's.

    Raises:
        ValueError: there is no `base_file`, and `weights` are not the base: its latents would pass for the base's.
    """
    is_base = weights == Weights()
    if not is_base and not base_file.is_file():
        raise ValueError(f"{base_file}: the base was not drawn yet, so there is nothing to hold this against")
    latents: dict[str, Tensor] = {}
    pictures: dict[str, Any] = {}
    outcomes: dict[str, dict[str, Any]] = {}
    cells = cells_of(amounts, seed)
    texts = {name: [prompt.text for prompt in prompts] for name, prompts in cells.items()}
    texts["neutral"] = neutral_prompts(amounts.neutral_prompts)
    for name, prompts in texts.items():
        latents[name], pictures[name] = draw_cell(painter, weights, prompts, seed, name)
    for name, expected in cells.items():
        outcomes[name] = {"text": texts[name]} | outcomes_of(expected, pictures[name])
    outcomes["neutral"] = {"text": texts["neutral"]}
    kept = {name: latents[name] for name in ("known", "neutral")}
    if is_base:
        atomic_write_bytes(base_file, save(kept))
    base = load_file(base_file)
    for name, own in kept.items():
        outcomes[name]["distance"] = distances(own, base[name])
    if keep is not None:
        packed = io.BytesIO()
        np.savez_compressed(packed, **pictures)
        atomic_write_bytes(keep, packed.getvalue())
    return outcomes


def measure_known(
    painter: Painter, weights: Weights, seed: int, amounts: Amounts, base_file: Path
) -> dict[str, Any]:
    """The known words alone, as of `measure`; `base_file` is there."""
    prompts = cells_of(amounts, seed)["known"]
    texts = [prompt.text for prompt in prompts]
    latents, pictures = draw_cell(painter, weights, texts, seed, "known")
    found: dict[str, Any] = {"text": texts, "distance": distances(latents, load_file(base_file)["known"])}
    return found | outcomes_of(prompts, pictures)


def draw_cell(
    painter: Painter, weights: Weights, prompts: Sequence[str], seed: int, cell: str
) -> tuple[Tensor, Pixels]:
    """Draw prompts, as of `drawing.draw`. Noise follows from seed, cell and place."""
    painter = painter.with_encoder(weights.encoder)
    seeds = [derive_seed(seed, "proof", cell, place) for place in range(len(prompts))]

    def adapted(expert: Expert) -> AbstractContextManager[None]:
        return painter.adapted(expert, weights.adapters)

    return draw(painter.model, prompts, painter.drawing, seeds, adapted)


def distances(latents_NCFHW: Tensor, base_NCFHW: Tensor) -> list[float]:
    """||z - z_base|| / ||z_base|| of each sample."""
    away = (latents_NCFHW - base_NCFHW).flatten(1).norm(dim=1) / base_NCFHW.flatten(1).norm(dim=1)
    return [round(value, 5) for value in away.tolist()]
