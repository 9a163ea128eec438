import sys

import pytest
import torch
from torch import nn

from utils.config.schema import OptimizerConfig
from utils.errors import UserError
from utils.number_bytes import bytes_per_trained_weight, state_bytes_per_weight
from utils.optim import (
    _make_optimizer,
    build_optimizer,
    group_counters,
    learning_rate,
    restore_group_counters,
    set_learning_rate,
    trainable_dtype,
)

TYPES = ["adamw", "adamw8bit", "adamw_kahan"]


def config_of(**values) -> OptimizerConfig:
    return OptimizerConfig(**({"lr": 1e-2} | values))


def parameters_for(config: OptimizerConfig, value: float = 1.0) -> dict[str, nn.Parameter]:
    dtype = trainable_dtype(config)
    return {
        # bitsandbytes keeps moments of fewer than 4096 elements in 32 bits.
        "matrix": nn.Parameter(torch.full((64, 128), value, dtype=dtype)),
        "vector": nn.Parameter(torch.full((64,), value, dtype=dtype)),
    }


def step(optimizer, parameters, gradient: float = 1.0) -> None:
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


@pytest.mark.parametrize("kind", TYPES)
def test_a_step_goes_down_by_the_learning_rate(kind):
    config = config_of(type=kind, weight_decay=0.0)
    parameters = parameters_for(config)
    optimizer = build_optimizer(parameters, config)
    step(optimizer, parameters)
    for name, parameter in parameters.items():
        # Adam's first step is lr times the sign of the gradient; bfloat16 has 8 bits.
        assert parameter.float().mean().item() == pytest.approx(0.99, abs=4e-3), name
        assert parameter.dtype == trainable_dtype(config)


@pytest.mark.parametrize("kind", TYPES)
def test_decay_is_decoupled_and_spares_vectors(kind):
    config = config_of(type=kind, lr=0.1, weight_decay=0.5)
    parameters = parameters_for(config)
    optimizer = build_optimizer(parameters, config)
    step(optimizer, parameters, gradient=0.0)
    assert parameters["matrix"].float().mean().item() == pytest.approx(0.95, abs=2e-3)
    assert torch.equal(parameters["vector"].float(), torch.ones(64))


@pytest.mark.parametrize("kind", TYPES)
def test_decay_spares_lookup_tables(kind):
    """Rows that the data never asks for have no gradient, and decay alone would shrink them."""
    config = config_of(type=kind, lr=0.1, weight_decay=0.5)
    parameters = parameters_for(config)
    optimizer = build_optimizer(parameters, config, tables={"matrix"})
    step(optimizer, parameters, gradient=0.0)
    assert torch.equal(parameters["matrix"].float(), torch.ones_like(parameters["matrix"]).float())


@pytest.mark.parametrize("kind", TYPES)
def test_a_quadratic_bowl_is_descended(kind):
    config = config_of(type=kind, lr=0.05, weight_decay=0.0)
    parameters = parameters_for(config, value=2.0)
    optimizer = build_optimizer(parameters, config)
    for _ in range(60):
        optimizer.zero_grad()
        sum(parameter.float().square().sum() for parameter in parameters.values()).backward()
        optimizer.step()
    assert all(parameter.abs().max() < 0.5 for parameter in parameters.values())


def test_kahan_summation_keeps_bfloat16_moving_where_it_would_stand_still():
    # Half a unit in the last place of 1.0 in bfloat16 is 2^-9 = 2e-3: steps of 1e-5 round away, all of them.
    config = config_of(type="adamw_kahan", lr=1e-5, weight_decay=0.0)
    kahan = parameters_for(config)
    plain = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in kahan.items()}
    ours = build_optimizer(kahan, config)
    other = torch.optim.AdamW(plain.values(), lr=1e-5, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(500):
        step(ours, kahan)
        step(other, plain)
    assert torch.equal(plain["matrix"], torch.ones(64, 128, dtype=torch.bfloat16))
    # 500 steps of 1e-5, to the nearest bfloat16 below 1 (a spacing of 2^-8).
    assert kahan["matrix"].float().mean().item() == pytest.approx(1 - 5e-3, abs=2e-3)


def test_trained_weights_are_float32_but_for_kahan():
    assert [trainable_dtype(config_of(type=kind)) for kind in TYPES] == [
        torch.float32,
        torch.float32,
        torch.bfloat16,
    ]


def test_moments_of_the_8_bit_optimizer_are_in_8_bits():
    config = config_of(type="adamw8bit")
    parameters = parameters_for(config)
    optimizer = build_optimizer(parameters, config)
    step(optimizer, parameters)
    assert optimizer.state[parameters["matrix"]]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("kind", TYPES)
def test_a_stage_without_anything_to_train_gets_an_optimizer_too(kind):
    optimizer = build_optimizer({}, config_of(type=kind))
    optimizer.step()
    set_learning_rate(optimizer, 0.5)


@pytest.mark.parametrize("kind", TYPES)
def test_matrices_alone_make_one_optimizer(kind):
    config = config_of(type=kind)
    parameters = {"matrix": parameters_for(config)["matrix"]}
    step(build_optimizer(parameters, config), parameters)
    assert parameters["matrix"].float().mean() < 1


def test_without_bitsandbytes_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    config = config_of(type="adamw8bit")
    with pytest.raises(UserError, match="pip install"):
        build_optimizer(parameters_for(config), config)


@pytest.mark.parametrize("kind", TYPES)
def test_the_learning_rate_can_be_set_before_every_step(kind):
    config = config_of(type=kind, weight_decay=0.0)
    parameters = parameters_for(config)
    optimizer = build_optimizer(parameters, config)
    set_learning_rate(optimizer, 0.0)
    step(optimizer, parameters)
    assert all(
        torch.equal(parameter.float(), torch.ones_like(parameter).float())
        for parameter in parameters.values()
    )
    set_learning_rate(optimizer, 0.125)
    step(optimizer, parameters)
    assert all(parameter.float().mean() < 0.95 for parameter in parameters.values())


@pytest.mark.parametrize("kind", ["adamw", "adamw_kahan"])
def test_step_counters_of_groups_are_carried_over(kind):
    config = config_of(type=kind)
    parameters = parameters_for(config)
    optimizer = build_optimizer(parameters, config)
    assert group_counters(optimizer) == {}
    for _ in range(3):
        step(optimizer, parameters)
    counters = group_counters(optimizer)
    assert counters == ({} if kind == "adamw" else {"step": 3})
    fresh = build_optimizer(parameters_for(config), config)
    restore_group_counters(fresh, counters)
    assert group_counters(fresh) == counters


PEAK = 2e-5
SCHEDULES = ["constant", "linear", "cosine"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_in_equal_steps_to_the_peak(schedule):
    rates = [learning_rate(index, 100, PEAK, schedule, 4) for index in range(5)]
    assert rates == pytest.approx([PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK, PEAK])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_the_first_step_has_the_peak(schedule):
    assert learning_rate(0, 10, PEAK, schedule, 0) == PEAK


@pytest.mark.parametrize(
    ("schedule", "quarter", "middle", "end"),
    [("constant", 1.0, 1.0, 1.0), ("linear", 0.75, 0.5, 0.0), ("cosine", 0.8535533906, 0.5, 0.0)],
)
def test_courses_after_warm_up(schedule, quarter, middle, end):
    rates = [learning_rate(index, 110, 1.0, schedule, 10) for index in (35, 60, 110)]
    assert rates == pytest.approx([quarter, middle, end])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_never_rises_again_and_stays_zero_beyond_the_end(schedule):
    rates = [learning_rate(index, 20, 1.0, schedule, 5) for index in range(5, 40)]
    assert rates == sorted(rates, reverse=True)
    assert rates[14] > 0  # the last step still learns
    assert set(rates[15:]) == {0.0}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_of_nothing_but_warm_up_has_finite_rates(schedule):
    assert learning_rate(5, 5, 1.0, schedule, 5) == pytest.approx(1.0)
    assert learning_rate(2, 3, 1.0, schedule, 10) == pytest.approx(0.3)


@pytest.mark.parametrize("kind", TYPES)
def test_a_copy_that_got_no_share_of_a_group_steps_all_the_same(kind):
    """What a data-parallel copy does whose share of the state is empty in one group, or in all."""
    config = config_of(type=kind)
    parameters = parameters_for(config)
    for held in ([parameters["matrix"]], []):
        groups = [{"params": held, "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]
        optimizer = _make_optimizer(groups, config)
        step(optimizer, parameters)
        optimizer.step()
        assert len(optimizer.state) == len(held)


@pytest.mark.parametrize(
    ("kind", "total", "shared"), [("adamw", 16, 8), ("adamw8bit", 10, 2), ("adamw_kahan", 10, 6)]
)
def test_bytes_of_a_trained_weight(kind, total, shared):
    assert bytes_per_trained_weight(config_of(type=kind)) == total
    assert state_bytes_per_weight(config_of(type=kind)) == shared
    parameters = parameters_for(config_of(type=kind))
    optimizer = build_optimizer(parameters, config_of(type=kind))
    step(optimizer, parameters)
    state = optimizer.state[parameters["matrix"]]
    size = sum(
        value.numel() * value.element_size()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() >= parameters["matrix"].numel()
    )
    assert size == shared * parameters["matrix"].numel()
