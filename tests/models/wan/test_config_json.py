"""`config.json` of a DiT: the official one as it stands, that of diffusers under the official keys."""

import json

import pytest

from models.wan.arch import PUBLISHED, expected_shapes, load_arch
from models.wan.config_json import is_diffusers, read_config_json
from tests.helpers.layouts import as_diffusers_config
from utils.errors import UserError


@pytest.mark.parametrize("variant", PUBLISHED)
def test_both_forms_say_the_same_of_every_published_model(tmp_path, variant):
    arch, path = PUBLISHED[variant], tmp_path / "config.json"
    shapes = expected_shapes(arch)
    for values in (arch.to_config_json(), as_diffusers_config(arch)):
        path.write_text(json.dumps(values))
        assert load_arch(path, shapes) == arch
    assert load_arch(tmp_path / "none.json", shapes) == arch  # published sizes need none


def test_sizes_that_are_not_published_need_a_config_json(tmp_path):
    shapes = expected_shapes(PUBLISHED["ti2v-5b"])
    wrong = shapes | {"blocks.3.ffn.0.bias": (7,)}
    with pytest.raises(UserError, match=r"not those of ti2v-5b: blocks\.3\.ffn\.0\.bias is \[7\]"):
        load_arch(tmp_path / "config.json", wrong)
    narrow = shapes | {"patch_embedding.weight": (64, 48, 1, 2, 2)}
    with pytest.raises(UserError, match=r"config\.json: missing, and the sizes .*how many heads"):
        load_arch(tmp_path / "config.json", narrow)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 20},
            "in_channels 20 is no Wan 2.2",
        ),
        ({"num_attention_heads": 2, "added_kv_proj_dim": 5120}, "Wan 2.1 image-to-video model"),
    ],
)
def test_other_models_of_diffusers_are_refused(tmp_path, values, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        read_config_json(path)


def test_what_is_no_configuration_is_told_apart(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        read_config_json(path)
    path.write_text('["num_attention_heads"]')
    assert read_config_json(path) == ["num_attention_heads"] and not is_diffusers(["num_attention_heads"])
    with pytest.raises(UserError, match="has no model_type"):
        load_arch(path, {})
    with pytest.raises(FileNotFoundError):
        read_config_json(tmp_path / "none.json")
