import csv
import gzip
from pathlib import Path

import pytest

from models.wan.component_shapes import (
    Umt5Sizes,
    VaeSizes,
    expected_umt5_shapes,
    expected_vae_shapes,
    text_encoder_sizes,
    vae_kind,
    vae_sizes,
)
from utils.errors import UserError

KEYS = Path(__file__).resolve().parents[2] / "assets" / "keys"
SMALL = Umt5Sizes(vocab_size=40, d_model=8, num_heads=2, d_kv=4, d_ff=16, num_layers=3, num_buckets=32)


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    with gzip.open(KEYS / f"{name}.csv.gz", "rt", encoding="utf-8") as file:
        return {row[0]: tuple(map(int, row[2].split("x"))) for row in list(csv.reader(file))[1:]}


def test_published_umt5_is_understood_whole():
    shapes = published_shapes("umt5_xxl_keys")
    sizes = text_encoder_sizes(shapes)
    assert sizes == Umt5Sizes(256384, 4096, 64, 64, 10240, 24, 32)
    assert expected_umt5_shapes(sizes) == shapes


@pytest.mark.parametrize(
    ("keys", "sizes"),
    [("wan21_vae_keys", VaeSizes("2.1", 96, 96)), ("wan22_vae_keys", VaeSizes("2.2", 160, 256))],
)
def test_published_vaes_are_understood_whole_and_in_order(keys, sizes):
    shapes = published_shapes(keys)
    assert vae_sizes(shapes) == sizes
    assert list(expected_vae_shapes(sizes).items()) == list(shapes.items())


@pytest.mark.parametrize("sizes", [VaeSizes("2.1", 8, 8), VaeSizes("2.2", 8, 16)])
def test_sizes_of_a_narrow_vae_are_read_back(sizes):
    assert vae_sizes(expected_vae_shapes(sizes)) == sizes


def test_heads_wider_or_narrower_than_the_model_are_read_back():
    sizes = Umt5Sizes(vocab_size=40, d_model=8, num_heads=3, d_kv=4, d_ff=16, num_layers=2, num_buckets=32)
    assert text_encoder_sizes(expected_umt5_shapes(sizes)) == sizes


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blocks.1.attn.k.weight", (8, 9), r"blocks\.1\.attn\.k\.weight is \[8, 9\] instead of \[8, 8\]"),
        ("blocks.2.norm2.weight", None, r"blocks\.2\.norm2\.weight is missing"),
        ("token_embedding.weight", None, r"token_embedding\.weight is missing"),
        ("lm_head.weight", (40, 8), r"lm_head\.weight is not one of its tensors"),
        ("blocks.0.attn.q.weight", (7, 8), "do not split into 2 heads"),
        ("token_embedding.weight", (40,), "2 dimensions"),
    ],
)
def test_umt5_tensors_that_do_not_belong_together_are_named(name, shape, message):
    shapes = expected_umt5_shapes(SMALL)
    if shape is None:
        del shapes[name]
    else:
        shapes[name] = shape
    with pytest.raises(UserError, match=message):
        text_encoder_sizes(shapes)


def test_a_vae_with_another_number_of_latent_channels_is_neither_kind():
    shapes = expected_vae_shapes(VaeSizes("2.1", 8, 8)) | {"conv2.weight": (4, 4, 1, 1, 1)}
    with pytest.raises(UserError, match="4 latent channels instead of 16"):
        vae_kind(shapes)


def test_a_vae_with_a_wrong_tensor_is_refused():
    shapes = expected_vae_shapes(VaeSizes("2.2", 8, 16)) | {"decoder.conv1.bias": (3,)}
    with pytest.raises(UserError, match=r"decoder\.conv1\.bias is \[3\] instead of \[64\]"):
        vae_sizes(shapes)
