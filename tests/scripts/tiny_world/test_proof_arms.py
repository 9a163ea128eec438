import tomllib
from math import prod
from pathlib import Path

import pytest

from scripts.tiny_world.dit_training import ARCH
from scripts.tiny_world.proof_arms import BASE, Arm, Plan, Recipe, arms_of, write_configs
from scripts.tiny_world.proof_data import Amounts, write_data
from utils.config.load import load_config

ARMS = arms_of(Recipe())


def parameters(arm: Arm) -> int:
    """Of the adapter of one expert, counted from the configuration's own words."""
    adapter = tomllib.loads("\n".join((*arm.adapter, *arm.extra)))
    first, last = adapter.get("train_blocks_range", [0, ARCH.num_layers - 1])
    blocks = adapter["adapter"]["self_attn_approval"]["blocks"] if arm.extra else range(first, last + 1)
    projections = 4 if arm.extra else 2
    return prod((len(blocks), projections, adapter["rank"], 2 * ARCH.dim))


def test_every_adapter_has_as_many_parameters():
    counts = {arm.name: parameters(arm) for arm in ARMS if arm.kind == "adapter"}
    assert len(counts) == 8
    assert set(counts.values()) == {12 * 4 * 2 * 128}


def test_every_arm_stands_behind_what_it_starts_from_and_controls_have_as_many_steps():
    names = [arm.name for arm in ARMS]
    assert len(set(names)) == len(names)
    for arm in ARMS:
        assert arm.name == BASE or arm.start
        assert all(names.index(needed) < names.index(arm.name) for needed in arm.needs)
    by_name = {arm.name: arm for arm in ARMS}
    for name in ("gentle", "damaging"):
        # Two experts: an adapter each.
        assert by_name[f"{name}_more"].steps == 2 * by_name[f"{name}_lora"].steps
        assert by_name[f"{name}_more"].data == by_name[f"{name}_lora"].data
    assert by_name["gentle"].lr < by_name["damaging"].lr
    assert by_name["gentle"].steps == by_name["damaging"].steps


@pytest.mark.parametrize("arm", ARMS[1:], ids=lambda arm: arm.name)
def test_every_configuration_is_accepted_and_says_what_the_arm_says(arm, tmp_path):
    write_data(tmp_path / "data" / "s1", 1, Amounts(thing=1, combination=1, known=1))
    encoder = tmp_path / "encoder.safetensors"
    init = tmp_path / "solved" if arm.init else None
    path = write_configs(arm, 1, tmp_path, Path("ckpt"), encoder, 8, init)
    config = load_config(path).train
    if init is not None:
        assert config.adapter and config.adapter.high_noise and config.adapter.low_noise
        assert config.adapter.high_noise.init_from_existing == str(init / "high_noise")
        assert config.adapter.low_noise.init_from_existing == str(init / "low_noise")
    assert config.max_steps == arm.steps
    assert config.optimizer.lr == arm.lr
    assert config.seed == 1
    assert config.model.expert == "both"
    assert config.model.llm_path == str(encoder)
    assert config.model.train_text_encoder == (arm.kind == "encoder")
    assert (config.adapter is None) == (arm.kind == "encoder")
    used = {Path(one.path).name for one in load_config(path).dataset.directory}
    assert used == set(arm.data)


def test_solved_arms_have_the_rank_of_trained_ones_and_more():
    ranks = {arm.name: arm.flags[arm.flags.index("--rank") + 1] for arm in ARMS if arm.kind == "solved"}
    assert ranks["damaging_closed"] == ranks["gentle_closed"] == "4"
    assert set(ranks.values()) == {"4", "16"}
    (then,) = (arm for arm in ARMS if arm.init)
    assert then.init == "damaging_closed" and then.needs == {"base", "damaging", "damaging_closed"}


def test_a_plan_can_leave_it_at_some_arms():
    plan = Plan(arms=("base", "gentle"))
    assert [arm.name for arm in plan.chosen()] == ["base", "gentle"]
    assert len(Plan().chosen()) == 18
