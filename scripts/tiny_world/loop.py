"""The loop that all trainings of the tiny world share: steps that are a function of their number, and can be resumed."""

import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.files import atomic_path
from utils.rng import derive_seed, generator

_SAVE_EVERY = 250
_SAY_EVERY = 100
_MAX_NORM = 1.0
_WEIGHT_DECAY = 0.01
# Muon's update, brought to the length of AdamW's by the library, of this many learning rates.
_MUON_RATES = 2.0


@dataclass(frozen=True)
class Draws:
    """What a step draws from: both follow from the seed, the training's name and the step's number."""

    scenes: random.Random
    noise: torch.Generator


@dataclass(frozen=True)
class Schedule:
    """The optimizers' settings. The learning rate warms up, stays, and falls linearly to a hundredth over the last `decay`."""

    num_steps: int
    lr: float
    betas: tuple[float, float]
    decay: float = 0.4
    warm_up: int = 50
    ema: float | None = None

    def lr_at(self, step: int) -> float:
        """The learning rate of a step."""
        rest = (self.num_steps - step) / max(self.decay * self.num_steps, 1)
        return self.lr * min((step + 1) / self.warm_up, max(rest, 0.01), 1.0)


def train(
    name: str,
    parameters: dict[str, nn.Parameter],
    schedule: Schedule,
    loss_of: Callable[[int, Draws], Tensor],
    seed: int,
    work: Path,
    say: Callable[[str], None],
    matrices: Collection[str] = (),
) -> float:
    """Train in place; with `schedule.ema` the parameters end as their running mean. Returns the mean loss of the end.

    The parameters that `matrices` names, which have two dimensions, are trained by Muon, all others by AdamW.

    The state is kept in `work` every few hundred steps, and is gone on from where it is found there: the result is
    the same, bit for bit, on the same number of threads.
    """
    tensors = list(parameters.values())
    optimizers = _optimizers(parameters, schedule, matrices)
    means = {key: value.detach().clone() for key, value in parameters.items()} if schedule.ema else {}
    first, losses = _resume(work / f"{name}.pt", parameters, optimizers, means)
    started = time.monotonic()
    for step in range(first, schedule.num_steps):
        draws = Draws(random.Random(derive_seed(seed, name, step)), generator(seed, name, step))
        loss = loss_of(step, draws)
        for tensor in tensors:
            tensor.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(tensors, _MAX_NORM)
        for optimizer, rates in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rates * schedule.lr_at(step)
            optimizer.step()
        _follow(means, parameters, schedule.ema, step)
        losses = [*losses[-199:], loss.item()]
        if (step + 1) % _SAY_EVERY == 0:
            pace = (time.monotonic() - started) / (step + 1 - first)
            recent = sum(losses[-_SAY_EVERY:]) / len(losses[-_SAY_EVERY:])
            say(f"{name}: step {step + 1}/{schedule.num_steps}, loss {recent:.4f}, {pace:.3f} s a step")
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == schedule.num_steps:
            state = {
                "step": step + 1,
                "parameters": {key: value.detach() for key, value in parameters.items()},
                "means": means,
                "optimizers": [optimizer.state_dict() for optimizer, _ in optimizers],
                "losses": losses,
            }
            with atomic_path(work / f"{name}.pt") as path:
                torch.save(state, path)
    with torch.no_grad():
        for key, mean in means.items():
            parameters[key].copy_(mean)
    return sum(losses) / max(len(losses), 1)


def _optimizers(
    parameters: dict[str, nn.Parameter], schedule: Schedule, matrices: Collection[str]
) -> list[tuple[torch.optim.Optimizer, float]]:
    """The optimizers, and how many learning rates each goes at."""
    rest = [value for key, value in parameters.items() if key not in matrices]
    found: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW(rest, lr=schedule.lr, betas=schedule.betas, weight_decay=_WEIGHT_DECAY), 1.0)
    ]
    if matrices:
        muon = torch.optim.Muon(
            [parameters[key] for key in matrices],
            lr=schedule.lr,
            weight_decay=_WEIGHT_DECAY,
            adjust_lr_fn="match_rms_adamw",
        )
        found.append((muon, _MUON_RATES))
    return found


def _resume(
    path: Path,
    parameters: dict[str, nn.Parameter],
    optimizers: Sequence[tuple[torch.optim.Optimizer, float]],
    means: dict[str, Tensor],
) -> tuple[int, list[float]]:
    if not path.exists():
        return 0, []
    state = torch.load(path, weights_only=True)
    with torch.no_grad():
        for key, value in state["parameters"].items():
            parameters[key].copy_(value)
        for key, value in state["means"].items():
            means[key].copy_(value)
    for (optimizer, _), held in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(held)
    return int(state["step"]), list(state["losses"])


def _follow(
    means: dict[str, Tensor], parameters: dict[str, nn.Parameter], ema: float | None, step: int
) -> None:
    """Move the running means; at the beginning they forget faster, so that the start leaves no trace."""
    if ema is None:
        return
    keep = min(ema, (step + 1) / (step + 10))
    names: Sequence[str] = list(means)
    with torch.no_grad():
        torch._foreach_lerp_([means[key] for key in names], [parameters[key] for key in names], 1 - keep)
