"""`expert = "both"` as a person runs it: two ordinary runs in one directory, one report, and a pair that goes on when cut."""

import json
import os
import signal
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.helpers.layouts import write_comfyui, write_diffusers
from tests.helpers.workspace import Workspace, check_refused, make_workspace
from utils import run as runs
from utils.config.load import load_config
from utils.metrics import read_metrics
from utils.probe_outcomes import read_outcomes
from utils.saved_runs import RUN_CONFIG_NAME
from utils.trainer import Trainer

EXPERTS = ("high_noise", "low_noise")
SETTINGS = (
    "model.shift=5.0",
    "max_steps=4",
    "checkpoint_every_n_steps=2",
    "adapter.dropout=0.2",
    "adapter.high_noise.rank=2",
    "adapter.low_noise.train_blocks_range=[2, 3]",
)
BOTH = ("model.expert=both", *SETTINGS)


@pytest.fixture
def workspace(tmp_path, tiny_t2v, tiny_dataset) -> Workspace:
    return make_workspace(tmp_path, tiny_t2v, tiny_dataset)


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_t2v, tiny_dataset) -> Workspace:
    """An uninterrupted pair, evaluated too."""
    workspace = make_workspace(tmp_path_factory.mktemp("pair"), tiny_t2v, tiny_dataset)
    ended = workspace.launch(
        ["python"], "dit_lora", *BOTH, f'eval_datasets=["{workspace.root / "dataset.toml"}"]'
    )
    assert ended.returncode == 0, ended.stderr
    (workspace.root / "said").write_text(ended.stderr)
    return workspace


def document(pair: Path) -> dict:
    return json.loads((pair / "pair.json").read_text())


def statuses(pair: Path) -> list[str]:
    return [one["status"] for one in document(pair)["experts"].values()]


def assert_same(pair: Path, other: Path) -> None:
    """Both experts have the same losses, and adapters with the same bits."""
    for expert in EXPERTS:
        rows, others = read_metrics(pair / expert), read_metrics(other / expert)
        assert [row["loss"] for row in rows] == [row["loss"] for row in others]
        name = f"adapter_{expert}.safetensors"
        found, expected = load_file(pair / name), load_file(other / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


# ---------------------------------------------------------------------- what a pair leaves


def test_each_experts_timesteps_stay_on_its_side(done) -> None:
    pair, told = done.run(), document(done.run())["experts"]
    for expert, low, high in (("high_noise", 875.0, 1000.0), ("low_noise", 0.0, 874.9999)):
        ranges = [row["timesteps"] for row in read_metrics(pair / expert)]
        assert len(ranges) == 4
        assert all(low <= one["min"] <= one["max"] <= high for one in ranges)
        assert told[expert]["timesteps"] == {
            "min": min(one["min"] for one in ranges),
            "max": max(one["max"] for one in ranges),
        }
        # 8 visits that were all of one timestep would prove nothing.
        assert told[expert]["timesteps"]["max"] - told[expert]["timesteps"]["min"] > 10


def test_the_directory_holds_two_runs_and_both_adapters(done) -> None:
    pair = done.run()
    assert sorted(path.name for path in pair.iterdir()) == [
        "adapter_high_noise.safetensors",
        "adapter_low_noise.safetensors",
        "high_noise",
        "low_noise",
        "pair.json",
        "report.md",
    ]
    for expert in EXPERTS:
        run = pair / expert
        saved = run / "epoch2" / "adapter_model.safetensors"
        assert (pair / f"adapter_{expert}.safetensors").read_bytes() == saved.read_bytes()
        config = load_config(run / RUN_CONFIG_NAME).train
        assert config.model.expert == expert and config.adapter is not None
        assert config.adapter.high_noise is None and config.adapter.low_noise is None
        assert {path.name for path in run.iterdir()} >= {
            "inputs",
            "targets.json",
            "base_keys.csv",
            "dataset.csv",
        }
    assert not done.leftovers()


def test_the_adapters_of_an_expert_are_as_its_table_says(done) -> None:
    pair = done.run()
    high, low = (load_file(pair / f"adapter_{expert}.safetensors") for expert in EXPERTS)
    assert {tensor.shape[0] for name, tensor in high.items() if "lora_A" in name} == {2}
    assert {tensor.shape[0] for name, tensor in low.items() if "lora_A" in name} == {4}
    assert {name.split(".")[2] for name in high} == {"0", "1", "2", "3"}
    assert {name.split(".")[2] for name in low} == {"2", "3"}


def test_metadata_say_which_expert_each_adapter_is_for(done) -> None:
    facts = [metadata_of(done.run() / f"adapter_{expert}.safetensors") for expert in EXPERTS]
    assert [one["expert"] for one in facts] == list(EXPERTS)
    assert {one["boundary"] for one in facts} == {"0.875"} and {one["variant"] for one in facts} == {
        "t2v-a14b"
    }
    assert len({one["base_hash"] for one in facts}) == 2
    assert len({one["encoder_hash"] for one in facts}) == 1
    assert [one["rank"] for one in facts] == ["2", "4"]


def test_one_report_for_both(done) -> None:
    pair = done.run()
    told = document(pair)
    assert told["is_complete"] and (told["variant"], told["boundary"]) == ("t2v-a14b", 0.875)
    text = (pair / "report.md").read_text()
    for expert, one in told["experts"].items():
        rows = read_metrics(pair / expert)
        assert one["status"] == "complete" and one["adapter"] == f"adapter_{expert}.safetensors"
        assert one["progress"]["loss_first_step"] == rows[0]["loss"]
        assert one["progress"]["loss_last_step"] == rows[-1]["loss"]
        assert f"{rows[0]['loss']:.4f} -> {rows[-1]['loss']:.4f}" in text
        # As [budget] measured it on the live parameters.
        assert one["delta"]["max_ratio"] == pytest.approx(rows[-1]["max_delta_ratio"], rel=1e-5)
        assert one["delta"]["mean_ratio"] == pytest.approx(rows[-1]["mean_delta_ratio"], rel=1e-5)
        assert one["delta"]["max_ratio"] > 0
        assert [row["step"] for row in one["evaluations"]] == [4]
        assert one["metadata"]["expert"] == expert
    shares = [one["noise"]["share_of_range"] for one in told["experts"].values()]
    assert sum(shares) == pytest.approx(1.0) and shares[0] == pytest.approx(0.368, abs=1e-3)
    assert "36.8%" in text and "63.2%" in text


def test_what_a_person_is_told(done) -> None:
    said = (done.root / "said").read_text()
    assert said.count("6 encoded now") == 1, "the second expert scans and encodes nothing"
    assert said.index("expert 1 of 2: high_noise") < said.index("expert 2 of 2: low_noise")
    assert "timesteps (noise level x 1000)" in said and "36.8% on the side of high_noise" in said
    assert f"adapters of the pair: {done.run() / 'adapter_high_noise.safetensors'}" in said


@pytest.mark.parametrize("expert", EXPERTS)
def test_each_half_is_what_a_run_of_that_expert_alone_is(done, workspace, expert) -> None:
    other = "low" if expert == "high_noise" else "high"
    own = [value for value in SETTINGS if not value.startswith(f"adapter.{other}_noise")]
    assert workspace.train("dit_lora", f"model.expert={expert}", *own) == 0
    run, half = workspace.run(), done.run() / expert
    assert [row["loss"] for row in read_metrics(run)] == [row["loss"] for row in read_metrics(half)]
    alone, paired = (load_file(path / "epoch2/adapter_model.safetensors") for path in (run, half))
    assert alone.keys() == paired.keys() and all(torch.equal(alone[key], paired[key]) for key in alone)


# ---------------------------------------------------------------------- cut off and continued


def interrupt_at(monkeypatch: pytest.MonkeyPatch, expert: str, step: int) -> None:
    """One Ctrl-C while the run of this expert is in this step."""
    real, sent = Trainer._step, []

    def stepping(self, state, ahead):
        if self._config.model.expert == expert and state.step == step - 1 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return real(self, state, ahead)

    monkeypatch.setattr(Trainer, "_step", stepping)


@pytest.mark.parametrize(
    ("expert", "step", "left"),
    [
        ("high_noise", 3, ["begun", "not begun"]),
        ("high_noise", 4, ["complete", "not begun"]),
        ("low_noise", 1, ["complete", "begun"]),
    ],
)
def test_a_pair_that_was_stopped_goes_on_as_if_it_had_not(
    done, workspace, monkeypatch, capsys, expert, step, left
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, expert, step)
        assert workspace.train("dit_lora", *BOTH) == 0
    pair = workspace.run()
    assert f"--resume_from_checkpoint {pair}" in capsys.readouterr().err
    assert statuses(pair) == left and not document(pair)["is_complete"]
    assert (pair / "adapter_high_noise.safetensors").exists() == (left[0] == "complete")
    assert not (pair / "adapter_low_noise.safetensors").exists()
    assert workspace.train("dit_lora", *BOTH, flags=["--resume_from_checkpoint"]) == 0
    assert workspace.run() == pair and document(pair)["is_complete"]
    assert_same(pair, done.run())


@pytest.mark.long
def test_a_finished_pair_has_nothing_left_to_do_and_more_steps_go_on_in_both(workspace, capsys) -> None:
    assert workspace.train("dit_lora", *BOTH, "max_steps=2") == 0
    pair = workspace.run()
    assert (
        workspace.train("dit_lora", *BOTH, "max_steps=2", flags=["--resume_from_checkpoint", pair.name]) == 0
    )
    assert capsys.readouterr().err.count("is finished (2 of 2 steps)") == 2
    assert (
        workspace.train("dit_lora", *BOTH, flags=["--resume_from_checkpoint", str(pair / "low_noise")]) == 0
    )
    assert [one["progress"]["steps"] for one in document(pair)["experts"].values()] == [4, 4]


def test_a_changed_setting_of_either_expert_is_refused(workspace, capsys) -> None:
    assert workspace.train("dit_lora", *BOTH, "max_steps=1") == 0
    code = workspace.train("dit_lora", *BOTH, "adapter.low_noise.rank=3", flags=["--resume_from_checkpoint"])
    check_refused(code, capsys.readouterr().err, "adapter.rank: 4 -> 3", "/low_noise")


def test_one_half_alone_is_continued_with_its_own_configuration(workspace, capsys) -> None:
    assert workspace.train("dit_lora", *BOTH, "max_steps=2") == 0
    pair = workspace.run()
    own = [value for value in SETTINGS if not value.startswith("adapter.low_noise")]
    code = workspace.train(
        "dit_lora", "model.expert=high_noise", *own, flags=["--resume_from_checkpoint", str(pair)]
    )
    check_refused(code, capsys.readouterr().err, "is a pair of runs", f"{pair / 'high_noise'}")
    flags = ["--resume_from_checkpoint", str(pair / "high_noise")]
    assert workspace.train("dit_lora", "model.expert=high_noise", *own, flags=flags) == 0
    assert len(read_metrics(pair / "high_noise")) == 4 and len(read_metrics(pair / "low_noise")) == 2


def test_what_is_no_pair_cannot_be_continued_as_one(workspace, capsys) -> None:
    code = workspace.train("dit_lora", *BOTH, flags=["--resume_from_checkpoint", "absent"])
    check_refused(code, capsys.readouterr().err, "absent", "the directory of a pair")
    assert not workspace.runs()


# ---------------------------------------------------------------------- before the first step, and in the way


def test_dry_run_builds_both_and_writes_nothing(workspace, capsys) -> None:
    assert workspace.train("dit_lora", *BOTH, flags=["--dry_run"]) == 0
    said = capsys.readouterr().err
    assert said.count("trained parameters") == 2 and "dry run: everything is in place" in said
    assert not workspace.runs()


def test_cache_only_fills_the_one_cache(workspace, capsys) -> None:
    assert workspace.train("dit_lora", *BOTH, flags=["--cache_only"]) == 0
    assert capsys.readouterr().err.count("cache complete") == 1
    assert not workspace.runs()


def test_a_cap_that_stops_the_first_expert_stops_the_pair(workspace, capsys) -> None:
    code = workspace.train(
        "dit_lora", *BOTH, "budget.max_delta_ratio=1e-9", "budget.action=stop", "budget.every_n_steps=1"
    )
    said = capsys.readouterr().err
    assert code == 1 and "stopped: high_noise expert: step 1" in said
    assert "The low_noise expert has not been begun" in said
    assert statuses(workspace.run()) == ["begun", "not begun"]
    assert not list(workspace.run().glob("adapter_*"))


@pytest.mark.long
def test_probes_look_at_both_under_names_that_differ(workspace) -> None:
    reports = workspace.root / "reports"
    values = ('probes.run=["lora_delta_budget"]', f"probes.reports_dir={reports}", "max_steps=1")
    assert workspace.train("dit_lora", *BOTH, *values) == 0
    pair = workspace.run()
    outcomes = [row for expert in EXPERTS for row in read_outcomes(pair / expert)]
    assert [row["result"] for row in outcomes] == ["pass", "pass"]
    names = sorted(path.name for path in (reports / "lora_delta_budget").iterdir())
    assert names == [f"{pair.name}_{expert}_epoch1" for expert in EXPERTS]
    experts = document(pair)["experts"]
    assert [len(one["probes"]) for one in experts.values()] == [1, 1]
    assert "## Probes" in (pair / "report.md").read_text()


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("pipeline_stages=2",), marks=pytest.mark.long),
        pytest.param(("zero_stage=1", "gradient_accumulation_steps=1"), marks=pytest.mark.long),
    ],
)
def test_two_processes_train_the_same_pair(done, workspace, layout) -> None:
    """The engine is built twice in the same processes, on stages and on copies."""
    launcher = ["torchrun", "--standalone", "--nproc_per_node", "2"]
    ended = workspace.launch(launcher, "dit_lora", *BOTH, *layout)
    assert ended.returncode == 0, ended.stderr
    for expert in EXPERTS:
        found = [row["loss"] for row in read_metrics(workspace.run() / expert)]
        assert found == [row["loss"] for row in read_metrics(done.run() / expert)]


def test_nothing_of_the_first_model_is_left_when_the_second_is_built(workspace, monkeypatch) -> None:
    """Two models do not fit where one does."""
    held: list[weakref.ref] = []
    alive: list[int] = []
    real_run, real_build = runs.run, runs.build

    def running(ready, *rest):
        ended = real_run(ready, *rest)
        held.extend(weakref.ref(parameter) for parameter in ready.pipeline.parameters.values())
        held.append(weakref.ref(ready.pipeline.optimizer))
        return ended

    def building(*arguments):
        alive.append(sum(one() is not None for one in held))
        return real_build(*arguments)

    monkeypatch.setattr(runs, "run", running)
    monkeypatch.setattr(runs, "build", building)
    assert workspace.train("dit_lora", *BOTH, "max_steps=1", "blocks_to_swap=1") == 0
    assert alive == [0, 0] and len(held) > 200


@pytest.mark.long
def test_a_probe_that_stops_the_first_expert_stops_the_pair_until_it_is_let_pass(workspace, capsys) -> None:
    values = (*BOTH, "max_steps=1", "budget.max_delta_ratio=1e-9", 'probes.run=["lora_delta_budget"]')
    values = (*values, f"probes.reports_dir={workspace.root / 'reports'}")
    assert workspace.train("dit_lora", *values, "probes.on_fail=stop") == 1
    assert "The low_noise expert has not been begun" in capsys.readouterr().err
    pair = workspace.run()
    assert statuses(pair) == ["complete", "not begun"]
    assert workspace.train("dit_lora", *values, flags=["--resume_from_checkpoint"]) == 0
    assert statuses(pair) == ["complete", "complete"]


def test_image_to_video_has_its_own_boundary(tmp_path, tiny_i2v, tiny_dataset) -> None:
    workspace = make_workspace(tmp_path, tiny_i2v, tiny_dataset)
    assert workspace.train("dit_lora", *BOTH, "model.shift=12.0") == 0
    told = document(workspace.run())
    assert (told["variant"], told["boundary"]) == ("i2v-a14b", 0.9)
    high, low = (one["timesteps"] for one in told["experts"].values())
    assert high["min"] >= 900 and low["max"] < 900


@pytest.mark.parametrize("write", [write_diffusers, write_comfyui])
def test_both_experts_are_found_in_every_layout(done, workspace, tmp_path, tiny_t2v, write) -> None:
    other = Workspace(workspace.root, write(tiny_t2v, tmp_path / "other"))
    assert other.train("dit_lora", *BOTH) == 0
    for expert in EXPERTS:
        found = [row["loss"] for row in read_metrics(other.run() / expert)]
        assert found == [row["loss"] for row in read_metrics(done.run() / expert)]


# ---------------------------------------------------------------------- files of the other expert


def test_an_adapter_of_the_other_expert_is_refused(done, workspace, capsys) -> None:
    high = done.run() / "adapter_high_noise.safetensors"
    code = workspace.train(
        "dit_lora", "model.expert=low_noise", "adapter.rank=2", f"adapter.init_from_existing={high}"
    )
    check_refused(
        code, capsys.readouterr().err, "adapter for the high_noise expert", "adapter.init_from_existing"
    )
    code = workspace.train("dit_lora", *BOTH, f"adapter.low_noise.init_from_existing={high}")
    check_refused(
        code,
        capsys.readouterr().err,
        "adapter for the high_noise expert",
        "adapter.low_noise.init_from_existing",
    )


def test_a_pair_goes_on_from_an_earlier_pairs_adapters(done, workspace) -> None:
    started = [
        f"adapter.{expert}.init_from_existing={done.run() / f'adapter_{expert}.safetensors'}"
        for expert in EXPERTS
    ]
    assert workspace.train("dit_lora", *BOTH, *started, "max_steps=1") == 0
    before, after = (
        document(place.run())["experts"]["low_noise"]["delta"]["max_ratio"] for place in (done, workspace)
    )
    assert after > before / 2
