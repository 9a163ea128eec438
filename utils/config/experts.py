"""A14B's two experts in a configuration: what `expert = "both"` and `[adapter.<expert>]` stand for, resolved.

Whatever trains, plans or measures works with one expert: with the configuration of a `side`, in which `expert` names it
and `[adapter]` holds its own values.
"""

import functools
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from utils.config.introspect import keys_of
from utils.config.rules import Rule
from utils.config.schema import (
    AdapterConfig,
    Expert,
    ExpertAdapterConfig,
    LoadedConfig,
    ModelConfig,
    Problem,
    TrainConfig,
)

EXPERTS: tuple[Expert, ...] = ("high_noise", "low_noise")
BOTH = "both"
_FILTERS = ("include", "exclude", "train_blocks_range")
_ADAPTER = "adapter."

Check = Callable[[Any], list[Problem]]


def is_pair(config: TrainConfig) -> bool:
    """Whether both experts are trained, one after the other, in runs of their own."""
    return config.model.expert == BOTH and not config.model.train_text_encoder


def alternates(config: TrainConfig) -> bool:
    """Whether one text encoder is trained through both experts, step by step in turn."""
    return config.model.expert == BOTH and config.model.train_text_encoder


def expert_of_turn(seed: int, turn: int) -> Expert:
    """The expert of an optimizer step, counted from 0, where both take turns; the seed says which begins."""
    return EXPERTS[(seed + turn) % len(EXPERTS)]


def sides_of(config: TrainConfig) -> tuple[Expert, ...]:
    """The experts that a configuration trains with, in the order of runs; none where the model has none."""
    expert = only_expert(config)
    if expert is not None:
        return (expert,)
    return EXPERTS if config.model.expert == BOTH else ()


def only_expert(config: TrainConfig) -> Expert | None:
    """The one expert that is trained; None where there are none, and for both."""
    return expert_of_model(config.model)


def expert_of_model(model: ModelConfig) -> Expert | None:
    """`only_expert` of a `[model]`."""
    return next((expert for expert in EXPERTS if expert == model.expert), None)


def side_config(config: TrainConfig, expert: Expert) -> TrainConfig:
    """The configuration of one expert alone: what trains it, and what its run directory holds in a pair.

    Of the pair's `min_t` and `max_t` each expert gets the one on its side; the boundary is its other end.
    """
    return replace(
        config, model=side_model(config.model, expert), adapter=_side_adapter(config.adapter, expert)
    )


def side_model(model: ModelConfig, expert: Expert) -> ModelConfig:
    """`[model]` of `side_config`."""
    if model.expert != BOTH:
        return replace(model, expert=expert)
    other = "min_t" if expert == "high_noise" else "max_t"
    return replace(model, **{"expert": expert, other: keys_of(ModelConfig)[other].default})


def settled(config: TrainConfig) -> TrainConfig:
    """With the values of `[adapter.<expert>]` in `[adapter]` where one expert is trained; a pair stays as it is."""
    sides = sides_of(config)
    return side_config(config, sides[0]) if len(sides) == 1 else config


def first_side(model: ModelConfig) -> ModelConfig:
    """Of a pair the `[model]` of the first expert, also for whatever both share: data, caches, variant. Else the same."""
    return side_model(model, EXPERTS[0]) if model.expert == BOTH else model


def loaded_side(loaded: LoadedConfig, expert: Expert) -> LoadedConfig:
    """`side_config` of a loaded configuration."""
    return replace(loaded, train=side_config(loaded.train, expert))


def _side_adapter(adapter: AdapterConfig | None, expert: Expert) -> AdapterConfig | None:
    if adapter is None:
        return None
    own: ExpertAdapterConfig | None = getattr(adapter, expert)
    plain = replace(adapter, high_noise=None, low_noise=None)
    if own is None:
        return plain
    given = given_keys(own)
    values = {name: getattr(own, name) for name in given}
    defaults = keys_of(AdapterConfig)
    # Exact modules and filters exclude each other, so whichever an expert names puts [adapter]'s others out of force.
    if "include_file" in given:
        values = {name: defaults[name].default for name in _FILTERS} | values
    elif not given.isdisjoint(_FILTERS):
        values = {"include_file": None} | values
    return replace(plain, **values)


def given_keys(own: ExpertAdapterConfig) -> frozenset[str]:
    """The keys that an `[adapter.<expert>]` gives."""
    return frozenset(field.name for field in fields(own) if getattr(own, field.name) is not None)


def on_each_side(check: Check) -> Check:
    """The check of an `[adapter]`, made of what each trained expert's adapter resolves to.

    A problem names the key that the value at fault came from, and one that all experts share is told once.
    """

    @functools.wraps(check)
    def checked(config: TrainConfig) -> list[Problem]:
        if config.adapter is None or (config.adapter.high_noise is None and config.adapter.low_noise is None):
            return check(config)
        if config.model is None:  # in a draft without a usable [model]: which expert is meant is not known
            return check(config)
        problems: list[Problem] = []
        for expert in sides_of(config):
            found = [
                name_origin(problem, config.adapter, expert) for problem in check(side_config(config, expert))
            ]
            problems += [problem for problem in found if problem not in problems]
        return problems

    return checked


def name_origin(problem: Problem, adapter: AdapterConfig | None, expert: Expert) -> Problem:
    """The problem of an expert's resolved configuration, under the key that its value was given by."""
    own = None if adapter is None else getattr(adapter, expert)
    if own is None or not (problem.key + ".").startswith(_ADAPTER):
        return problem
    name = problem.key.removeprefix(_ADAPTER).partition(".")[0]
    if problem.key == "adapter" or name in given_keys(own):
        return replace(problem, key=f"adapter.{expert}{problem.key.removeprefix('adapter')}")
    return problem


def check_expert_adapters(config: TrainConfig) -> list[Problem]:
    """[adapter.high_noise] and [adapter.low_noise] stand only where model.expert trains that expert."""
    if config.adapter is None:
        return []
    problems = []
    trained = sides_of(config)
    for expert in EXPERTS:
        own = getattr(config.adapter, expert)
        if own is None or expert in trained:
            continue
        if not trained:
            reason = "would be ignored: model.expert is not set, so the model has no experts"
            fix = f'put its keys into [adapter]; for an A14B model write expert = "{expert}" or "both" in [model]'
        else:
            reason = f'would be ignored: model.expert is "{config.model.expert}", so the {expert} expert is not trained'
            fix = 'take the section out, or write expert = "both"'
        problems.append(Problem(f"adapter.{expert}", reason, fix))
    problems += [
        Problem(
            f"adapter.{expert}", "is empty", "give a key that is different for this expert, or take it out"
        )
        for expert in trained
        if (own := getattr(config.adapter, expert)) is not None and not given_keys(own)
    ]
    return problems


EXPERT_RULES = (Rule(check_expert_adapters, ("model.expert", "adapter.high_noise", "adapter.low_noise")),)
