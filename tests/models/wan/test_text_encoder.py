"""UMT5 against transformers' own UMT5EncoderModel, whose weights are renamed by the published list of names."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from models.wan.checkpoint import TEXT_ENCODER_FILE, TOKENIZER_DIR, open_text_encoder
from models.wan.layers import TEXT_PREFIX, Workload, text_layers
from models.wan.stages import TextWire
from models.wan.text_encoder import (
    MAX_TEXT_TOKENS,
    TextEncoder,
    WanTokenizer,
    clean_caption,
    load_umt5,
    pad_token_ids,
    padding_mask,
)
from utils.errors import UserError
from utils.layers import global_names

CPU = torch.device("cpu")
END_TOKEN = 1
CAPTIONS = (
    "a red circle moves to the right on a dark background",
    "a blue square",
    "",
    "A short video of a simple scene with soft light and a steady camera, where two shapes meet.",
)


@pytest.fixture(scope="module")
def umt5_path(tiny_ti2v):
    return tiny_ti2v / TEXT_ENCODER_FILE


@pytest.fixture(scope="module")
def tokenizer(tiny_ti2v):
    return WanTokenizer(tiny_ti2v / TOKENIZER_DIR)


@pytest.fixture(scope="module")
def build_theirs(umt5_path, published_rows):
    """transformers' model, its tensors renamed by the published list and its sizes written out."""
    official = torch.load(umt5_path, weights_only=True)
    names = {row[0]: row[1] for row in published_rows("umt5_xxl_keys")}

    def build(attention: str, dtype: torch.dtype, dropout: float = 0.0) -> UMT5EncoderModel:
        config = UMT5Config(
            vocab_size=384,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=dropout,
            attn_implementation=attention,
        )
        model = UMT5EncoderModel(config)
        state = {names[name]: tensor.float() for name, tensor in official.items()}
        outcome = model.load_state_dict(state, strict=False)
        assert outcome.unexpected_keys == []
        assert outcome.missing_keys in ([], ["encoder.embed_tokens.weight"])
        model.encoder.embed_tokens = model.shared
        assert model.config._attn_implementation == attention
        return model.to(dtype).eval()

    return build


@pytest.fixture(scope="module")
def ragged(tokenizer) -> tuple[Tensor, Tensor]:
    """Token ids [4, L] and lengths of captions of different lengths, one of them empty."""
    ids_BL, lens_B = pad_token_ids([tokenizer(caption) for caption in CAPTIONS])
    assert len(set(lens_B.tolist())) == 4
    return ids_BL, lens_B


def attention_mask(ids_BL: Tensor, lens_B: Tensor) -> Tensor:
    return (torch.arange(ids_BL.shape[1]) < lens_B[:, None]).long()


def wire_of(ids_BL: Tensor, lens_B: Tensor) -> TextWire:
    batch = len(lens_B)
    return TextWire(ids_BL, lens_B, torch.zeros(batch, 1, 1, 2, 2), torch.zeros(batch, 1), torch.tensor([0]))


def run_layers(layers: Sequence[nn.Module], wire: TextWire) -> Tensor:
    for layer in layers:
        wire = layer(wire)
    return wire.text


PRECISIONS = {
    # name: (model.dtype, optimizer.type, dtype of transformers' weights, whether it runs under autocast)
    "float32": ("float32", "adamw", torch.float32, False),
    "bfloat16": ("bfloat16", "adamw_kahan", torch.bfloat16, False),
    "float32 weights computing in bfloat16": ("bfloat16", "adamw", torch.float32, True),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_layers_are_bit_equal_to_transformers(
    precision, attention, umt5_path, build_theirs, ragged, make_config
):
    dtype_name, optimizer, theirs_dtype, autocast = PRECISIONS[precision]
    config = make_config(
        "encoder_ft",
        model={"dtype": dtype_name, "text_attn_implementation": attention, "train_token_embedding": True},
        optimizer={"type": optimizer},
    )
    specs = text_layers(config, open_text_encoder(umt5_path), Workload(1.0, 1.0))
    layers = [spec.build(CPU).train() for spec in specs]
    ours = run_layers(layers, wire_of(*ragged))

    theirs = build_theirs(attention, theirs_dtype)
    mask_BL = attention_mask(*ragged)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        states = theirs(input_ids=ragged[0], attention_mask=mask_BL).last_hidden_state
    reference = states * mask_BL.unsqueeze(-1)
    assert ours.dtype == reference.dtype
    assert torch.equal(ours, reference)

    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0)).to(ours.dtype)
    (ours * direction).sum().backward()
    (reference * direction).sum().backward()
    expected = dict(theirs.named_parameters(remove_duplicate=True))
    mine = {
        name.removeprefix(TEXT_PREFIX): parameter
        for spec, layer in zip(specs, layers, strict=True)
        for name, parameter in global_names(spec.name, layer).items()
    }
    assert mine.keys() == expected.keys()
    for name, parameter in mine.items():
        assert expected[name].grad.abs().sum() > 0, name
        assert torch.equal(parameter.grad, expected[name].grad), name


def test_the_whole_encoder_loads_from_the_official_file(umt5_path, build_theirs, ragged):
    ours = load_umt5(open_text_encoder(umt5_path), torch.float32, CPU, "eager")
    theirs = build_theirs("eager", torch.float32)
    inputs = {"input_ids": ragged[0], "attention_mask": attention_mask(*ragged)}
    with torch.no_grad():
        assert torch.equal(ours(**inputs).last_hidden_state, theirs(**inputs).last_hidden_state)
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    # The token table, a fifth of the encoder, is in memory once.
    assert ours.encoder.embed_tokens.weight.data_ptr() == ours.shared.weight.data_ptr()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_caption_is_encoded_as_if_it_were_alone(
    attention, umt5_path, tokenizer, build_theirs, relative_error
):
    encoder = TextEncoder(umt5_path, tokenizer, torch.float32, CPU, attention)
    theirs = build_theirs(attention, torch.float32)
    together = list(encoder.encode(CAPTIONS))
    assert len(together) == len(CAPTIONS)
    for caption, states_LD in zip(CAPTIONS, together, strict=True):
        ids = tokenizer(caption)
        with torch.no_grad():
            alone = theirs(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert states_LD.shape == (len(ids), 64)
        assert states_LD._base is None  # a view would keep (and write) the whole batch
        assert relative_error(states_LD, alone) <= 1e-6  # measured: at most 4e-7


def test_states_are_in_the_encoders_dtype(umt5_path, tokenizer):
    (states_LD,) = TextEncoder(umt5_path, tokenizer, torch.bfloat16, CPU, "sdpa").encode(["a red circle"])
    assert states_LD.dtype == torch.bfloat16
    assert not states_LD.requires_grad


@pytest.mark.parametrize(
    ("caption", "clean"),
    [
        ("schÃ¶ne Farben", "schöne Farben"),
        ("a â€œredâ€\x9d circle", 'a "red" circle'),
        ("a circle\u2019s edge", "a circle's edge"),
        ("red &amp;amp; blue", "red & blue"),
        (
            "red < blue &amp;amp; green",
            "red < blue & green",
        ),  # ftfy itself unescapes only where there is no "<"
        ("&lt;b&gt;square&lt;/b&gt;", "<b>square</b>"),
        ("  a \t red\r\n\n circle\u00a0\u3000here ", "a red circle here"),
        ("&nbsp;a circle&nbsp;", "a circle"),
        ("ｆｕｌｌ　width", "full width"),
        ("", ""),
        (" \n\t ", ""),
        ("a red circle", "a red circle"),
    ],
)
def test_captions_are_cleaned_as_the_official_code_does(caption, clean):
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean_caption(caption) == clean
    assert clean_caption(caption) == prompt_clean(caption)


def test_captions_are_cleaned_before_they_are_tokenised(tokenizer):
    assert tokenizer("  a red\n&quot;circle&quot; ") == tokenizer('a red "circle"')


def test_an_empty_caption_is_the_end_token_alone(tokenizer):
    assert tokenizer("") == [END_TOKEN]
    assert tokenizer.count("") == 1


def test_a_caption_ends_with_the_end_token(tokenizer):
    ids = tokenizer("a red circle")
    assert ids[-1] == END_TOKEN
    assert END_TOKEN not in ids[:-1]
    assert 0 not in ids
    assert tokenizer.count("a red circle") == len(ids)


def test_a_caption_that_is_too_long_is_cut_before_its_end_token(tokenizer):
    caption = "a red circle moves " * 300
    ids = tokenizer(caption)
    assert len(ids) == MAX_TEXT_TOKENS == 512
    assert ids[-1] == END_TOKEN
    assert END_TOKEN not in ids[:-1]
    assert tokenizer.count(caption) > 1000


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="no tokenizer can be loaded") as raised:
        WanTokenizer(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_token_ids_are_padded_with_zeros():
    ids_BL, lens_B = pad_token_ids([[5, 1], [7, 8, 9, 1], [1]])
    assert ids_BL.tolist() == [[5, 1, 0, 0], [7, 8, 9, 1], [1, 0, 0, 0]]
    assert lens_B.tolist() == [2, 4, 1]
    assert ids_BL.dtype == lens_B.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_masked_with_the_smallest_number(dtype):
    mask = padding_mask(torch.tensor([1, 3]), 3, dtype)
    smallest = torch.finfo(dtype).min
    assert mask.shape == (2, 1, 1, 3)
    assert mask[:, 0, 0].tolist() == [[0, smallest, smallest], [0, 0, 0]]
