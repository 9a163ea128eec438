import pytest

from models.wan.probes.target_list import choose_targets, parse_blocks, target_file_text, target_remarks
from tests.helpers.weight_files import dit
from utils.errors import UserError

SHAPES = dit("ti2v-5b")


@pytest.mark.parametrize(
    ("text", "blocks"), [("3", [3]), ("2-4", [2, 3, 4]), ("7, 0-1,1", [0, 1, 7]), ("5-5", [5])]
)
def test_blocks(text, blocks):
    assert parse_blocks(text) == blocks


@pytest.mark.parametrize("text", ["", "-", "3-", "-3", "4-2", "a", "1,,2", "1-2-3", "99999", "1.5"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(UserError, match="--blocks"):
        parse_blocks(text)


def test_targets_are_linear_layers_in_model_order():
    assert choose_targets(SHAPES, ["ffn.2", "cross_attn.v"], [1, 0]) == [
        "blocks.0.cross_attn.v",
        "blocks.0.ffn.2",
        "blocks.1.cross_attn.v",
        "blocks.1.ffn.2",
    ]
    assert len(choose_targets(SHAPES, ["*"], None)) == 30 * 10


@pytest.mark.parametrize(
    "pattern", ["norm3", "cross_attn.norm_k", "modulation", "head.head", "blocks.0.ffn.0"]
)
def test_what_is_no_linear_layer_of_a_block_is_no_target(pattern):
    with pytest.raises(
        UserError, match=r"--targets: pattern .* matches no module; the modules are .*cross_attn\.k"
    ):
        choose_targets(SHAPES, [pattern], None)


def test_the_file_says_what_training_will_ask_for():
    assert target_remarks(["blocks.0.cross_attn.k", "blocks.0.cross_attn.v"]) == []
    assert len(target_remarks(["blocks.0.ffn.0"])) == 1
    assert len(target_remarks(["blocks.0.self_attn.q"])) == 2
    text = target_file_text(["blocks.4.cross_attn.k", "blocks.5.cross_attn.k"], "x.safetensors")
    assert text.splitlines() == [
        "# 2 LoRA targets that exist in x.safetensors",
        "# cross_attn.k in blocks 4-5",
        "blocks.4.cross_attn.k",
        "blocks.5.cross_attn.k",
    ]
