import re

import pytest

from models.wan.preflight import preflight
from utils.lora_targets import linear_modules


@pytest.mark.parametrize(("keys", "num_blocks"), [("ti2v5b_keys", 30), ("a14b_i2v_keys", 40)])
def test_linear_layers_of_the_published_models_are_found(keys, num_blocks, published_rows):
    shapes = {row[0]: tuple(map(int, row[1].split("x"))) for row in published_rows(keys)}
    linears = linear_modules(shapes)
    assert len(linears) == 10 * num_blocks
    paths = {name.split(".", 2)[2] for name in linears}
    attention = {f"{kind}.{one}" for kind in ("self_attn", "cross_attn") for one in "qkvo"}
    assert paths == attention | {"ffn.0", "ffn.2"}


def problems(make_config, ckpt, mode="dit_lora", **sections):
    sections["model"] = {"ckpt_path": str(ckpt)} | sections.get("model", {})
    return preflight(make_config(mode, **sections))


def test_a_fitting_configuration_has_no_problems(make_config, tiny_ti2v, tiny_t2v):
    assert problems(make_config, tiny_ti2v) == []
    assert problems(make_config, tiny_ti2v, "encoder_ft", model={"text_train_blocks": 3}) == []
    assert problems(make_config, tiny_t2v, model={"expert": "low_noise", "max_t": 0.5}) == []


@pytest.mark.parametrize(
    ("sections", "key", "reason"),
    [
        ({"adapter": {"train_blocks_range": (2, 29)}}, "adapter", r"blocks are 0 .. 3"),
        ({"adapter": {"include": ("cross_attn.x",)}}, "adapter", r"cross_attn\.x"),
    ],
)
def test_an_adapter_that_does_not_fit_the_checkpoint_is_a_problem(
    make_config, tiny_ti2v, sections, key, reason
):
    (problem,) = problems(make_config, tiny_ti2v, **sections)
    assert problem.key == key
    assert re.search(reason, problem.reason)


def test_more_trained_blocks_than_there_are_is_a_problem(make_config, tiny_ti2v):
    (problem,) = problems(make_config, tiny_ti2v, "encoder_ft", model={"text_train_blocks": 99})
    assert problem.key == "model.text_train_blocks" and "has 3 blocks" in problem.reason


@pytest.mark.parametrize("mode", ["dit_lora", "encoder_ft"])
def test_one_block_of_the_dit_has_to_stay(make_config, tiny_ti2v, mode):
    (problem,) = problems(make_config, tiny_ti2v, mode, blocks_to_swap=4)
    assert problem.key == "blocks_to_swap" and "4 blocks at most 3" in problem.reason and "3" in problem.fix
    assert problems(make_config, tiny_ti2v, mode, blocks_to_swap=3) == []


def test_a_noise_range_of_the_other_expert_is_a_problem(make_config, tiny_t2v):
    (problem,) = problems(make_config, tiny_t2v, model={"expert": "high_noise", "max_t": 0.5})
    assert problem.key == "model.min_t" and "0.875" in problem.reason


@pytest.mark.parametrize(
    ("variant", "why"),
    [
        ("t2v-a14b", "t2v-a14b is a text-to-video model, which takes no first frame"),
        ("i2v-a14b", "i2v-a14b sees the first frame of every clip in channels of its own"),
    ],
)
@pytest.mark.parametrize("mode", ["dit_lora", "encoder_ft"])
def test_a_clean_first_frame_is_for_the_5b_alone(make_config, mode, variant, why, request):
    tiny = request.getfixturevalue({"t2v-a14b": "tiny_t2v", "i2v-a14b": "tiny_i2v"}[variant])
    model = {"expert": "low_noise", "first_frame_prob": 0.25}
    (problem,) = problems(make_config, tiny, mode, model=model)
    assert str(problem) == (
        f"model.first_frame_prob: is 0.25, which is for ti2v-5b only; {why} -> take it out"
    )
    assert problems(make_config, tiny, mode, model=model | {"first_frame_prob": 0.0}) == []
    ti2v = request.getfixturevalue("tiny_ti2v")
    assert problems(make_config, ti2v, mode, model={"first_frame_prob": 0.25}) == []


def test_everything_is_reported_at_once(make_config, tiny_ti2v, tiny_t2v):
    found = problems(
        make_config,
        tiny_ti2v,
        model={"vae_path": str(tiny_t2v / "Wan2.1_VAE.pth")},
        adapter={"train_blocks_range": (2, 29)},
    )
    assert [problem.key for problem in found] == ["model.vae_path", "adapter"]
