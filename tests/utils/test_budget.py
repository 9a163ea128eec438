"""Budgets: a projection lands on the cap and has nothing to do a second time; warnings, stops, and when is measured."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import budget as budgets
from utils.budget import Budget, projection_factors
from utils.config.schema import BudgetConfig
from utils.delta_budget import ModuleDelta, module_delta, summarise
from utils.errors import TrainingStoppedError


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(budgets, "gather_objects", lambda value: [value])


class Adapters:
    """Real A and B for some modules, in float32 as they are trained; the base weights have norm 1."""

    def __init__(self, ratios, rank=4, seed=0):
        random = torch.Generator().manual_seed(seed)
        self.parameters = {}
        for number, ratio in enumerate(ratios):
            a = torch.randn(rank, 24, generator=random)
            b = torch.randn(16, rank, generator=random)
            b *= ratio / (b @ a).norm() if ratio else 0.0
            self.parameters |= {f"m{number}.A": a, f"m{number}.B": b}

    def deltas(self, parameters):
        modules = sorted({name.split(".")[0] for name in parameters})
        return [module_delta(m, parameters[f"{m}.A"], parameters[f"{m}.B"], 1.0, 1.0) for m in modules]

    def scale_adapters(self, parameters, factors):
        for module, factor in factors.items():
            parameters[f"{module}.B"].mul_(factor)

    def ratios(self):
        return [delta.ratio for delta in self.deltas(self.parameters)]


def watch(model, said=None, drift=None, **config):
    pipeline = SimpleNamespace(parameters=getattr(model, "parameters", {}))
    return Budget(BudgetConfig(**config), model, pipeline, drift, (said if said is not None else []).append)


def measured(budget, step=1, is_last=False, saves=False):
    row = {"step": step}
    budget.measure(row, is_last=is_last, saves=saves)
    return row


@settings(max_examples=60)
@given(
    ratios=st.lists(st.floats(1e-6, 0.9), min_size=1, max_size=6),
    cap=st.floats(0.001, 0.5),
    mean_cap=st.none() | st.floats(0.001, 0.5),
    seed=st.integers(0, 1000),
)
def test_a_projection_lands_on_its_caps_and_is_idempotent(ratios, cap, mean_cap, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budgets, "gather_objects", lambda value: [value])
        model = Adapters(ratios, seed=seed)
        budget = watch(
            model, action="project", max_delta_ratio=cap, max_mean_delta_ratio=mean_cap, every_n_steps=1
        )
        before = model.ratios()
        row = measured(budget)
        after = model.ratios()
        # float32: the largest relative error measured is 1.2e-7.
        assert max(after) <= cap * (1 + 1e-6)
        mean = sum(after) / len(after)
        if mean_cap is not None:
            assert mean <= mean_cap * (1 + 1e-6)
        for one, other in zip(before, after, strict=True):
            assert other <= one * (1 + 1e-6)
        if max(before) > cap * (1 + 2e-6) and (mean_cap is None or mean < mean_cap * (1 - 1e-5)):
            assert max(after) == pytest.approx(cap, rel=1e-6)
        if mean_cap is not None and sum(min(r, cap) for r in before) / len(before) > mean_cap * (1 + 2e-6):
            assert mean == pytest.approx(mean_cap, rel=1e-6)
        assert row["max_delta_ratio"] == max(after) and row["mean_delta_ratio"] == pytest.approx(mean)
        values = {name: value.clone() for name, value in model.parameters.items()}
        assert measured(budget, step=2)["projected_modules"] == 0
        assert all(torch.equal(values[name], value) for name, value in model.parameters.items())


def test_a_projection_scales_b_alone_and_only_where_it_has_to():
    model = Adapters([0.02, 0.2])
    before = {name: value.clone() for name, value in model.parameters.items()}
    row = measured(watch(model, action="project", max_delta_ratio=0.05, every_n_steps=1))
    assert row["projected_modules"] == 1
    assert row["max_delta_ratio_before_projection"] == pytest.approx(0.2)
    for name in ("m0.A", "m0.B", "m1.A"):
        assert torch.equal(model.parameters[name], before[name])
    assert torch.allclose(model.parameters["m1.B"], before["m1.B"] * 0.25, rtol=1e-6)


def test_the_mean_scales_all_modules_by_one_factor():
    factors = projection_factors(
        Adapters([0.02, 0.04, 0.2]).deltas(Adapters([0.02, 0.04, 0.2]).parameters), 0.06, 0.03
    )
    # 0.02, 0.04 and, after its own cap, 0.06 have the mean 0.04.
    assert factors == pytest.approx({"m0": 0.75, "m1": 0.75, "m2": 0.75 * 0.3}, rel=1e-5)


def test_a_ratio_that_no_factor_mends_is_left_alone():
    broken = [ModuleDelta("m", 1, 1.0, 1.0, 0.0, ratio, 1.0) for ratio in (math.inf, math.nan)]
    assert projection_factors(broken, 0.05, 0.01) == {}
    assert projection_factors([], 0.05, 0.01) == {}


def test_what_no_factor_mends_is_warned_about_and_hides_nothing_of_the_others():
    """A base weight of zeros makes a ratio infinite: the others are still put on the caps, and somebody is told."""
    broken = ModuleDelta("m", 1, 1.0, 1.0, 0.0, math.inf, 1.0)
    others = Adapters([0.04, 0.04])
    assert projection_factors([broken, *others.deltas(others.parameters)], 0.05, 0.02) == pytest.approx(
        {"m0": 0.5, "m1": 0.5}, rel=1e-5
    )
    said = []
    model = SimpleNamespace(
        deltas=lambda parameters: [broken], scale_adapters=lambda parameters, factors: None, parameters={}
    )
    budget = watch(model, said, action="project", max_delta_ratio=0.05, every_n_steps=1)
    assert measured(budget)["projected_modules"] == 0
    budget.act(1, lambda: "")
    assert len(said) == 1 and "m with inf" in said[0]


def test_what_is_exported_is_on_the_cap_and_what_is_trained_stays():
    model = Adapters([0.2])
    budget = watch(model, action="project", max_delta_ratio=0.05, every_n_steps=50)
    assert "projected_modules" not in measured(budget, step=7, is_last=True, saves=True)
    copy = {name: value.clone() for name, value in model.parameters.items()}
    written = budget.projected(copy)
    assert summarise(model.deltas(written)).overall.max_ratio == pytest.approx(0.05, rel=1e-6)
    assert model.ratios() == pytest.approx([0.2])
    plain = watch(model, action="stop", max_delta_ratio=0.05)
    assert plain.projected(model.parameters) is model.parameters and model.ratios() == pytest.approx([0.2])


@pytest.mark.parametrize(
    ("action", "step", "is_last", "saves", "expected"),
    [
        ("warn", 10, False, False, True),
        ("warn", 11, False, False, False),
        ("warn", 11, False, True, False),
        ("warn", 11, True, False, True),
        ("stop", 11, False, True, True),
        ("project", 11, False, True, False),
    ],
)
def test_when_is_measured(action, step, is_last, saves, expected):
    budget = watch(Adapters([0.01]), action=action, every_n_steps=5)
    assert ("max_delta_ratio" in measured(budget, step, is_last, saves)) is expected


def test_a_warning_comes_again_only_when_it_has_become_worse():
    model, said = Adapters([0.1, 0.01]), []
    budget = watch(model, said, max_delta_ratio=0.05, every_n_steps=1)
    for step, factor in enumerate((1.0, 1.4, 1.4, 1.4, 0.1, 8.0), start=1):
        model.parameters["m0.B"].mul_(factor)
        measured(budget, step)
        budget.act(step, lambda: "")
    assert [text.split(":")[1].strip() for text in said] == ["step 1", "step 4"]
    assert "1 adapted module(s)" in said[0] and "m0 with 0.1000" in said[0]


def test_the_mean_is_warned_about_too():
    said = []
    budget = watch(
        Adapters([0.04, 0.04]), said, max_delta_ratio=0.05, max_mean_delta_ratio=0.03, every_n_steps=1
    )
    measured(budget)
    budget.act(1, lambda: "")
    assert "by 0.0400 on average, more than budget.max_mean_delta_ratio = 0.03" in said[0]


def test_stop_says_what_is_left():
    budget = watch(Adapters([0.1]), action="stop", max_delta_ratio=0.05, every_n_steps=1)
    measured(budget)
    with pytest.raises(
        TrainingStoppedError, match=r"step 1: .*0\.1000.*action = 'stop'; the last good one is X"
    ):
        budget.act(1, lambda: "the last good one is X")
    within = watch(Adapters([0.05]), action="stop", max_delta_ratio=0.05, every_n_steps=1)
    measured(within)
    within.act(1, lambda: "")


@pytest.mark.parametrize(("value", "stops"), [(0.049, False), (0.051, True), (math.nan, True)])
def test_the_drift_of_an_encoder_has_a_cap(value, stops):
    drift = SimpleNamespace(measure=lambda pipeline: value)
    budget = watch(None, drift=drift, action="stop", max_neutral_drift=0.05, every_n_steps=1)
    row = measured(budget)
    assert row["neutral_drift"] == (value if math.isfinite(value) else None)
    if stops:
        with pytest.raises(TrainingStoppedError, match="budget.max_neutral_drift = 0.05"):
            budget.act(1, lambda: "")
    else:
        budget.act(1, lambda: "")
