"""The bench's own arithmetic, and (long) one real run of it with the least number of rounds."""

import subprocess
import sys
from pathlib import Path

import pytest

from utils.report import read_summary

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "bench" / "pipeline.py"
NAMES = {
    "band_speed",
    "band_activations",
    "layer_shares",
    "stage_shares",
    "engine_overhead",
    "checkpoint_stall",
    "two_stages",
}


@pytest.fixture(scope="module")
def bench():
    """The script as a module."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("bench_pipeline", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_limit_is_kept_from_its_own_side(bench):
    for value, at_least, holds in ((0.95, True, True), (0.85, True, False), (0.95, False, False)):
        assert bench.Row("x", value, 0.0, 0.9, at_least, "").holds is holds
    assert bench.Row("x", 1e9, 0.0, None, False, "").holds


def test_the_spread_is_half_the_distance_of_the_quartiles(bench):
    assert bench.spread([1.0, 2.0, 3.0, 4.0, 100.0]) == 1.0
    assert bench.spread([5.0]) == 0.0


def test_the_band_is_compared_with_what_its_flops_predict(bench):
    single = {
        "times": {"band": [1.0, 1.0, 1.0], "all": [1.8, 1.9, 2.0]},
        "flops": {"band": 10.0, "all": 20.0},
        "saved": {"band": 30, "all": 100},
    }
    speed, activations = bench.compare_band(single)
    assert speed.value == pytest.approx(0.95) and speed.holds
    assert activations.value == 0.3 and activations.holds


def test_shares_are_compared_layer_by_layer_and_stage_by_stage(bench):
    layers = {
        "names": ["input", "a", "b", "head"],
        "seconds": [[0.1, 1.0, 3.0, 0.1]] * 3,
        "costs": [1.0, 100.0, 200.0, 1.0],
        "bounds": [0, 2, 4],
    }
    (by_layer, by_stage), table = bench.compare_shares(layers)
    # The small layers are far off and do not count; a has 1 / 4.2 of the time and 100 / 302 of the work.
    assert by_layer.value == pytest.approx(abs(1 / 4.2 / (100 / 302) - 1)) and not by_layer.holds
    assert by_stage.value == pytest.approx(abs(1.1 / 4.2 / (101 / 302) - 1))
    assert [row["layer"] for row in table] == ["input", "a", "b", "head"]


def test_overhead_and_stall_are_ratios_of_turns(bench):
    overhead = bench.compare_overhead({"engine": [1.02, 2.04], "plain": [1.0, 2.0]})
    assert overhead.value == pytest.approx(0.02) and overhead.holds
    stall = bench.compare_saving({"times": {"save": [3.0], "copy": [2.0]}, "bytes": 1_000_000})
    assert stall.value == 1.5 and "1.0 MB" in stall.meaning


def test_a_missing_gpu_is_a_mistake_of_the_command(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    assert bench.main(["--device", "cuda", "--reports_dir", str(tmp_path)]) == 2
    assert "sees no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_worker_that_fails_is_reported_with_its_last_words(bench, tmp_path):
    with pytest.raises(bench.UserError, match=r"status [12]"):
        bench.start("cpu", 1, "steps", "--root", str(tmp_path), "--grid", "1x2x2", "--rounds", "1")


@pytest.mark.long
def test_the_whole_bench(tmp_path):
    flags = ["--rounds", "1", "--launches", "1", "--reports_dir", str(tmp_path), "--run_tag", "once"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags],
        capture_output=True,
        text=True,
        timeout=580,
        cwd=ROOT,
        check=False,
    )
    # Whether the ratios hold is a matter of the machine; that they are measured is not.
    assert done.returncode in (0, 1), done.stderr
    summary = read_summary(tmp_path / "bench_pipeline" / "once")
    assert set(summary.metrics) >= NAMES
    assert all(summary.metrics[name] is not None for name in NAMES)
    assert summary.metrics["band_activations"] < 0.4
