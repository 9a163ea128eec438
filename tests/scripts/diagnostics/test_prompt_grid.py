"""The frozen-seed grid: what is drawn, what is measured, verdicts, privacy and bad input."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models.wan.checkpoint import TEXT_ENCODER_FILE, open_text_encoder
from models.wan.probes.encoder_prompts import Entry
from models.wan.probes.grid import Cell, parse_column, summarise
from utils.errors import UserError
from utils.report import read_summary

ROOT = Path(__file__).resolve().parents[3]
SECRET = "a zorp beside a lake"
SMALL = ["--size", "64x64", "--steps", "2", "--max_prompts", "1", "--device", "cpu"]


def load_script():
    path = ROOT / "scripts" / "diagnostics" / "prompt_grid.py"
    spec = importlib.util.spec_from_file_location("prompt_grid", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["prompt_grid"] = module
    spec.loader.exec_module(module)
    return module


probe = load_script()


def write_adapter(path, scale, metadata=None):
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for module in ("cross_attn.k", "cross_attn.v"):
        name = f"diffusion_model.blocks.0.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, 128, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(128, 4, generator=generator) * scale
    save_file(tensors, path, metadata={"format": "pt"} | (metadata or {}))


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_ti2v, tiny_t2v):
    """A directory with configs, adapters of three strengths, a tuned encoder and private prompts."""
    root = tmp_path_factory.mktemp("grid")
    for name, checkpoint, expert in (("config", tiny_ti2v, ""), ("t2v", tiny_t2v, 'expert = "high_noise"')):
        (root / f"{name}.toml").write_text(f"""
output_dir = "unused"
dataset = "unused.toml"
epochs = 1
[model]
type = "wan"
ckpt_path = "{checkpoint}"
{expert}
dtype = "float32"
cache_text_embeddings = true
train_text_encoder = false
freeze_transformer = true
[adapter]
rank = 4
[optimizer]
lr = 1e-3
""")
    for name, scale in (("strong", 1.0), ("weak", 0.01), ("nothing", 0.0)):
        write_adapter(root / f"{name}.safetensors", scale)
    source = open_text_encoder(tiny_ti2v / TEXT_ENCODER_FILE)
    tuned = {name: source.get(name).float() * 1.3 for name in source.shapes}
    (root / "tuned").mkdir()
    save_file(tuned, root / "tuned" / "text_encoder.safetensors")
    (root / "domain.txt").write_text(SECRET + "\n")
    return root


@pytest.fixture
def run(place, tmp_path, capsys, monkeypatch):
    """`run(*arguments)`: exit status, everything that was said, and the report's directory."""
    monkeypatch.chdir(place)

    def run_probe(*arguments, config="config.toml"):
        common = ["--config", config, *SMALL, "--reports_dir", str(tmp_path / "reports"), "--run_tag", "t"]
        status = probe.main([*common, *map(str, arguments)])
        said = capsys.readouterr()
        return status, said.out + said.err, tmp_path / "reports" / "prompt_grid" / "t"

    return run_probe


def test_base_and_runs_from_the_same_noise(run):
    status, said, directory = run(
        *("--run", "weak=weak.safetensors", "--run", "half=weak.safetensors:0.5", "--run", "te=tuned"),
        *("--seeds", 2, "--batch_size", 3, "--domain_prompts", "domain.txt", "--max_neutral_change", 2),
    )
    assert status in (0, 3), said
    summary = read_summary(directory)
    cells = pd.read_csv(directory / "cells.csv")
    # The empty prompt, a neutral and a domain one.
    assert len(cells) == 3 * 3 * 2
    assert set(cells.seed) == {0, 1}
    np.testing.assert_allclose(cells.change, 1 - cells.ssim)
    by_column = cells.groupby("column").latent_distance.mean()
    assert by_column["half"] < by_column["weak"] < by_column["te"]
    for group in ("neutral", "domain"):
        found = cells[cells.group == group].groupby("column").change.mean()
        assert summary.metrics[f"{group}_change"] == pytest.approx(dict(found))
    assert summary.metrics["domain_change_interval"]["te"] == [None, None]  # one prompt
    assert summary.seed == 0
    roles = {entry.role for entry in summary.inputs}
    assert {
        "config",
        "base",
        "vae",
        "text_encoder",
        "adapter of half (weight 0.5)",
        "text_encoder of te",
    } <= roles
    with Image.open(directory / "grid.png") as sheet:
        assert sheet.width <= 1010
    everything = said + "".join(path.read_text() for path in directory.iterdir() if path.suffix != ".png")
    assert "zorp" not in everything
    assert "domain.txt" not in everything
    assert "domain 1 (" in everything


def test_a_run_above_the_cap_fails(run):
    status, said, directory = run(
        "--run", "strong=strong.safetensors", "--seeds", 1, "--max_neutral_change", 0.05
    )
    assert status == 1
    assert "strong changes neutral prompts by" in said
    assert "above the cap of 0.05" in read_summary(directory).explanation


def test_a_run_that_changes_nothing_is_inconclusive(run):
    status, said, directory = run("--run", "no=nothing.safetensors", "--seeds", 1)
    assert status == 3
    assert "no changes no picture" in said
    assert read_summary(directory).metrics["neutral_change"] == {"no": 0.0}


def test_what_no_flag_says_is_as_samples_of_the_config_has_it(place, run):
    samples = (
        "samples.steps=7",
        "samples.size=96x64",
        "samples.seeds=1",
        "samples.domain_prompts=domain.txt",
    )
    settings = [word for setting in samples for word in ("--set", setting)]
    status, said, directory = run(*settings, "--run", "strong=strong.safetensors", "--max_neutral_change", 2)
    assert status in (0, 3), said
    metrics = read_summary(directory).metrics
    assert "64x64 px, 1 frame; unipc, 2 steps" in metrics["settings"]  # flags win
    assert "domain_change" in metrics and len(pd.read_csv(directory / "cells.csv")) == 3
    assert "what no flag says is as [samples] of config.toml has it" in read_summary(directory).notes
    assert "zorp" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "weak"], "write NAME=PATH"),
        (["--run", "base=weak.safetensors"], "choose another"),
        (["--run", "a=weak.safetensors", "--run", "a=strong.safetensors"], "two columns have one name"),
        (["--run", "a=tuned+tuned"], "names two text encoders"),
        (["--run", "a=missing.safetensors"], "no such file or directory"),
        (["--run", "a=weak.safetensors", "--frames", "4"], "the nearest is 1 or 5"),
        (["--run", "a=weak.safetensors", "--domain_prompts", "none.txt"], '"none.txt" does not exist'),
        (["--run", "a=weak.safetensors", "--adapter_exclude", "ffn.*"], "matches no module"),
    ],
)
def test_what_is_refused_leaves_no_report(arguments, message, run):
    status, said, directory = run(*arguments)
    assert (status, directory.exists()) == (2, False)
    assert message in said


def test_an_adapter_has_to_say_its_expert(run):
    status, said, _ = run("--run", "a=weak.safetensors", config="t2v.toml")
    assert status == 2
    assert (
        "--run a: weak.safetensors: does not say for which expert of t2v-a14b it is; give a file whose metadata"
        in said
    )


def test_columns(place, monkeypatch):
    monkeypatch.chdir(place)
    both = parse_column("x=tuned+weak.safetensors:0.5+strong.safetensors")
    assert both.adapters == ("weak.safetensors:0.5", "strong.safetensors")
    assert both.text_encoder == Path("tuned/text_encoder.safetensors")
    assert parse_column("x=tuned/text_encoder.safetensors").text_encoder == Path(
        "tuned/text_encoder.safetensors"
    )
    with pytest.raises(UserError, match="write NAME=PATH"):
        parse_column("=weak.safetensors")


def test_the_interval_is_over_prompts():
    def cell(number, seed, ssim):
        return Cell(Entry("neutral", number, f"text {number}", f"text {number}"), seed, "a", 0.5, ssim)

    (change,) = summarise([cell(1, 0, 0.9), cell(1, 1, 0.7), cell(2, 0, 0.6), cell(2, 1, 0.6)])
    assert change.by_prompt == pytest.approx((0.2, 0.4))
    # Means of prompts 0.2 and 0.4; with one degree of freedom t = 12.706.
    assert change.change.mean == pytest.approx(0.3)
    assert change.change.high - change.change.mean == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert change.change.low == 0.0  # a change is never below it


def judged(*changes):
    """The verdict on columns and groups with the changes of their prompts."""
    cells = [
        Cell(Entry(group, number, "t", "t"), 0, column, value, 1 - value)
        for column, group, values in changes
        for number, value in enumerate(values, start=1)
    ]
    return probe.judge(cells, summarise(cells), 0.1)


def test_verdicts():
    neutral, changed = ("a", "neutral", (0.05, 0.06)), ("a", "domain", (0.5, 0.52))
    assert judged(neutral)[0] == "pass"
    verdict, why = judged(neutral, changed)
    assert verdict == "pass" and "domain prompts change more (+0.455, a, 95 % interval" in why
    verdict, why = judged(neutral, changed, ("b", "neutral", (0.2, 0.21)), ("b", "domain", (0.5, 0.52)))
    assert (verdict, why.split()[0]) == ("fail", "b")
    assert judged(neutral, ("a", "domain", (0.04, 0.05)))[0] == "inconclusive"
    # More on average, and no more than chance.
    verdict, why = judged(neutral, ("a", "domain", (0.05, 0.3)))
    assert verdict == "inconclusive" and "for certain (+0.12, a, 95 % interval -" in why
    verdict, why = judged(neutral, ("a", "domain", (0.5,)))
    assert verdict == "inconclusive" and "one domain prompt says nothing" in why
    assert judged(("a", "neutral", (0.0, 0.0)))[0] == "inconclusive"
