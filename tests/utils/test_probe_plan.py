"""Which probes look at which saves, in which order, and what they are called with."""

from pathlib import Path

import pytest

from utils.config.parse import parse_table
from utils.config.schema import TrainConfig
from utils.probe_plan import plan_probes, repeated, report_tag


def config(*, encoder: bool = False, **sections) -> TrainConfig:
    table = {
        "output_dir": "output/x",
        "dataset": "dataset.toml",
        "model": {
            "ckpt_path": "ckpt",
            "type": "wan",
            "cache_text_embeddings": not encoder,
            "train_text_encoder": encoder,
            "freeze_transformer": True,
        },
        "optimizer": {"lr": 1e-4},
        **sections,
    }
    parsed = parse_table(TrainConfig, table)
    assert not parsed.problems
    return parsed.draft


@pytest.mark.parametrize(
    ("named", "order"),
    [
        (["dit_lora_translator"], ["prompt_grid", "dit_lora_translator"]),
        (
            ["lora_delta_budget", "dit_lora_translator", "attn_logit_probe"],
            ["lora_delta_budget", "prompt_grid", "dit_lora_translator", "attn_logit_probe"],
        ),
        (["lora_delta_budget", "attn_logit_probe"], ["lora_delta_budget", "attn_logit_probe", "prompt_grid"]),
    ],
)
def test_the_grid_is_there_before_the_report_that_shows_it(named, order) -> None:
    planned = plan_probes(config(probes={"run": named}, samples={}))
    assert [probe.tool for probe in planned] == order


def test_without_a_section_nothing_is_planned() -> None:
    assert plan_probes(config()) == ()


def test_the_grid_is_pointed_at_what_a_mode_saves() -> None:
    (grid,) = plan_probes(config(samples={"device": "cuda:1"}))
    assert grid.words(Path("run/epoch3")) == ["--run", "adapter=run/epoch3", "--device", "cuda:1"]
    assert grid.sees_gpus and grid.reports_dir == "reports" and not grid.can_stop
    (grid,) = plan_probes(config(encoder=True, samples={}))
    assert grid.words(Path("run/epoch3")) == ["--run", "encoder=run/epoch3", "--device", "cpu"]
    assert not grid.sees_gpus


def test_reports_of_a_run_lie_in_one_place() -> None:
    probes = {"run": ["lora_delta_budget"], "reports_dir": "there", "on_fail": "stop"}
    delta, grid = plan_probes(config(probes=probes, samples={}))
    assert delta.reports_dir == grid.reports_dir == "there"
    assert delta.can_stop and not grid.can_stop and delta.words(Path("a")) == ["--adapter", "a"]


def test_each_section_has_its_own_epochs() -> None:
    delta, grid = plan_probes(config(probes={"run": ["lora_delta_budget"]}, samples={"every_n_epochs": 2}))
    assert [probe.is_due(1, at_end=False) for probe in (delta, grid)] == [True, False]
    assert grid.is_due(2, at_end=False) and grid.is_due(3, at_end=True)


def test_names_of_reports(tmp_path) -> None:
    assert report_tag(tmp_path / "20310101_120000", "epoch3") == "20310101_120000_epoch3"
    (tmp_path / "pair.json").write_text("{}")
    assert report_tag(tmp_path / "low_noise", "step9") == f"{tmp_path.name}_low_noise_step9"
    assert [repeated("a", number) for number in (1, 2)] == ["a", "a-2"]
