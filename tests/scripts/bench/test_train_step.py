"""The benchmark of whole steps: its own arithmetic, the FLOPs it divides by, and (long) a real run at the least size."""

import json

import pytest
import torch

from scripts.bench import train_step, train_step_worker
from scripts.bench.train_step import TARGET_ROWS, Row, describe, main, misses
from scripts.bench.train_step_worker import RandomSetup, flops
from utils.bench import Comparison
from utils.distributed import Processes
from utils.timing import Timing

(TARGET,) = [row for row in TARGET_ROWS if row.is_target]
FOUND = {
    "seconds": {"all": [2.0, 2.0], "band": [1.0, 1.0]},
    "flops": {"all": {"executed": 3e12, "useful": 2e12}, "band": {"executed": 2e12, "useful": 1e12}},
    "peak_gb": {"all": None, "band": None},
    "process_gb": 1.0,
    "matrix_peak": 1e13,
    "tokens": 100,
}


def pair_of(found):
    return Comparison("x", *(Timing(tuple(found["seconds"][name])) for name in ("all", "band")))


def test_shares_are_of_the_measured_peak_and_the_gain_is_that_of_the_flops():
    row = describe(TARGET, pair_of(FOUND), FOUND)
    assert (row["all_executed_of_peak"], row["all_useful_of_peak"]) == (0.15, 0.1)
    assert row["band_executed_of_peak"] == 0.2 and row["all_tokens_per_second"] == 50.0
    assert row["gain"] == 2.0 and row["share_of_predicted"] == pytest.approx(2 / 1.5, abs=1e-3)
    assert [name.split(" of ")[0] for name in misses(TARGET, row)] == [
        "all_executed_of_peak",
        "all_useful_of_peak",
    ]
    assert misses(train_step.CPU_ROWS[0], row) == []


def test_without_a_gpu_there_is_no_share_and_noise_takes_the_numbers():
    row = describe(TARGET, pair_of(FOUND), FOUND | {"matrix_peak": None})
    assert row["all_executed_of_peak"] is None and row["all_tokens_per_second"] == 50.0
    noisy = FOUND | {"seconds": {"all": [1.0, 9.0], "band": [1.0, 1.0]}}
    row = describe(TARGET, pair_of(noisy), noisy)
    assert row["gain"] is None and row["all_tokens_per_second"] is None and "refused" in row["note"]


@pytest.fixture
def processes():
    return Processes(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


def test_flops_at_the_real_size_are_those_of_the_published_arithmetic(processes, monkeypatch):
    """Counted by hand: 1,970 TFLOP with full checkpointing, 1,453 without, by a backward pass through every block."""
    monkeypatch.setattr(train_step_worker.RandomSource, "get", None)  # nothing is drawn: shapes are enough

    def setup(checkpointing):
        root = train_step_worker.Path()
        grid = train_step_worker.grid_of(train_step.LONG)
        return RandomSetup(root, grid, processes, "5b", "dit_lora", checkpointing, "no", False)

    full = setup("full")
    assert full.tokens == 27280
    found = flops(full, full.trained(band=False))
    assert found["executed"] / 1e12 == pytest.approx(1970, rel=0.02)
    assert found["useful"] / 1e12 == pytest.approx(1453, rel=0.02)
    assert flops(full, full.trained(band=True))["executed"] < 0.6 * found["executed"]
    selective = setup("selective")
    assert flops(selective, selective.trained(band=False))["executed"] == found["useful"]
    assert full.trained(band=True).adapter.train_blocks_range == (20, 29)


def test_rows_say_how_they_compute_and_the_worker_is_told():
    row = Row("small", "dit_lora", "1x4x4", "full", float8="products", compile=True)
    assert str(row) == "dit_lora, 1x4x4, checkpointing full, products in 8 bits, compiled"
    assert row.flags[-3:] == ["--float8", "products", "--compile"]
    assert "--compile" not in Row("small", "dit_lora", "1x4x4", "full").flags


def test_the_worker_configures_what_the_row_says(processes):
    setup = RandomSetup(
        train_step_worker.Path(), (1, 4, 4), processes, "small", "dit_lora", "full", "products", True
    )
    config = setup.trained(band=False)
    assert config.compile and config.model.transformer_dtype == config.model.transformer_compute == "float8"
    assert config.model.dtype == "bfloat16"


def test_the_whole_grid_is_for_a_gpu(tmp_path, capsys):
    assert main(["--full", "--reports_dir", str(tmp_path)]) == 2
    assert "--full" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_worker_that_fails_is_reported_with_its_last_words(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_step, "CPU_ROWS", (Row("small", "dit_lora", "no grid", "full"),))
    assert main(["--reports_dir", str(tmp_path)]) == 2
    assert "ended with status 2" in capsys.readouterr().err and not list(tmp_path.rglob("summary.json"))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["dit_lora", "encoder_ft"])
def test_real_steps(tmp_path, capsys, monkeypatch, mode):
    row = Row("small", mode, "1x4x4", "full", float8="products" if mode == "dit_lora" else "no")
    monkeypatch.setattr(train_step, "CPU_ROWS", (row,))
    flags = ["--rounds", "1", "--reports_dir", str(tmp_path), "--run_tag", "t"]
    assert main(flags) == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "bench_train_step/t/summary.json").read_text())
    assert summary["caps"]["min_executed"] == 0.55
    assert len((tmp_path / "bench_train_step/t/steps.csv").read_text().splitlines()) == 2
