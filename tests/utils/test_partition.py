from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.config.schema import ModelConfig, OptimizerConfig, TrainConfig
from utils.errors import UserError
from utils.layers import LayerSpec
from utils.memory import LayerMemory, stage_memory
from utils.partition import balanced_bounds, plan_stages, training_costs


def config_of(**values) -> TrainConfig:
    model = ModelConfig(
        type="wan",
        ckpt_path="unused",
        cache_text_embeddings=False,
        train_text_encoder=True,
        freeze_transformer=True,
    )
    return TrainConfig(
        output_dir="unused", dataset="unused", model=model, optimizer=OptimizerConfig(lr=1e-4), **values
    )


def never_built(device):
    raise AssertionError("planning builds nothing")


def spec(flops: float, **flags: float) -> LayerSpec:
    return LayerSpec(f"layer of {flops}", never_built, flops, **flags)


def loads(weights, bounds) -> list[float]:
    return [sum(weights[start:end]) for start, end in pairwise(bounds)]


def every_split(num_layers: int, num_parts: int):
    for cuts in combinations(range(1, num_layers), num_parts - 1):
        yield (0, *cuts, num_layers)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.data())
@settings(max_examples=150)
def test_no_split_has_a_lighter_heaviest_part(weights, data):
    num_parts = data.draw(st.integers(1, len(weights)))
    bounds = balanced_bounds(tuple(map(float, weights)), num_parts)
    assert bounds[0] == 0
    assert bounds[-1] == len(weights)
    assert len(bounds) == num_parts + 1
    assert all(start < end for start, end in pairwise(bounds))
    heaviest = max(loads(weights, bounds))
    assert heaviest == min(max(loads(weights, split)) for split in every_split(len(weights), num_parts))


@pytest.mark.parametrize(
    ("weights", "num_parts", "bounds"),
    [
        ((1.0, 1.0, 1.0, 1.0), 2, (0, 2, 4)),
        ((10.0, 1.0, 1.0, 1.0, 1.0), 3, (0, 1, 3, 5)),  # the lighter parts are even too,
        ((1.0, 1.0, 1.0, 1.0, 10.0), 3, (0, 2, 4, 5)),  # from both sides
        ((0.0, 0.0, 0.0), 3, (0, 1, 2, 3)),
        ((5.0,), 1, (0, 1)),
        ((1.0, 1.0, 8.0), 2, (0, 2, 3)),
    ],
)
def test_splits_that_can_be_seen_by_eye(weights, num_parts, bounds):
    assert balanced_bounds(weights, num_parts) == bounds


def test_as_many_layers_as_the_largest_model_has_are_split_at_once():
    # 24 text blocks and 40 DiT blocks over 16 stages: exhaustive search would never end.
    weights = tuple([3.0] * 26 + [20.0] * 42)
    bounds = balanced_bounds(weights, 16)
    assert max(loads(weights, bounds)) <= 1.2 * sum(weights) / 16


def test_work_is_counted_as_it_is_done():
    specs = [
        spec(10.0),  # frozen, before anything trains: forward only
        spec(10.0, recompute=1.0),  # the same: without a gradient nothing is recomputed
        spec(10.0, trainable=True, trains_weights=True, recompute=1.0),
        spec(10.0, trainable=True, trains_weights=True),
        spec(10.0),  # frozen, but the gradient passes through
        spec(10.0, recompute=1.0),
        spec(10.0, trainable=True),  # an adapter: no gradient of the full weights
    ]
    assert tuple(cost.total for cost in training_costs(specs)) == (10.0, 10.0, 40.0, 30.0, 20.0, 30.0, 20.0)
    assert {cost.forward for cost in training_costs(specs)} == {10.0}


def test_a_layer_may_say_what_its_backward_costs():
    layers = [spec(10.0, backward_flops=3.0), spec(10.0, trainable=True, backward_flops=17.0, recompute=1.0)]
    assert [cost.backward for cost in training_costs(layers)] == [0.0, 27.0]


def test_stages_are_balanced_by_cost_unless_asked_otherwise():
    specs = [spec(1.0)] * 6 + [spec(9.0, trainable=True)] * 2
    by_cost = plan_stages(specs, config_of(pipeline_stages=2))
    assert by_cost.bounds == (0, 7, 8)
    assert by_cost.stage_costs == (24.0, 18.0)
    assert [cost.total for cost in by_cost.layer_costs] == [1.0] * 6 + [18.0] * 2
    uniform = plan_stages(specs, config_of(pipeline_stages=2, partition_method="uniform"))
    assert uniform.bounds == (0, 4, 8)
    assert uniform.layer_costs == by_cost.layer_costs


def test_a_manual_split_is_taken_as_it_is():
    config = config_of(pipeline_stages=3, partition_method="manual", partition_split=(1, 5))
    assert plan_stages([spec(1.0)] * 6, config).bounds == (0, 1, 5, 6)


@pytest.mark.parametrize("split", [(6,), (7,), (0,)])
def test_a_manual_split_that_leaves_a_stage_empty_is_refused(split):
    config = config_of(pipeline_stages=2, partition_method="manual", partition_split=split)
    with pytest.raises(UserError, match=r"partition_split = .*6 layers"):
        plan_stages([spec(1.0)] * 6, config)


def test_a_manual_split_has_to_rise():
    config = config_of(pipeline_stages=3, partition_method="manual", partition_split=(4, 2))
    with pytest.raises(UserError, match="rising order"):
        plan_stages([spec(1.0)] * 6, config)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(UserError, match="pipeline_stages = 4.*only 3 layers"):
        plan_stages([spec(1.0)] * 3, config_of(pipeline_stages=4))
    assert plan_stages([spec(1.0)] * 3, config_of(pipeline_stages=3)).bounds == (0, 1, 2, 3)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=8),
    st.integers(0, 80),
    st.data(),
)
@settings(max_examples=150)
def test_no_split_exceeds_the_memory_by_less_or_is_better_balanced_at_the_same_excess(layers, limit, data):
    num_parts = data.draw(st.integers(1, len(layers)))
    weights, sizes = (tuple(map(float, column)) for column in zip(*layers, strict=True))

    def rank(bounds):
        excess = sum(max(0.0, size - limit) for size in loads(sizes, bounds))
        return excess, max(loads(weights, bounds))

    bounds = balanced_bounds(weights, num_parts, lambda a, b, part: sum(sizes[a:b]), float(limit))
    assert rank(bounds) == min(rank(split) for split in every_split(len(layers), num_parts))


def test_memory_moves_a_boundary_that_cost_alone_would_not():
    """Cheap layers with large optimizer states: by cost they all lie on one stage, which holds twice a device."""
    heavy, light = LayerMemory(weights=10.0, gradients=10.0, state=10.0), LayerMemory(weights=5.0)
    specs = [replace(spec(1.0, trainable=True, trains_weights=True), memory=heavy) for _ in range(4)]
    specs += [replace(spec(20.0), memory=light) for _ in range(4)]
    config = config_of(pipeline_stages=2)
    free, bound = plan_stages(specs, config), plan_stages(specs, config, device_bytes=100.0)
    assert stage_memory((spec.memory for spec in specs[: free.bounds[1]]), 1).device > 80.0
    assert bound.bounds == (0, 2, 8)


def test_memory_counts_the_activations_of_all_micro_batches_in_flight():
    """The first of two stages holds two micro-batches, the last one: the same layers fit on the last only."""
    specs = [replace(spec(1.0, trainable=True), memory=LayerMemory(stored=10.0)) for _ in range(6)]
    config = config_of(pipeline_stages=2, gradient_accumulation_steps=4)
    assert plan_stages(specs, config).bounds == (0, 3, 6)
    # 80 % of 50 bytes: two layers with two micro-batches, four with one.
    assert plan_stages(specs, config, device_bytes=50.0).bounds == (0, 2, 6)
    one = config_of(pipeline_stages=2, gradient_accumulation_steps=1)
    assert plan_stages(specs, one, device_bytes=50.0).bounds == (0, 3, 6)
