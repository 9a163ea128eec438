"""One report and one verdict on a real run: three parts, of which each can fail it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from models.wan.checkpoint import open_transformer
from scripts.diagnostics import dit_lora_translator as probe
from tests.helpers.workspace import make_workspace
from utils.report import read_summary


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_ti2v, tiny_dataset):
    """A translator run with an evaluation of its own samples before and after."""
    workspace = make_workspace(tmp_path_factory.mktemp("run"), tiny_ti2v, tiny_dataset)
    held_out = f"eval_datasets=['{workspace.root / 'dataset.toml'}']"
    done = workspace.launch(["python"], "dit_lora", "max_steps=4", "optimizer.lr=3e-3", held_out)
    assert done.returncode == 0, done.stderr
    return workspace


def run(tmp_path, *arguments):
    status = probe.main(
        [*map(str, arguments), "--reports_dir", str(tmp_path / "reports"), "--run_tag", "tag"]
    )
    directory = tmp_path / "reports" / "dit_lora_translator" / "tag"
    return status, directory, read_summary(directory) if directory.exists() else None


def with_effect(trained, target, effect, interval):
    """A copy of the run whose last evaluation says something else."""
    shutil.copytree(trained.run(), target)
    rows = [json.loads(line) for line in (target / "eval.jsonl").read_text().splitlines()]
    rows[-1] |= {"adapter_effect": effect, "adapter_effect_interval": interval}
    (target / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


def test_a_run_that_is_small_gentle_and_better_passes(trained, tmp_path, capsys):
    better = with_effect(trained, tmp_path / "better", -0.1, [-0.2, -0.05])
    status, directory, summary = run(tmp_path, "--adapter", better, "--max_delta_ratio", 0.5)
    assert status == 0, capsys.readouterr()
    assert summary.metrics["parts"] == {"delta": "pass", "logits": "pass", "evaluation": "pass"}
    assert {"max_delta_ratio", "min_logit_ratio", "max_logit_ratio", "weak_ratio"} <= summary.caps.keys()
    assert summary.metrics["types"]["cross_attn"]["max_ratio"] == summary.metrics["max_ratio"]
    files = {path.name for path in directory.iterdir()}
    assert {"modules.csv", "types.csv", "logit_blocks.csv", "evaluation.csv", "ratio_per_block.png"} <= files
    text = (directory / "report.md").read_text()
    assert "## The three parts" in text and "The loss got better: dataset -0.1 (-0.2 to -0.05)" in text
    assert "  evaluation: pass: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "effect", "interval", "status", "part", "words"),
    [
        (("--max_delta_ratio", "1e-6"), -0.1, [-0.2, -0.05], 1, "delta", "over the cap of 1e-06"),
        (
            ("--max_delta_ratio", "0.5", "--max_ratio", "0.91"),
            -0.1,
            [-0.2, -0.05],
            1,
            "logits",
            "left 0.9 to 0.91",
        ),
        (("--max_delta_ratio", "0.5"), 0.1, [0.05, 0.2], 1, "evaluation", "The loss got worse"),
        (("--max_delta_ratio", "0.5"), 0.1, [-0.05, 0.2], 3, "evaluation", "cannot be told from chance"),
    ],
)
def test_each_part_decides(trained, tmp_path, flags, effect, interval, status, part, words):
    copy = with_effect(trained, tmp_path / "copy", effect, interval)
    found, _, summary = run(tmp_path, "--adapter", copy, "--synthetic", *flags)
    assert found == status and words in summary.explanation and summary.explanation.startswith(f"{part}: ")
    verdicts = summary.metrics["parts"]
    assert verdicts.pop(part) == ("fail" if status == 1 else "inconclusive") and set(verdicts.values()) == {
        "pass"
    }


def test_the_run_s_own_evaluation_is_read_and_the_run_stays_as_it_is(trained, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in trained.root.rglob("*")}
    _, _, summary = run(tmp_path, "--adapter", trained.run(), "--max_delta_ratio", 0.5)
    assert {path: path.stat().st_mtime_ns for path in trained.root.rglob("*")} == before
    rows = [json.loads(line) for line in (trained.run() / "eval.jsonl").read_text().splitlines()]
    found = summary.metrics["evaluation"]["dataset"]
    assert found["effect"] == rows[-1]["adapter_effect"] and found["against"] == "adapter off"
    assert found["step"] == 4 and found["num_samples"] == 6
    assert "evaluations" in {entry.role for entry in summary.inputs}
    assert not any("evaluation" in note for note in summary.notes)


def test_an_evaluation_of_another_step_counts_and_is_said_to_be_one(trained, tmp_path):
    copy = with_effect(trained, tmp_path / "copy", -0.1, [-0.2, -0.05])
    rows = [json.loads(line) for line in (copy / "eval.jsonl").read_text().splitlines()]
    rows[-1]["step"] = 3
    (copy / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, summary = run(tmp_path, "--adapter", copy, "--synthetic", "--max_delta_ratio", 0.5)
    assert status == 0
    assert any("saved at step 4" in note and "was at step 3" in note for note in summary.notes)


def test_an_adapter_without_attention_has_no_logits_to_judge(trained, tmp_path):
    random = torch.Generator().manual_seed(0)
    base = open_transformer(trained.checkpoint)
    out_features, in_features = base.shapes["blocks.0.ffn.0.weight"]
    save_file(
        {
            "diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.randn(2, in_features, generator=random),
            "diffusion_model.blocks.0.ffn.0.lora_B.weight": 1e-3
            * torch.randn(out_features, 2, generator=random),
        },
        tmp_path / "ffn.safetensors",
    )
    arguments = ("--adapter", tmp_path / "ffn.safetensors", "--base", trained.checkpoint)
    status, directory, summary = run(tmp_path, *arguments)
    assert status == 3 and "touches no attention" in summary.explanation
    assert summary.metrics["parts"]["logits"] == "inconclusive" and summary.metrics["logit_inputs"] == "none"
    assert set(summary.metrics["types"]) == {"ffn"} and not (directory / "logit_blocks.csv").exists()


def test_blocks_and_noise_levels_of_the_logits_can_be_chosen(trained, tmp_path):
    flags = ("--blocks", "1,3", "--quantiles", "0.5", "--max_delta_ratio", 0.5)
    _, directory, summary = run(tmp_path, "--adapter", trained.run(), *flags)
    lines = (directory / "logit_blocks.csv").read_text().splitlines()[1:]
    assert [line.split(",")[0] for line in lines] == ["1", "3"]
    assert summary.metrics["logit_inputs"] == "2 of 6 cached sample(s) at quantiles 0.5"


def test_without_a_grid_it_says_how_to_get_one_and_judges_all_the_same(trained, tmp_path):
    better = with_effect(trained, tmp_path / "better", -0.1, [-0.2, -0.05])
    status, directory, summary = run(tmp_path, "--adapter", better, "--max_delta_ratio", 0.5)
    assert status == 0 and summary.metrics["grid"] == "none"
    assert not (directory / "grid.png").exists()
    text = (directory / "report.md").read_text()
    assert "## The grid" in text and f"prompt_grid.py --config {better} --run adapter={better}/epoch" in text


def test_without_an_evaluation_it_is_inconclusive(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained.run(), copy)
    (copy / "eval.jsonl").unlink()
    status, _, summary = run(tmp_path, "--adapter", copy, "--synthetic", "--max_delta_ratio", 0.5)
    assert status == 3 and "give it eval_datasets" in summary.explanation
    lone = tmp_path / "lone.safetensors"
    shutil.copy(
        (
            copy / "epoch2" / "adapter_model.safetensors"
            if (copy / "epoch2").exists()
            else next(copy.glob("epoch*/adapter_model.safetensors"))
        ),
        lone,
    )
    arguments = ("--adapter", lone, "--base", trained.checkpoint, "--synthetic", "--max_delta_ratio", 0.5)
    assert run(tmp_path / "lone", *arguments)[0] == 3


def test_wrong_use_is_one_line(trained, tmp_path, capsys):
    assert run(tmp_path, "--adapter", trained.run(), "--samples", 0)[0] == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --samples") and error.count("\n") == 1
