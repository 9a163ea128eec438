"""The DiT under official names, whatever the layout, and its sizes from what lies beside it."""

import json

import pytest

from models.wan.arch import PUBLISHED, WanArch, expected_shapes
from models.wan.names import dit_to_diffusers
from models.wan.probes.base import arch_of, open_official
from tests.helpers.layouts import as_diffusers_config
from utils.errors import UserError
from utils.sparse_weights import write_sparse_safetensors

ARCH = WanArch("ti2v", 32, 64, 16, 48, 48, 4, 2, 512, 1e-6, 24)
SHAPES = expected_shapes(ARCH)
LAYOUTS = {
    "official": str,
    "comfyui": "model.diffusion_model.{}".format,
    "older comfyui": "diffusion_model.{}".format,
    "diffusers": dit_to_diffusers,
}


def write(path, name=str, more=None):
    write_sparse_safetensors(path, {name(key): shape for key, shape in SHAPES.items()} | (more or {}))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_shown_under_official_names(tmp_path, layout):
    source = open_official(write(tmp_path / "x.safetensors", LAYOUTS[layout], {"vae.conv1.weight": (1, 1)}))
    assert source.shapes == SHAPES
    assert source.get("blocks.1.cross_attn.k.weight").shape == (32, 32)


def test_what_is_no_dit_is_refused_and_strays_are_left_out(tmp_path):
    write_sparse_safetensors(
        tmp_path / "other.safetensors", {f"model.layers.{index}.w": (1,) for index in range(9)}
    )
    with pytest.raises(UserError, match="is not a DiT of Wan 2.2: .*a language model.*give Wan 2.2's DiT"):
        open_official(tmp_path / "other.safetensors")
    stray = {dit_to_diffusers("blocks.0.cross_attn.k.weight"): (32, 32)}
    assert open_official(write(tmp_path / "stray.safetensors", str, stray)).shapes == SHAPES


def test_sizes_come_from_config_json_or_are_the_published_ones(tmp_path):
    path = write(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="how many heads"):
        arch_of(path, open_official(path))
    (tmp_path / "config.json").write_text(json.dumps(ARCH.to_config_json()))
    assert arch_of(path, open_official(path)) == ARCH
    (tmp_path / "config.json").write_text(json.dumps(as_diffusers_config(ARCH)))
    assert arch_of(path, open_official(path)) == ARCH
    (tmp_path / "config.json").write_text(
        '{"_class_name": "WanTransformer3DModel", "num_attention_heads": 2}'
    )
    with pytest.raises(UserError, match="has no model_type, dim"):
        arch_of(path, open_official(path))
    (tmp_path / "config.json").write_text('{"model_type": "umt5", "d_model": 64}')
    with pytest.raises(UserError, match="how many heads"):  # an encoder's, of a folder of single files
        arch_of(path, open_official(path))
    published = tmp_path / "published"
    published.mkdir()
    large = published / "wan.safetensors"
    write_sparse_safetensors(large, expected_shapes(PUBLISHED["t2v-a14b"]))
    assert arch_of(large, open_official(large)) == PUBLISHED["t2v-a14b"]
