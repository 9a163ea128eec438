"""The plan of the stages: what it adds up, what it says, and when it warns."""

from dataclasses import replace

import pytest

from utils.config.schema import ModelConfig, OptimizerConfig, TrainConfig
from utils.layers import LayerSpec
from utils.memory import LayerMemory, stage_memory
from utils.stage_plan import describe_plan, make_plan, plan_warnings, size_text

MODEL = ModelConfig(
    type="wan", ckpt_path="x", cache_text_embeddings=True, train_text_encoder=False, freeze_transformer=True
)


def config_of(stages: int, micro_batches: int, **values) -> TrainConfig:
    return TrainConfig(
        output_dir="x",
        dataset="x",
        model=MODEL,
        optimizer=OptimizerConfig(lr=1e-4),
        pipeline_stages=stages,
        gradient_accumulation_steps=micro_batches,
        **values,
    )


def never_built(device):
    raise AssertionError("planning builds nothing")


FROZEN = LayerSpec("frozen", never_built, 10.0, memory=LayerMemory(weights=100.0))
ADAPTED = LayerSpec(
    "adapted",
    never_built,
    10.0,
    trainable=True,
    recompute=1.0,
    memory=LayerMemory(weights=100.0, gradients=10.0, state=20.0, stored=7.0, rebuilt=50.0, shared=2.0),
)


def test_each_stage_is_the_sum_of_its_layers():
    config = config_of(2, 4, partition_method="manual", partition_split=(2,))
    plan = make_plan([FROZEN, FROZEN, ADAPTED, ADAPTED], config, None)
    frozen, adapted = plan.stages
    assert (frozen.forward, frozen.backward, adapted.forward, adapted.backward) == (20.0, 0.0, 20.0, 40.0)
    assert (frozen.share, adapted.share) == (0.25, 0.75)
    assert (frozen.names, adapted.names) == (("frozen", "frozen"), ("adapted", "adapted"))
    assert adapted.memory.weights == 200.0 and adapted.memory.optimizer == 60.0
    assert adapted.memory.activations == 1 * (2 * 7.0 + 2.0) + 50.0  # the last stage holds one micro-batch
    assert adapted.memory.device == 326.0


def test_a_stage_without_backward_keeps_no_activation_however_many_micro_batches():
    for micro_batches in (1, 2, 16):
        config = config_of(2, micro_batches, partition_method="manual", partition_split=(2,))
        frozen = make_plan([FROZEN, FROZEN, ADAPTED], config, None).stages[0]
        assert frozen.in_flight == 0 and frozen.memory.activations == 0.0


def test_earlier_stages_hold_more_micro_batches_but_no_more_than_there_are():
    for micro_batches, expected in ((8, [3, 2, 1]), (2, [2, 2, 1])):
        plan = make_plan([ADAPTED] * 3, config_of(3, micro_batches), None)
        assert [stage.in_flight for stage in plan.stages] == expected
        assert [stage.memory.activations for stage in plan.stages] == [9.0 * held + 50.0 for held in expected]


def test_swapped_blocks_count_two_slots_on_the_device_and_all_in_host_memory():
    visitor = LayerMemory(weights=1.0, slot=40.0, host_weights=40.0)
    memory = stage_memory([visitor, replace(visitor, slot=50.0, host_weights=50.0), visitor], 1)
    assert memory.weights == 3.0 + 2 * 50.0 and memory.host == 130.0
    assert stage_memory([visitor], 1).weights == 41.0
    assert stage_memory([LayerMemory(host_stored=5.0)], 3).host == 15.0


def test_copies_that_share_the_optimizer_state_keep_less_of_it():
    whole, shared = (make_plan([ADAPTED], config_of(1, 1, zero_stage=zero), None, 4) for zero in (0, 1))
    assert whole.stages[0].memory.optimizer == 30.0 and shared.stages[0].memory.optimizer == 15.0


def test_the_table_names_every_number():
    config = config_of(2, 8, partition_method="manual", partition_split=(1,))
    lines = describe_plan(make_plan([ADAPTED, ADAPTED], config, None))
    assert lines[0].split() == [
        "stage",
        "layers",
        "work",
        "weights",
        "grad+optim",
        "in",
        "flight",
        "activations",
        "device",
        "host",
    ]
    assert lines[1].split()[:6] == ["0", "0-0", "(adapted", "..", "adapted)", "50%"]
    assert "11% of the time with 8 micro-batch(es)" in lines[3] and "1.78 times as fast" in lines[3]
    assert len(describe_plan(make_plan([ADAPTED], config_of(1, 8), None))) == 2  # one stage waits for nobody


def test_warnings_come_where_it_does_not_fit_and_only_there():
    plan = make_plan([ADAPTED, ADAPTED], config_of(1, 1), None)  # 260 resident, 66 of activations
    assert plan_warnings(plan, None) == [] and plan_warnings(plan, 1000.0) == []
    (resident,) = plan_warnings(plan, 200.0)
    assert "before any activation" in resident and "stage 0" in resident
    (peak,) = plan_warnings(plan, 300.0)
    assert "more than the" in peak and "activation_checkpointing = 'offload'" in peak
    (close,) = plan_warnings(plan, 330.0)
    assert "more than 80% of" in close


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0"), (2.5e6, "2.5 MB"), (99e6, "99.0 MB"), (1.25e10, "12.5 GB")]
)
def test_sizes_are_readable(num_bytes, text):
    assert size_text(num_bytes) == text
