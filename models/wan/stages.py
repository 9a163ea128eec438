"""The wires between pipeline stages and the layers that make up Wan's pipeline.

encoder_ft:  TokenLayer, UMT5 blocks, TextNormLayer, DitInputLayer, DiT blocks, DitHeadLayer
dit_lora:                                            DitInputLayer, DiT blocks, DitHeadLayer

Shapes: B batch, C channels, F latent frames, H W space, L text tokens, D width, T 1 or F (see `transformer.py`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.wan.compiled import compiled_block
from models.wan.text_encoder import padding_mask
from models.wan.text_reuse import TextReuse
from models.wan.transformer import WanBlock, WanEmbedding, WanHead
from utils.config.schema import ActivationCheckpointing
from utils.layers import PipelineLayer
from utils.rng import derive_seed, seeded_globally


class TextWire(NamedTuple):
    """What travels until the DiT begins.

    text: token ids int64 [B, L] into the first UMT5 layer, states [B, L, D] behind it.
    lens_B: true number of tokens, int64.
    latents_BCFHW: the DiT's input, float32: noisy latents and, for I2V, the conditioning channels.
    timesteps_BT: 0..1000, float32.
    seed: int64 [1], names this micro-batch's dropout masks; in sampling, which has none, the text (`TextReuse.number_of`).
    """

    text: Tensor
    lens_B: Tensor
    latents_BCFHW: Tensor
    timesteps_BT: Tensor
    seed: Tensor


class DitWire(NamedTuple):
    """What travels between DiT layers.

    hidden_BFHWD in the residual dtype; time_BTD and modulation_BT6D float32; text_BLD behind the text embedding, in
    the compute dtype; seed int64 [1].
    """

    hidden_BFHWD: Tensor
    time_BTD: Tensor
    modulation_BT6D: Tensor
    text_BLD: Tensor
    seed: Tensor


class _DropoutSeed:
    """Makes dropout inside a layer a function of (run seed, layer, samples of the micro-batch and their visits)."""

    def __init__(self, layer_name: str, rate: float) -> None:
        self._layer_name = layer_name
        self._rate = rate

    def call(self, function: Any, seed: Tensor, *arguments: Any) -> Any:
        if self._rate == 0.0 or not torch.is_grad_enabled():
            return function(*arguments)
        with seeded_globally(derive_seed(int(seed.item()), "dropout", self._layer_name), seed.device):
            return function(*arguments)


class TokenLayer(PipelineLayer):
    """UMT5's token table."""

    inner: nn.Embedding

    def run(self, *wire: Tensor) -> TextWire:
        """ids_BL -> states_BLD."""
        text = TextWire(*wire)
        return text._replace(text=self.inner(text.text))


class TextBlockLayer(PipelineLayer):
    """One UMT5 block. Trained weights are float32 and compute in `compute_dtype` by autocast."""

    def __init__(
        self,
        inner: nn.Module,
        name: str,
        compute_dtype: torch.dtype,
        recompute: ActivationCheckpointing,
        dropout: float,
    ) -> None:
        super().__init__(inner, recompute)
        self._compute_dtype = compute_dtype
        self._dropout = _DropoutSeed(name, dropout)

    def run(self, *wire: Tensor) -> TextWire:
        """states_BLD -> states_BLD in the dtype of this block's weights."""
        text = TextWire(*wire)
        weight_dtype = next(self.inner.parameters()).dtype
        states = text.text.to(weight_dtype)
        mask = padding_mask(text.lens_B, states.shape[1], states.dtype)
        mixed_precision = weight_dtype != self._compute_dtype
        with torch.autocast(states.device.type, self._compute_dtype, enabled=mixed_precision):
            states = self._dropout.call(self.inner, text.seed, states, mask)
        return text._replace(text=states)


class TextNormLayer(PipelineLayer):
    """UMT5's final norm, and zeros behind each caption's end: states of padding must never reach the DiT."""

    def run(self, *wire: Tensor) -> TextWire:
        """states_BLD -> text_BLD."""
        text = TextWire(*wire)
        states = self.inner(text.text.to(next(self.inner.parameters()).dtype))
        positions = torch.arange(states.shape[1], device=states.device)
        is_token = (positions[None, :] < text.lens_B[:, None]).unsqueeze(-1)
        return text._replace(text=states * is_token)


class DitInputLayer(PipelineLayer):
    """Patches, timestep and text into the DiT."""

    inner: WanEmbedding
    reuse: TextReuse | None = None

    def run(self, *wire: Tensor) -> DitWire:
        """TextWire -> DitWire."""
        text, embedding, ready = TextWire(*wire), self.inner, None
        if self.reuse is not None:
            makers = tuple(embedding.text_embedding)
            ready = self.reuse.made(text.seed, makers, lambda: embedding.embed_text(text.text))
        hidden, time, modulation, embedded = embedding.embed(
            text.latents_BCFHW, text.timesteps_BT, text.text, ready
        )
        return DitWire(hidden, time, modulation, embedded, text.seed)


class DitBlockLayer(PipelineLayer):
    """One DiT block; `is_compiled`: by `torch.compile`, and recomputation with it."""

    inner: WanBlock
    reuse: TextReuse | None = None

    def __init__(
        self,
        inner: WanBlock,
        name: str,
        recompute: ActivationCheckpointing,
        dropout: float,
        is_compiled: bool = False,
    ) -> None:
        super().__init__(inner, False if is_compiled else recompute)
        self._run_block = compiled_block(inner, recompute) if is_compiled else inner
        self._dropout = _DropoutSeed(name, dropout)

    def run(self, *wire: Tensor) -> DitWire:
        """hidden_BFHWD -> hidden_BFHWD."""
        dit, ready = DitWire(*wire), None
        if self.reuse is not None:
            attention = self.inner.cross_attn
            ready = self.reuse.made(
                dit.seed, attention.source_makers, lambda: attention.keys_and_values(dit.text_BLD, None)
            )
        given = (dit.hidden_BFHWD, dit.modulation_BT6D, dit.text_BLD)
        hidden = self._dropout.call(self._run_block, dit.seed, *given, *(() if ready is None else (ready,)))
        return dit._replace(hidden_BFHWD=hidden)


class DitHeadLayer(PipelineLayer):
    """Hidden state to velocity."""

    inner: WanHead

    def run(self, *wire: Tensor) -> Tensor:
        """DitWire -> velocity_BCFHW, float32."""
        dit = DitWire(*wire)
        return self.inner(dit.hidden_BFHWD, dit.time_BTD)
