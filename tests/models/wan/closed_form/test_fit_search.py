"""Which ridge is chosen, and how the caps are met, on small problems made up of plain tensors."""

import pytest
import torch

from models.wan.closed_form.fit_moments import FitMoments, MeasuredTokens
from models.wan.closed_form.fit_search import Caps, FitPoint, choose_ridge, fit
from models.wan.closed_form.fit_solve import Solver
from utils.closed_form import Moments
from utils.errors import UserError

WIDTH, TOKENS = 16, 10
TARGETS = [f"blocks.{block}.cross_attn.{name}" for block in range(4) for name in "kv"]
CPU = torch.device("cpu")
PADDING = torch.eye(WIDTH)[0]


class Weights:
    """A source of random weights; `values` are put in place of some."""

    def __init__(self, values=None):
        self.files, self._values = ("weights.safetensors",), values or {}

    def get(self, name):
        random = torch.Generator().manual_seed(TARGETS.index(name.removesuffix(".weight")))
        return self._values.get(name, torch.randn(WIDTH, WIDTH, generator=random))

    def release(self):
        pass


def tokens(count, seed, noise):
    """Base and tuned states: a change of rank 2 and noise that no adapter can undo; nothing in the direction of padding."""
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(count * TOKENS, WIDTH, generator=random)
    fixed = torch.Generator().manual_seed(7)
    change = torch.randn(WIDTH, 2, generator=fixed) @ torch.randn(2, WIDTH, generator=fixed) * 0.1
    free = 1.0 - PADDING
    tuned = base + (base * free) @ change + noise * torch.randn(base.shape, generator=random)
    return base * free, tuned * free


def problem(counts=(3, 3, 6), noise=0.3, held=10, domain=0):
    parts, measured = [], {}
    for number, count in enumerate(counts):
        base, tuned = tokens(count, number, noise)
        parts.append(Moments(WIDTH))
        parts[-1].add(tuned, base)
        measured["neutral", False] = MeasuredTokens(base, tuned, (TOKENS,) * count)
    if held:
        measured["neutral", True] = MeasuredTokens(*tokens(held, 50, noise), (TOKENS,) * held)
    kept = None
    if domain:
        base, tuned = tokens(domain, 60, noise)
        kept = Moments(WIDTH, is_kept=True)
        kept.add(3 * tuned)
        measured["domain", False] = MeasuredTokens(base, 3 * tuned, (TOKENS,) * domain)
    anchors = Moments(WIDTH)
    anchors.add(*tokens(2, 70, noise)[::-1])
    ends = tuple(sum(counts[: number + 1]) for number in range(len(counts)))
    return FitMoments(tuple(parts), ends, anchors, kept, measured, PADDING)


def solver(moments, rank=4, source=None, keep_weight=1.0):
    return Solver(moments, source or Weights(), TARGETS, rank, keep_weight, CPU)


def point(ridge, loss, error=0.0):
    return FitPoint(ridge, 4, 0.5, 0.1, None, 0.1, 0.1, loss, error)


def test_of_ridges_that_cannot_be_told_apart_the_largest_is_chosen():
    points = [point(0.1, 1.0), point(1.0, 0.90, 0.05), point(10.0, 0.94), point(100.0, 0.96)]
    assert choose_ridge(points) == 10.0
    assert choose_ridge([point(0.1, 1.0, 0.0), point(1.0, 2.0, 5.0)]) == 0.1


def test_more_noise_asks_for_a_larger_ridge():
    clean, noisy = (fit(solver(problem(noise=noise)), None, Caps()) for noise in (0.0, 1.0))
    assert clean.ridge < noisy.ridge
    assert clean.chosen.recovery > 0.98 > noisy.chosen.recovery
    assert clean.ridge == clean.best_ridge and clean.is_held_out


def test_the_loss_is_the_squared_residual_and_the_weighed_shift():
    own = solver(problem(domain=4), keep_weight=0.5)
    found = own.scout(0.1)
    solved = [own.solve(own.problem.factored(0.1), module) for module in own.scouts]
    expected = sum(one.residuals["neutral", True].after ** 2 for one in solved) / len(solved)
    expected += 0.5 * sum(one.residuals["domain", False].after ** 2 for one in solved) / len(solved)
    assert found.loss == pytest.approx(expected, rel=1e-5) and 0 < found.loss_error < found.loss
    assert {module.split(".")[1] for module in own.scouts} == {"1", "3"}


@pytest.mark.parametrize("cap", [0.2, 0.05, 0.01])
def test_a_cap_is_met_just_so(cap):
    free = fit(solver(problem()), None, Caps())
    assert free.chosen.max_ratio > 0.2
    found = fit(solver(problem()), None, Caps(max_ratio=cap))
    assert 0.9 * cap < found.chosen.max_ratio <= cap
    assert found.ridge > found.best_ridge == free.ridge
    assert found.bounded.recovery < found.unbounded.recovery
    mean = fit(solver(problem()), None, Caps(max_mean_ratio=cap))
    assert 0.9 * cap < mean.chosen.mean_ratio <= cap


def test_a_cap_that_is_no_hindrance_changes_nothing():
    free, capped = (fit(solver(problem()), None, caps) for caps in (Caps(), Caps(max_ratio=50.0)))
    assert free.ridge == capped.ridge
    assert all(torch.equal(a.up, b.up) for a, b in zip(free.solved, capped.solved, strict=True))


def test_a_cap_below_what_can_be_reached_names_the_nearest():
    with pytest.raises(UserError, match="cannot be met: even with the largest ridge"):
        fit(solver(problem()), None, Caps(max_ratio=1e-9))
    with pytest.raises(UserError, match=r"--ridge 0.01 reaches a largest delta ratio of 0\.\d+"):
        fit(solver(problem()), 0.01, Caps(max_ratio=0.01))


def test_how_many_prompts_were_enough():
    clean, noisy = (fit(solver(problem(noise=noise)), 1e-2, Caps()) for noise in (0.0, 1.0))
    assert [one.num_prompts for one in clean.counts] == [3, 6, 12]
    assert clean.enough == 3  # without noise three prompts of ten tokens say it all
    assert noisy.enough is None and noisy.counts[0].residual > noisy.counts[-1].residual


def test_ranks_rise_to_what_full_rank_reaches_on_the_tokens_that_were_fitted_on():
    found = fit(solver(problem(held=0)), 1e-3, Caps())
    assert not found.is_held_out
    recoveries = [one.recovery for one in found.ranks]
    assert [one.rank for one in found.ranks] == [1, 2, 4, 8, 16]
    assert recoveries[-1] == pytest.approx(found.full_recovery, abs=1e-4)
    assert found.ranks[2].recovery == pytest.approx(found.bounded.recovery, abs=1e-4)


def test_nothing_to_do_and_too_little_to_go_by():
    same = problem()
    for part in same.parts:
        part.wanted().zero_()
    with pytest.raises(UserError, match="there is nothing to do"):
        solver(same)
    with pytest.raises(UserError, match="fewer than 4 neutral ones"):
        fit(solver(problem(held=0)), None, Caps())


def test_a_weight_that_is_not_finite_is_named():
    name = "blocks.1.cross_attn.v.weight"
    source = Weights({name: torch.full((WIDTH, WIDTH), float("nan"))})
    with pytest.raises(UserError, match=f"weights.safetensors: {name} holds NaN"):
        fit(solver(problem(), source=source), 0.1, Caps())
