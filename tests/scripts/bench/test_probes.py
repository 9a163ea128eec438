"""The benchmark runs, measures what it says and writes its report; how fast anything is, no test says."""

import json

import pytest
import torch

from models.wan.arch import PUBLISHED
from scripts.bench import probes
from scripts.bench.probes import bytes_made, main, over, step_flops, target_modules

SIZES = ["--dim", "32", "--ffn_dim", "48", "--num_layers", "2", "--rank", "4", "--repeats", "1"]


@pytest.mark.long
def test_it_measures_and_reports(tmp_path, capsys):
    places = ["--reports_dir", str(tmp_path / "reports"), "--run_tag", "t", "--scratch", str(tmp_path)]
    assert main([*SIZES, *places]) in (0, 1)
    summary = json.loads((tmp_path / "reports/bench_probes/t/summary.json").read_text())
    metrics = summary["metrics"]
    measured = ("gram_speed_up", "read_seconds", "budget_seconds", "budget_cached_seconds", "check_seconds")
    assert all(metrics[name] > 0 for name in measured)
    # Both ways make the product or its Gram matrices, and copies of A and B in float64; only one of them the product.
    assert metrics["formed_bytes"] >= 32 * 32 * 4 and metrics["gram_bytes"] >= 2 * 4 * 4 * 8
    assert (
        summary["caps"]["max_budget_cached_seconds"] == 2.0 and summary["caps"]["min_gram_speed_up"] == 50.0
    )
    if probes.INSPECT.is_file():
        assert metrics["inspect_seconds"] > 0 and metrics["inspect_mb"] > 1
    else:
        assert any("not measured" in note for note in summary["notes"])
    assert "lora_delta_budget, 4 modules" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"reports"}, "the scratch folder is left"


def test_a_disk_that_is_too_small_is_not_filled(tmp_path, capsys):
    sizes = ["--dim", "32", "--ffn_dim", "48", "--num_layers", "1", "--repeats", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes.shutil, "disk_usage", lambda path: probes.shutil._ntuple_diskusage(1, 1, 0))
        assert main([*sizes, "--reports_dir", str(tmp_path / "r"), "--scratch", str(tmp_path)]) == 2
    assert "--scratch" in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_a_probe_that_fails_is_not_timed(tmp_path):
    with pytest.raises(RuntimeError, match=r"lora_delta_budget.py ended with 2"):
        probes.run_command(probes.BUDGET, tmp_path, "--adapter", tmp_path / "none", "--base", tmp_path)


def test_bytes_are_those_of_new_tensors():
    a = torch.zeros(8, 4)
    assert bytes_made(lambda: a.T) == 0
    assert bytes_made(lambda: a.double()) == 8 * 4 * 8
    assert bytes_made(lambda: a @ a.T) == 8 * 8 * 4


def test_a_step_at_the_real_size_is_that_of_the_published_arithmetic():
    """3,015 TFLOP with a backward pass through every block; the first block has none below its adapters."""
    real = PUBLISHED["t2v-a14b"]
    assert len(target_modules(real)) == 80
    assert step_flops(real) / 1e12 == pytest.approx(3015, rel=0.02)
    assert over(("a", False), ("b", True)) == ["b"]
