"""The schedule's arithmetic, against DeepSpeed's own order of passes and against what can be worked out by hand."""

import pytest
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule
from hypothesis import given
from hypothesis import strategies as st

from utils import schedule
from utils.schedule import in_flight, simulate, stage_passes


def deepspeed_passes(stage: int, num_stages: int, micro_batches: int) -> list[tuple[str, int]]:
    """Forward and backward passes of DeepSpeed's schedule; each kind takes the micro-batches in rising order."""
    counts = {"forward": 0, "backward": 0}
    passes = []
    for step in TrainSchedule(micro_batches=micro_batches, stages=num_stages, stage_id=stage):
        for instruction in step:
            kind = {ForwardPass: "forward", BackwardPass: "backward"}.get(type(instruction))
            if kind is not None:
                passes.append((kind, counts[kind]))
                counts[kind] += 1
    return passes


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
def test_the_order_is_that_of_the_engine(num_stages, micro_batches):
    for stage in range(num_stages):
        passes = stage_passes(stage, num_stages, micro_batches)
        assert passes == deepspeed_passes(stage, num_stages, micro_batches)
        held, most = 0, 0
        for kind, _ in passes:
            held += 1 if kind == "forward" else -1
            most = max(most, held)
        assert in_flight(stage, num_stages, micro_batches) == most


def test_one_stage_never_waits():
    timing = simulate([2.0], [4.0], 5)
    assert timing.span == 30.0 and timing.bubble == 0.0 and timing.speedup == 1.0


@pytest.mark.parametrize(("num_stages", "micro_batches"), [(2, 8), (4, 4), (3, 1)])
def test_even_stages_wait_as_long_as_the_formula_says(num_stages, micro_batches):
    """(P - 1) / (M + P - 1) of the time: 2 stages and 8 micro-batches are 16/9 = 1.78 times as fast as one."""
    timing = simulate([1.0] * num_stages, [2.0] * num_stages, micro_batches)
    assert timing.bubble == pytest.approx((num_stages - 1) / (micro_batches + num_stages - 1))
    assert timing.speedup == pytest.approx(num_stages * micro_batches / (micro_batches + num_stages - 1))


def test_a_stage_without_a_backward_waits_for_no_gradient():
    """Its forwards run behind each other; one that has a backward goes on only when a gradient has come."""
    assert simulate([3.0, 1.0], [0.0, 2.0], 4).span == 4 * 3.0 + 3.0
    # Without one, stage 1 is done at 3 + 3 * 1; with one, its third forward waits for the gradient from stage 2.
    forward = [1.0, 1.0, 1.0]
    frozen, waiting = (simulate(forward, [0.0, backward, 9.0], 3) for backward in (0.0, 1.0))
    assert frozen.span == 2.0 + 3 * 10.0
    assert waiting.span == frozen.span + 1.0


def test_an_uneven_split_is_as_slow_as_its_heaviest_stage():
    timing = simulate([1.0, 3.0], [2.0, 6.0], 100)
    assert timing.speedup == pytest.approx(12 / 9, rel=0.02)
    assert timing.busy == (300.0, 900.0)


costs = st.lists(st.floats(0.1, 10.0), min_size=6, max_size=6)


@given(forward=costs, backward=costs, num_stages=st.integers(1, 6), frozen=st.integers(0, 3))
def test_many_micro_batches_are_off_by_less_than_the_stages(forward, backward, num_stages, frozen):
    """The bound that `simulate` states, against playing all through; most of the time it is far closer."""
    backward = [0.0] * min(frozen, num_stages - 1) + backward
    one, other = forward[:num_stages], backward[:num_stages]
    slowest = max(f + b for f, b in zip(one, other, strict=True))
    for count in (2, 300):
        played = schedule._span(one, other, count)
        assert count * slowest - 1e-6 <= played <= (count + num_stages - 1) * slowest + 1e-6
        assert simulate(one, other, count).span == pytest.approx(
            played, abs=(num_stages - 1) * slowest + 1e-6
        )


@pytest.mark.parametrize("micro_batches", [1, 255, 256])
def test_few_micro_batches_are_played_through(micro_batches):
    forward, backward = [2.0, 1.0, 1.0, 2.875], [3.0, 1.0, 1.0, 2.0]
    assert simulate(forward, backward, micro_batches).span == schedule._span(forward, backward, micro_batches)


def test_far_more_are_close():
    """The costs whose steady state begins late: 0.13 % off when it was measured over the last of 64."""
    forward, backward = [2.0, 1.0, 1.0, 2.875], [3.0, 1.0, 1.0, 2.0]
    assert simulate(forward, backward, 1000).span == pytest.approx(
        schedule._span(forward, backward, 1000), rel=1e-3
    )


def test_no_number_of_micro_batches_is_too_many():
    timing = simulate([1.0, 1.0], [2.0, 2.0], 10**9)
    assert timing.bubble == pytest.approx(0.0, abs=1e-6) and timing.speedup == pytest.approx(2.0)
