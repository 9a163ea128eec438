import pytest
import torch
from torch import nn

from scripts.tiny_world import loop
from scripts.tiny_world.loop import Schedule, train

FIT = Schedule(num_steps=40, lr=0.1, betas=(0.9, 0.95), warm_up=4, ema=0.9)


def fit(work, schedule=FIT, stop_at=None, shape=(3,), matrices=()):
    parameter, other = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(3))
    losses = []

    def loss_of(step, draws):
        if step == stop_at:
            raise KeyboardInterrupt
        target = torch.ones(3) + 0.1 * torch.randn(3, generator=draws.noise) + 0.01 * draws.scenes.random()
        losses.append((parameter - target).square().mean() + (other - target).square().mean())
        return losses[-1]

    end = train("fit", {"p": parameter, "o": other}, schedule, loss_of, 0, work, lambda _: None, matrices)
    return parameter.detach(), end, len(losses)


def test_it_learns_and_repeats_itself(tmp_path):
    first, loss, _ = fit(tmp_path)
    assert torch.allclose(first, torch.ones(3), atol=0.2)
    assert 0 < loss < 1
    again, _, count = fit(tmp_path)  # finished before: nothing is left to do
    assert count == 0
    assert torch.equal(again, first)


@pytest.mark.parametrize("kind", [{}, {"shape": (2, 3), "matrices": ["p"]}])
def test_an_interrupted_training_goes_on_to_the_same_bits(kind, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    monkeypatch.setattr(loop, "_SAVE_EVERY", 10)
    whole, _, _ = fit(tmp_path / "whole", **kind)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "broken", stop_at=27, **kind)
    resumed, _, count = fit(tmp_path / "broken", **kind)
    assert count == 20
    assert torch.equal(resumed, whole)


def test_matrices_are_trained_by_muon(tmp_path):
    (tmp_path / "adamw").mkdir()
    (tmp_path / "muon").mkdir()
    adamw, _, _ = fit(tmp_path / "adamw", shape=(2, 3))
    muon, loss, _ = fit(tmp_path / "muon", shape=(2, 3), matrices=["p"])
    assert 0 < loss < 1
    assert not torch.equal(adamw, muon)


def test_the_running_mean_is_what_stays(tmp_path):
    (tmp_path / "mean").mkdir()
    (tmp_path / "last").mkdir()
    mean, _, _ = fit(tmp_path / "mean")
    last, _, _ = fit(tmp_path / "last", Schedule(num_steps=40, lr=0.1, betas=(0.9, 0.95), warm_up=4))
    assert not torch.equal(mean, last)
    assert torch.allclose(mean, last, atol=0.2)


def test_the_learning_rate_warms_up_stays_and_falls():
    schedule = Schedule(num_steps=1000, lr=1.0, betas=(0.9, 0.9))
    assert schedule.lr_at(0) == pytest.approx(1 / 50)
    assert schedule.lr_at(100) == schedule.lr_at(600) == 1.0
    assert schedule.lr_at(800) == pytest.approx(0.5)
    assert schedule.lr_at(999) == pytest.approx(0.01)
