"""What may stand together with `adapter.init = "closed_form"`: each rule refusing once and permitting once."""

from dataclasses import replace

import pytest

from utils.config.changes import config_changes
from utils.config.closed_form_rules import CLOSED_FORM_RULES, closed_form_reports_dir, is_solved_for
from utils.config.parse import parse_table
from utils.config.rules import run_rules
from utils.config.schema import TrainConfig

MODEL = {
    "type": "wan",
    "ckpt_path": "ckpt",
    "llm_path": "tuned.safetensors",
    "cache_text_embeddings": True,
    "train_text_encoder": False,
    "freeze_transformer": True,
}
SOLVED = {"init": "closed_form"}


def table(adapter, model=None, **top):
    given = {"output_dir": "output/x", "dataset": "d.toml", "optimizer": {"lr": 1e-4}, "adapter": adapter}
    return given | {"model": {key: value for key, value in (MODEL | (model or {})).items() if value}} | top


def draft(*args, **given) -> TrainConfig:
    parsed = parse_table(TrainConfig, table(*args, **given))
    return parsed.draft


def keys(config: TrainConfig) -> list[str]:
    return [problem.key for problem in run_rules(CLOSED_FORM_RULES, config)]


@pytest.mark.parametrize(
    "config",
    [
        draft({}),
        draft({}, {"llm_path": None}),
        draft(SOLVED),
        draft(SOLVED | {"closed_form": {"ridge": 0.5, "device": "cuda:1", "domain_prompts": "d.txt"}}),
        draft(SOLVED | {"closed_form": {"reports_dir": "reports"}}),
        draft({"init_from_existing": "file"}),
        draft(SOLVED | {"high_noise": {"rank": 2}}, {"expert": "both"}),
    ],
)
def test_what_is_permitted(config):
    assert keys(config) == []


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (draft({"closed_form": {"ridge": 0.5}}), "adapter.closed_form"),
        (draft(SOLVED | {"init_from_existing": "file"}), "adapter.init_from_existing"),
        (
            draft(SOLVED | {"low_noise": {"init_from_existing": "file"}}, {"expert": "both"}),
            "adapter.low_noise.init_from_existing",
        ),
        (draft(SOLVED, {"llm_path": None}), "model.llm_path"),
        (
            draft(SOLVED | {"closed_form": {"domain_prompts": "d", "keywords_file": "k"}}),
            "adapter.closed_form.keywords_file",
        ),
        (draft(SOLVED | {"closed_form": {"device": "gpu"}}), "adapter.closed_form.device"),
        (
            draft(SOLVED | {"closed_form": {"reports_dir": "output/x/reports"}}),
            "adapter.closed_form.reports_dir",
        ),
        (draft(SOLVED, output_dir="reports/x"), "adapter.closed_form.reports_dir"),
    ],
)
def test_what_is_refused(config, key):
    assert keys(config) == [key]


def test_reports_go_where_those_of_the_probes_go():
    probes = {"run": ["lora_delta_budget"], "reports_dir": "other"}
    assert closed_form_reports_dir(draft(SOLVED)) == "reports"
    assert closed_form_reports_dir(draft(SOLVED, probes=probes)) == "other"
    own = draft(SOLVED | {"closed_form": {"reports_dir": "own"}}, probes=probes)
    assert closed_form_reports_dir(own) == "own"
    assert is_solved_for(own) and not is_solved_for(draft({}))


def test_what_may_differ_when_a_run_goes_on():
    before = draft(SOLVED | {"closed_form": {"ridge": 0.5}})
    free = draft(SOLVED | {"closed_form": {"ridge": 0.5, "device": "cpu", "reports_dir": "r"}})
    assert config_changes(before, free) == []
    assert before.adapter is not None
    others = (
        draft(SOLVED | {"closed_form": {"ridge": "auto"}}),
        draft(SOLVED | {"closed_form": {"ridge": 0.5, "keep_weight": 2.0}}),
    )
    for other, key in zip(others, ("ridge", "keep_weight"), strict=True):
        assert [change.key for change in config_changes(before, other)] == [f"adapter.closed_form.{key}"]
    plain = replace(before, adapter=replace(before.adapter, init="zero"))
    assert [change.key for change in config_changes(before, plain)] == ["adapter.init"]
