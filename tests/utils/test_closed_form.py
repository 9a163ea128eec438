"""The closed form against known answers and against a dense float64 least-squares solve of the same problem."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.closed_form import Moments, Share, answers_of, least_squares, residual
from utils.errors import UserError

WIDTH, OUT = 24, 16


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(inputs, wanted=None):
    found = Moments(inputs.shape[1], is_kept=wanted is None)
    for start in range(0, len(inputs), 7):  # in pieces, as tokens come
        stop = start + 7
        found.add(inputs[start:stop], None if wanted is None else wanted[start:stop])
    return found


def dense(weight, inputs, wanted, kept, keep_weight, pinned, ridge):
    """E by lstsq over stacked, weighted equations, in the basis that leaves the pinned direction out."""
    shared = torch.cat([inputs / len(inputs) ** 0.5, kept * (keep_weight / max(len(kept), 1)) ** 0.5])
    change = torch.cat([(wanted - inputs) / len(inputs) ** 0.5, torch.zeros_like(kept)])
    unit = float(shared.square().sum()) / shared.shape[1]
    free = torch.linalg.qr(torch.cat([pinned[:, None], torch.eye(len(pinned), dtype=pinned.dtype)], 1)).Q[
        :, 1:
    ]
    rows = torch.cat([shared @ free, (ridge * unit) ** 0.5 * torch.eye(free.shape[1], dtype=pinned.dtype)])
    right = torch.cat([change @ weight.T, torch.zeros(free.shape[1], len(weight), dtype=pinned.dtype)])
    solution = torch.linalg.lstsq(rows, right, driver="gelsd").solution
    return solution.T @ free.T, rows, right, free


def problem(inputs, wanted, kept=None, keep_weight=1.0, pinned=None, needed=1):
    shares = [Share([moments(inputs, wanted)], 1.0)]
    if kept is not None:
        shares.append(Share([moments(kept)], keep_weight))
    return least_squares(shares, pinned, needed)


def test_an_invertible_map_behind_the_base_is_undone():
    weight, base = draw(OUT, WIDTH, seed=1), draw(200, WIDTH, seed=2)
    tuned = base @ (torch.eye(WIDTH, dtype=torch.float64) + draw(WIDTH, WIDTH, seed=3, scale=0.1)).T
    solution = problem(tuned, base).factored(0.0).solve(weight, OUT)
    restored = tuned @ (weight + solution.up @ solution.down).T
    wanted = base @ weight.T
    assert float((restored - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_change_of_rank_r_is_recovered_at_rank_r_and_not_below(rank):
    weight, base = draw(OUT, WIDTH, seed=1), draw(300, WIDTH, seed=2)
    change = draw(WIDTH, rank, seed=3) @ draw(rank, WIDTH, seed=4, scale=0.05)
    identity = torch.eye(WIDTH, dtype=torch.float64)
    tuned = base @ (identity + change).T
    solved = problem(tuned, base).factored(0.0)
    exact = weight @ torch.linalg.inv(identity + change) - weight  # of rank r too (Woodbury)
    solution = solved.solve(weight, rank)
    assert float((solution.up @ solution.down - exact).norm() / exact.norm()) < 1e-6
    values = solved.solve(weight, rank + 2).singular.values
    assert float(values[rank] / values[0]) < 1e-7 < 1e-4 < float(values[rank - 1] / values[0])
    answers = answers_of(weight, tuned, base)
    found = residual(answers, solution.up, solution.down, tuned)
    assert found.after < 1e-6 < 0.01 < found.before and found.recovery > 0.999
    if rank > 1:
        up, down = solved.product_of(solution.singular, rank - 1)
        assert residual(answers, up, down, tuned).after > 1e-3


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**20),
    ridge=st.sampled_from([1e-6, 1e-3, 1e-1, 10.0]),
    keep_weight=st.sampled_from([0.0, 0.3, 3.0]),
    num_kept=st.integers(1, 30),
)
def test_it_is_the_dense_solution(seed, ridge, keep_weight, num_kept):
    weight, pinned = draw(OUT, WIDTH, seed=seed), draw(WIDTH, seed=seed + 1)
    inputs, kept = draw(60, WIDTH, seed=seed + 2), draw(num_kept, WIDTH, seed=seed + 3)
    wanted = inputs + draw(60, WIDTH, seed=seed + 4, scale=0.3)
    expected, rows, right, free = dense(weight, inputs, wanted, kept, keep_weight, pinned, ridge)
    solved = problem(inputs, wanted, kept, keep_weight, pinned).factored(ridge)
    full = solved.solve(weight, OUT)
    assert float((full.up @ full.down - expected).norm() / expected.norm()) < 1e-8
    assert torch.allclose(solved.full(weight, inputs), inputs @ expected.T, atol=1e-9)
    # The best of a lower rank: what it adds to the objective is what the exact truncation in this metric would add.
    low = solved.solve(weight, 4)
    change = low.up @ low.down
    least = float((rows @ (expected @ free).T - right).square().sum())
    added = float((rows @ (change @ free).T - right).square().sum()) - least
    unavoidable = float(torch.linalg.svdvals(rows @ (expected @ free).T)[4:].square().sum())
    assert added == pytest.approx(unavoidable, rel=2e-3, abs=1e-9)
    assert float((change @ pinned).norm()) < 1e-9 * float(pinned.norm())


def test_combined_for_many_maps_it_gives_each_the_same():
    inputs, pinned = draw(200, WIDTH, seed=2), draw(WIDTH, seed=5)
    solved = problem(inputs, inputs + draw(200, WIDTH, seed=4, scale=0.3), pinned=pinned).factored(1e-3)
    weights = [draw(OUT, WIDTH, seed=seed) for seed in (1, 7)]
    alone = [solved.solve(weight, 5, tolerance=1e-12) for weight in weights]
    solved.combine()
    for weight, one in zip(weights, alone, strict=True):
        again = solved.solve(weight, 5, tolerance=1e-12)
        assert torch.allclose(again.up @ again.down, one.up @ one.down, rtol=1e-6, atol=1e-9)


def test_kept_tokens_move_by_what_is_stated_and_less_the_more_they_weigh():
    weight, pinned = draw(OUT, WIDTH, seed=1), draw(WIDTH, seed=5)
    inputs, kept = draw(200, WIDTH, seed=2), draw(10, WIDTH, seed=3)
    wanted = inputs + draw(200, WIDTH, seed=4, scale=0.3)
    moved = []
    for keep_weight in (0.0, 1.0, 1e3, 1e6):
        solution = problem(inputs, wanted, kept, keep_weight, pinned).factored(1e-6).solve(weight, 6)
        stated = residual(answers_of(weight, kept, None), solution.up, solution.down, kept)
        by_hand = (kept @ (solution.up @ solution.down).T).norm() / (kept @ weight.T).norm()
        assert stated.before == 0.0 and stated.after == pytest.approx(float(by_hand), rel=1e-9)
        moved.append(stated.after)
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 1e-3 * moved[0]


def test_a_constant_input_of_zero_asks_for_nothing():
    weight, inputs = draw(OUT, WIDTH, seed=1), draw(100, WIDTH, seed=2)
    wanted = inputs + draw(100, WIDTH, seed=3, scale=0.3)
    found = [
        problem(inputs, wanted, pinned=pinned).factored(1e-3).solve(weight, 4)
        for pinned in (None, torch.zeros(WIDTH, dtype=torch.float64))
    ]
    assert torch.equal(found[0].up, found[1].up) and torch.equal(found[0].down, found[1].down)


def test_a_larger_ridge_gives_a_smaller_change():
    weight, inputs = draw(OUT, WIDTH, seed=1), draw(100, WIDTH, seed=2)
    found = problem(inputs, inputs + draw(100, WIDTH, seed=3, scale=0.3))
    sizes = []
    for ridge in (1e-4, 1e-2, 1.0, 100.0):
        solution = found.factored(ridge).solve(weight, 4)
        sizes.append(float((solution.up @ solution.down).norm()))
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.02 * sizes[0]


def test_a_start_from_another_map_changes_nothing_but_the_time():
    weights = draw(OUT, WIDTH, seed=1), draw(OUT, WIDTH, seed=9)
    inputs = draw(100, WIDTH, seed=2)
    solved = problem(inputs, inputs + draw(100, WIDTH, seed=3, scale=0.3)).factored(1e-3)
    alone = solved.solve(weights[1], OUT)
    led = solved.solve(weights[1], OUT, solved.solve(weights[0], OUT).singular.block)
    assert torch.allclose(alone.up @ alone.down, led.up @ led.down, atol=1e-8)


def test_moments_are_the_sums_and_symmetric():
    inputs, wanted = draw(50, WIDTH, seed=1), draw(50, WIDTH, seed=2)
    found = moments(inputs, wanted)
    assert found.num_tokens == 50 and found.is_changed
    assert torch.allclose(found.inputs(), inputs.T @ inputs) and torch.equal(found.inputs(), found.inputs().T)
    assert torch.allclose(found.wanted(), (wanted - inputs).T @ inputs)
    assert not moments(inputs, inputs).is_changed and moments(inputs).wanted() is None


def test_a_weight_counts_tokens_several_times():
    inputs, wanted = draw(6, WIDTH, seed=1), draw(6, WIDTH, seed=2)
    weighted, repeated = Moments(WIDTH), Moments(WIDTH)
    weighted.add(inputs, wanted, weight=3.0)
    for _ in range(3):
        repeated.add(inputs, wanted)
    assert weighted.weight == repeated.weight == 18 and weighted.num_tokens == 6
    assert torch.allclose(weighted.inputs(), repeated.inputs())
    assert torch.allclose(weighted.wanted(), repeated.wanted())


@pytest.mark.parametrize("ridge", [0.0, 1e-16])
def test_a_singular_system_is_refused(ridge):
    inputs = draw(WIDTH // 2, WIDTH, seed=2)
    with pytest.raises(UserError, match=r"--ridge .* singular"):
        problem(inputs, 2 * inputs).factored(ridge)


def test_too_few_independent_tokens_are_counted():
    inputs = draw(40, 3, seed=1) @ draw(3, WIDTH, seed=2)
    assert problem(inputs, 2 * inputs, needed=3).num_independent == 3
    with pytest.raises(UserError, match="hold 3 independent tokens, and rank 4 needs"):
        problem(inputs, 2 * inputs, needed=4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_refused(bad, side):
    pair = [draw(5, WIDTH, seed=1), draw(5, WIDTH, seed=2)]
    pair[side][2, 3] = bad
    with pytest.raises(UserError, match="NaN or infinite"):
        Moments(WIDTH).add(*pair)
