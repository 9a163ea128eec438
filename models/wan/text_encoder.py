"""UMT5, Wan's text encoder, through `transformers` (which nothing else imports), and its tokenizer.

Captions are cleaned as the official code does, tokenised with the end token, cut at 512, encoded at their true length
and only later padded with zeros for the DiT.
"""

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ftfy
import torch
from torch import Tensor, nn

from models.wan.checkpoint import TensorSource, Umt5Sizes, open_text_encoder, text_encoder_sizes
from models.wan.names import umt5_to_official
from models.wan.tokenizer_place import read_spiece
from utils.errors import UserError

MAX_TEXT_TOKENS = 512
_LAYER_NORM_EPS = 1e-6
_MAX_DISTANCE = 128


def clean_caption(caption: str) -> str:
    """Repair mis-decoded text and HTML entities, and make every run of white space one space (official "whitespace")."""
    text = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return re.sub(r"\s+", " ", text.strip()).strip()


class WanTokenizer:
    """The tokenizer of google/umt5-xxl, from a local directory or from inside an encoder's file."""

    def __init__(self, directory: Path) -> None:
        """Load it; `directory` may also be a `.safetensors` file that holds `spiece_model`.

        Raises:
            UserError: no tokenizer is there, or it cannot be loaded.
        """
        from transformers import AutoTokenizer

        try:
            if directory.is_file():
                self._tokenizer = _tokenizer_of_spiece(read_spiece(directory))
            else:
                self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except UserError:
            raise
        except Exception as error:  # the library raises many types for one cause: files absent or damaged
            raise UserError(
                f"{directory}: no tokenizer can be loaded from it ({type(error).__name__}: "
                f"{' '.join(str(error).split())}); it should hold "
                "the files of google/umt5-xxl (tokenizer.json, tokenizer_config.json, spiece.model)"
            ) from error

    def __call__(self, caption: str) -> list[int]:
        """Token ids of one caption: cleaned, ended by the end token, at most 512 of them."""
        ids = self._tokenizer(clean_caption(caption), truncation=True, max_length=MAX_TEXT_TOKENS)[
            "input_ids"
        ]
        return list(ids)

    def count(self, caption: str) -> int:
        """Number of tokens of the whole caption, before it is cut at 512."""
        return len(self._whole(caption))

    def cut_off(self, caption: str) -> str:
        """The end of a caption that is cut off, which Wan does not see; empty where nothing is."""
        ids = self._whole(caption)
        if len(ids) <= MAX_TEXT_TOKENS:
            return ""
        # The end token stays, in the last of the 512 places.
        return str(self._tokenizer.decode(ids[MAX_TEXT_TOKENS - 1 : -1]))

    def _whole(self, caption: str) -> list[int]:
        return list(self._tokenizer(clean_caption(caption), truncation=False, verbose=False)["input_ids"])


def _tokenizer_of_spiece(model: bytes) -> Any:
    """`transformers`' T5 tokenizer of a SentencePiece model, as a published `tokenizer.json` makes it.

    Without the sentinels (`<extra_id_0>`, ...), which are in no caption and not in the model.
    """
    from sentencepiece import sentencepiece_model_pb2
    from transformers import T5Tokenizer

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
    charsmap = proto.normalizer_spec.precompiled_charsmap or None
    return T5Tokenizer(
        vocab=vocabulary, _spm_precompiled_charsmap=charsmap, extra_ids=0, additional_special_tokens=[]
    )


def umt5_config(sizes: Umt5Sizes, attn_implementation: str = "sdpa", dropout: float = 0.0) -> Any:
    """A `transformers` UMT5Config of these sizes. Dropout is off unless asked: Wan was trained on clean states."""
    from transformers import UMT5Config

    config = UMT5Config(
        vocab_size=sizes.vocab_size,
        d_model=sizes.d_model,
        d_kv=sizes.d_kv,
        d_ff=sizes.d_ff,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        relative_attention_num_buckets=sizes.num_buckets,
        relative_attention_max_distance=_MAX_DISTANCE,
        dropout_rate=dropout,
        layer_norm_epsilon=_LAYER_NORM_EPS,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        tie_word_embeddings=False,
        use_cache=False,
    )
    # A block built on its own takes this from its config; without it it would fall back to eager with a warning.
    config._attn_implementation = attn_implementation
    return config


def build_umt5_block(config: Any, index: int) -> nn.Module:
    """One encoder block of `transformers`, uninitialised sizes from `config`."""
    from transformers.models.umt5.modeling_umt5 import UMT5Block

    return UMT5Block(config, layer_idx=index)


def build_umt5_norm(config: Any) -> nn.Module:
    """The norm behind the last block."""
    from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

    return UMT5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)


def padding_mask(lens_B: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [B, 1, 1, L]: 0 on tokens, the dtype's minimum on padding."""
    positions = torch.arange(length, device=lens_B.device)
    masked = positions[None, :] >= lens_B[:, None]
    mask = torch.zeros(masked.shape, dtype=dtype, device=lens_B.device)
    return mask.masked_fill(masked, torch.finfo(dtype).min)[:, None, None, :]


def pad_token_ids(token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Batch of token ids, padded with 0 to the longest: ids_BL int64, lens_B int64."""
    lens = torch.tensor([len(ids) for ids in token_ids], dtype=torch.int64)
    padded = torch.zeros(len(token_ids), int(lens.max()), dtype=torch.int64)
    for row, ids in enumerate(token_ids):
        padded[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return padded, lens


def load_umt5(
    source: TensorSource, dtype: torch.dtype, device: torch.device, attn_implementation: str = "sdpa"
) -> nn.Module:
    """The whole encoder as `transformers`' UMT5EncoderModel, frozen, in evaluation mode."""
    from transformers import UMT5EncoderModel

    config = umt5_config(text_encoder_sizes(source.shapes), attn_implementation)
    with torch.device("meta"):
        model = UMT5EncoderModel._from_config(config, attn_implementation=attn_implementation)
    tied = "encoder.embed_tokens.weight"
    state = {
        name: source.get(umt5_to_official(name)).to(device=device, dtype=dtype)
        for name in model.state_dict()
        if name != tied
    }
    state[tied] = state["shared.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def build_umt5(sizes: Umt5Sizes, dropout: float = 0.0) -> nn.Module:
    """`transformers`' UMT5EncoderModel of these sizes with the library's random weights, to be trained."""
    from transformers import UMT5EncoderModel

    return UMT5EncoderModel(umt5_config(sizes, dropout=dropout))


class TextEncoder:
    """Encodes captions for the cache."""

    def __init__(
        self,
        path: Path,
        tokenizer: WanTokenizer,
        dtype: torch.dtype,
        device: torch.device,
        attn_implementation: str,
    ) -> None:
        self._tokenizer = tokenizer
        self._device = device
        self._model = load_umt5(open_text_encoder(path), dtype, device, attn_implementation)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Iterable[Tensor]:
        """States of each caption at its true length, [L, D] on the CPU in the encoder's dtype, in order."""
        ids_BL, lens_B = pad_token_ids([self._tokenizer(caption) for caption in captions])
        mask_BL = torch.arange(ids_BL.shape[1])[None, :] < lens_B[:, None]
        states_BLD = self._model(
            input_ids=ids_BL.to(self._device), attention_mask=mask_BL.long().to(self._device)
        ).last_hidden_state
        for states_LD, length in zip(states_BLD.cpu(), lens_B.tolist(), strict=True):
            yield states_LD[:length].clone()
