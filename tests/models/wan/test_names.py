import csv
import gzip
from pathlib import Path

import pytest

from models.wan.names import dit_to_diffusers, dit_to_official, umt5_to_hf, umt5_to_official, vae_to_diffusers
from utils.errors import UserError

KEYS = Path(__file__).resolve().parents[2] / "assets" / "keys"


def published(name: str) -> list[list[str]]:
    """Rows of a published key list, without its head."""
    with gzip.open(KEYS / f"{name}.csv.gz", "rt", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def test_umt5_names_are_the_published_ones_in_both_directions():
    rows = published("umt5_xxl_keys")
    assert len(rows) == 242
    for official, hf, *_ in rows:
        assert umt5_to_hf(official) == hf
        assert umt5_to_official(hf) == official


def test_umt5_token_table_is_known_under_both_its_hf_names():
    assert umt5_to_official("encoder.embed_tokens.weight") == "token_embedding.weight"
    assert umt5_to_official("shared.weight") == "token_embedding.weight"


@pytest.mark.parametrize(
    ("kind", "keys", "count"), [("2.1", "wan21_vae_keys", 194), ("2.2", "wan22_vae_keys", 196)]
)
def test_vae_names_are_the_published_ones(kind, keys, count):
    rows = published(keys)
    assert len(rows) == count
    assert vae_to_diffusers([row[0] for row in rows], kind) == {row[0]: row[1] for row in rows}


def test_vae_levels_of_another_depth_are_found_from_the_names():
    # Two levels of one residual block plus one: 0, 1, resample 2 | 3, 4.
    names = [f"decoder.upsamples.{index}.residual.0.gamma" for index in (0, 1, 3, 4)] + [
        "decoder.upsamples.2.resample.1.bias"
    ]
    assert list(vae_to_diffusers(names, "2.1").values()) == [
        "decoder.up_blocks.0.resnets.0.norm1.gamma",
        "decoder.up_blocks.0.resnets.1.norm1.gamma",
        "decoder.up_blocks.1.resnets.0.norm1.gamma",
        "decoder.up_blocks.1.resnets.1.norm1.gamma",
        "decoder.up_blocks.0.upsamplers.0.resample.1.bias",
    ]


@pytest.mark.parametrize("keys", ["ti2v5b_keys", "a14b_t2v_keys", "a14b_i2v_keys"])
def test_dit_names_are_those_of_diffusers_own_converter(keys):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    names = [row[0] for row in published(keys)]
    # The converter looks at nothing but names, so each "tensor" can be the official name itself.
    theirs = convert_wan_transformer_to_diffusers({name: name for name in names})
    assert {official: diffusers for diffusers, official in theirs.items()} == {
        name: dit_to_diffusers(name) for name in names
    }
    assert all(dit_to_official(diffusers) == official for diffusers, official in theirs.items())


def test_dit_modules_are_renamed_like_their_tensors():
    assert dit_to_diffusers("blocks.39.cross_attn.o") == "blocks.39.attn2.to_out.0"
    assert dit_to_official("blocks.39.attn2.to_out.0") == "blocks.39.cross_attn.o"


def test_dit_norms_are_numbered_differently():
    assert dit_to_diffusers("blocks.3.norm3.bias") == "blocks.3.norm2.bias"
    assert dit_to_official("blocks.3.norm3") == "blocks.3.norm2"


@pytest.mark.parametrize(
    ("rename", "name"),
    [
        (umt5_to_hf, "blocks.0.attn.z.weight"),
        (umt5_to_hf, "shared.weight"),
        (umt5_to_official, "decoder.block.0.layer.0.layer_norm.weight"),
        (umt5_to_official, "blocks.0.attn.q.weight"),
        (dit_to_diffusers, "blocks.0.attn1.to_q.weight"),
        (dit_to_diffusers, "blocks.0.cross_attn.k_img.weight"),
        (dit_to_diffusers, "blocks.x.ffn.0.weight"),
        (dit_to_official, "blocks.0.self_attn.q.weight"),
        (
            lambda name: vae_to_diffusers([name], "2.1"),
            "encoder.downsamples.0.downsamples.0.residual.0.gamma",
        ),
        (lambda name: vae_to_diffusers([name], "2.2"), "encoder.downsamples.0.residual.0.gamma"),
        (lambda name: vae_to_diffusers([name], "2.1"), "encoder.middle.1.residual.0.gamma"),
        (lambda name: vae_to_diffusers([name], "2.1"), "conv1.scale"),
        (lambda name: vae_to_diffusers([name], "2.1"), "decoder.upsamples.0.residual.9.weight"),
    ],
)
def test_an_unknown_name_is_refused_by_name(rename, name):
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        rename(name)
