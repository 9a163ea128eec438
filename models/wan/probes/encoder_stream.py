"""Two UMT5 encoders, base and tuned, run over the same prompts block by block.

Only one block of each is in memory at a time, read from the files as it is needed, so that two XXL encoders can be
compared where one does not fit. The states of all prompts are kept instead. The blocks are those that training and
caching run (`models/wan/text_encoder.py`), so the states are the whole encoder's, bit for bit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.wan.checkpoint import (
    TensorSource,
    Umt5Sizes,
    open_text_encoder,
    open_text_encoder_part,
    text_encoder_sizes,
)
from models.wan.names import umt5_to_official
from models.wan.text_encoder import (
    build_umt5_block,
    build_umt5_norm,
    pad_token_ids,
    padding_mask,
    umt5_config,
)
from utils.errors import UserError
from utils.overlay_source import OverlaySource
from utils.safetensors_header import FLOAT_DTYPES

TABLE = "token_embedding.weight"
_MAX_BATCH = 16
_MAX_BATCH_TOKENS = 2048

States = list[Tensor]


@dataclass(frozen=True)
class EncoderPair:
    """Base and tuned encoder, opened by their headers, of one size; `is_partial`: the tuned file has only what trained."""

    base: TensorSource
    tuned: TensorSource
    sizes: Umt5Sizes
    is_partial: bool


@dataclass(frozen=True)
class LayerStates:
    """All prompts' states behind one layer, in the order of the prompts, each [L, D] at its true length.

    Attributes:
        layer: `tokens` (the table), `block 0` and so on, or `norm`.
        weight_change: ||W_tuned - W_base||_F / ||W_base||_F over all weights of the layer; of the table only those rows
            that the prompts use.
        base, tuned: the states; one and the same tensor where nothing has changed yet.
    """

    layer: str
    weight_change: float
    base: States
    tuned: States


def open_encoder_pair(base: Path, tuned: Path) -> EncoderPair:
    """Open both by their headers. A tuned file of only the trained tensors is laid over the base.

    Raises:
        UserError: a file is missing, damaged, quantised or no UMT5 encoder, or the two are of different sizes.
    """
    base_source = _checked(base, open_text_encoder(base))
    sizes = _sizes(base, base_source)
    part = _checked(tuned, open_text_encoder_part(tuned))
    if not part.shapes.keys() & base_source.shapes.keys():
        raise UserError(f"{tuned}: holds no tensor of a UMT5 encoder; give the encoder that was tuned")
    is_partial = not base_source.shapes.keys() <= part.shapes.keys()
    if is_partial and not _looks_whole(part):
        return EncoderPair(base_source, OverlaySource(base_source, part), sizes, True)
    found = _sizes(tuned, part)
    if found != sizes:
        raise UserError(
            f"{tuned}: {_describe(found)}, but {base} {_describe(sizes)}; give the encoder that its training started "
            "from as --base_text_encoder"
        )
    return EncoderPair(base_source, part, sizes, False)


def stream_states(
    pair: EncoderPair,
    token_ids: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
    on_layer: Callable[[LayerStates], None],
) -> tuple[States, States]:
    """Run both encoders over all prompts; returns the states behind the final norm, base and tuned, on the CPU.

    Args:
        pair: the two encoders.
        token_ids: of each prompt, with the end token, at least one each.
        dtype: to compute in; the weights are converted.
        device: where.
        on_layer: called behind every layer.

    Raises:
        UserError: a weight cannot be read, or the states are not finite.
    """
    runner = _Runner(pair, token_ids, dtype, device)
    with torch.no_grad():
        layer = runner.embed()
        on_layer(layer)
        for index in range(pair.sizes.num_layers):
            layer = runner.block(index)
            on_layer(layer)
        layer = runner.norm()
        on_layer(layer)
    for path, states in ((pair.base.files[0], layer.base), (pair.tuned.files[0], layer.tuned)):
        if not all(bool(torch.isfinite(rows).all()) for rows in states):
            raise UserError(
                f"{path}: gives text states that are not finite, so it is damaged or its training diverged; use another "
                "save, or --dtype float32"
            )
    return layer.base, layer.tuned


@dataclass
class _Batch:
    """Prompts of similar length, padded to the longest, and how far they have come. `tuned` is `base` until they part."""

    prompts: list[int]
    ids_BL: Tensor
    lens_B: Tensor
    mask: Tensor
    base: Tensor
    tuned: Tensor


class _Runner:
    def __init__(
        self, pair: EncoderPair, token_ids: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._pair = pair
        self._dtype = dtype
        self._device = device
        self._config = umt5_config(pair.sizes)
        self._num_prompts = len(token_ids)
        empty = torch.empty(0)
        self._batches = []
        for prompts in _batched(token_ids):
            ids_BL, lens_B = pad_token_ids([token_ids[prompt] for prompt in prompts])
            mask = padding_mask(lens_B, ids_BL.shape[1], dtype).to(device)
            self._batches.append(_Batch(prompts, ids_BL, lens_B, mask, empty, empty))

    def embed(self) -> LayerStates:
        used = sorted({int(token) for batch in self._batches for token in batch.ids_BL.unique()})
        if used[-1] >= self._pair.sizes.vocab_size:
            raise UserError(
                f"{self._pair.base.files[0]}: its token table has {self._pair.sizes.vocab_size} rows, but the tokenizer "
                f"gives the token {used[-1]}; use the tokenizer of the same checkpoint"
            )
        place = torch.zeros(self._pair.sizes.vocab_size, dtype=torch.int64)
        place[used] = torch.arange(len(used))
        base, tuned = (self._rows(source, used) for source in (self._pair.base, self._pair.tuned))
        change = _change({TABLE: base}, {TABLE: tuned})
        for batch in self._batches:
            index = place[batch.ids_BL].to(self._device)
            batch.base = nn.functional.embedding(index, base)
            batch.tuned = batch.base if not change else nn.functional.embedding(index, tuned)
            _join(batch)
        return self._seen("tokens", change)

    def block(self, index: int) -> LayerStates:
        module = self._empty(lambda: build_umt5_block(self._config, index))
        return self._run(f"block {index}", module, f"encoder.block.{index}", with_mask=True)

    def norm(self) -> LayerStates:
        module = self._empty(lambda: build_umt5_norm(self._config))
        return self._run("norm", module, "encoder.final_layer_norm", with_mask=False)

    def _run(self, layer: str, module: nn.Module, prefix: str, *, with_mask: bool) -> LayerStates:
        weights = [self._read(source, module, prefix) for source in (self._pair.base, self._pair.tuned)]
        change = _change(*weights)
        before = [(batch.base, batch.tuned) for batch in self._batches]
        for weights_of, side in zip(weights, ("base", "tuned"), strict=True):
            module.load_state_dict(weights_of, strict=True, assign=True)
            for batch, (base, tuned) in zip(self._batches, before, strict=True):
                if side == "tuned" and tuned is base and not change:
                    batch.tuned = batch.base  # the same states through the same weights
                    continue
                arguments = (batch.mask,) if with_mask else ()
                setattr(batch, side, module(base if side == "base" else tuned, *arguments))
                if side == "tuned":
                    _join(batch)
        return self._seen(layer, change)

    def _seen(self, layer: str, change: float) -> LayerStates:
        base: States = [torch.empty(0)] * self._num_prompts
        tuned = list(base)
        for batch in self._batches:
            for row, (prompt, length) in enumerate(zip(batch.prompts, batch.lens_B.tolist(), strict=True)):
                base[prompt] = batch.base[row, :length].cpu()
                same = batch.tuned is batch.base
                tuned[prompt] = base[prompt] if same else batch.tuned[row, :length].cpu()
        return LayerStates(layer, change, base, tuned)

    def _read(self, source: TensorSource, module: nn.Module, prefix: str) -> dict[str, Tensor]:
        weights = {
            name: source.get(umt5_to_official(f"{prefix}.{name}")).to(
                device=self._device, dtype=self._dtype, copy=True
            )
            for name, _ in module.named_parameters()
        }
        source.release()  # else the pages of both files stay, two more blocks
        return weights

    def _rows(self, source: TensorSource, used: Sequence[int]) -> Tensor:
        rows = torch.cat([source.rows(TABLE, token, token + 1) for token in used])
        source.release()
        return rows.to(device=self._device, dtype=self._dtype)

    def _empty(self, build: Callable[[], nn.Module]) -> nn.Module:
        with torch.device("meta"):
            return build().eval().requires_grad_(False)


def _batched(token_ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of prompts, by length, in batches that padding does not blow up."""
    batch: list[int] = []
    for prompt in sorted(range(len(token_ids)), key=lambda prompt: (len(token_ids[prompt]), prompt)):
        if batch and (
            len(batch) == _MAX_BATCH or (len(batch) + 1) * len(token_ids[prompt]) > _MAX_BATCH_TOKENS
        ):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def _join(batch: _Batch) -> None:
    """Equal states are made one, so that what follows runs once where the weights are equal too."""
    if batch.tuned is not batch.base and torch.equal(batch.base, batch.tuned):
        batch.tuned = batch.base


def _change(base: dict[str, Tensor], tuned: dict[str, Tensor]) -> float:
    """||difference||_F / ||base||_F over all tensors; exactly 0 where none differs."""
    if all(torch.equal(weight, tuned[name]) for name, weight in base.items()):
        return 0.0
    moved = sum(
        float((tuned[name].float() - weight.float()).double().square().sum()) for name, weight in base.items()
    )
    size = sum(float(weight.double().square().sum()) for weight in base.values())
    return float("inf") if not size else (moved / size) ** 0.5


def _checked(path: Path, source: TensorSource) -> TensorSource:
    bad = next((name for name, dtype in source.dtypes.items() if dtype not in FLOAT_DTYPES), None)
    if bad is not None:
        raise UserError(
            f"{path}: {bad} is stored as {source.dtypes[bad]}, so the file is quantised; give the bf16, fp16 or float32 file"
        )
    return source


def _sizes(path: Path, source: TensorSource) -> Umt5Sizes:
    try:
        return text_encoder_sizes(source.shapes)
    except UserError as error:
        raise UserError(f"{path}: is no UMT5 encoder ({error})") from None


def _looks_whole(source: TensorSource) -> bool:
    """Whether it has all tensors of an encoder, if perhaps of another size than the base."""
    try:
        text_encoder_sizes(source.shapes)
    except UserError:
        return False
    return True


def _describe(sizes: Umt5Sizes) -> str:
    return f"has {sizes.num_layers} blocks of width {sizes.d_model} and {sizes.vocab_size} tokens"
