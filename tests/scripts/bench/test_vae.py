"""The VAE's benchmark at tiny size: real runs and what it refuses. No test says how fast anything is."""

import json

import pytest
import torch

from models.wan.component_shapes import VaeSizes
from scripts.bench import vae
from scripts.bench.vae import main, random_vae

QUICK = ["--rounds", "1", "--batches", "2", "--run_tag", "t"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(vae, "SIZES", {"cpu": VaeSizes("2.2", 8, 8)})
    monkeypatch.setattr(vae, "CLIPS", {"cpu": "32x32x5"})


def test_it_measures_and_reports(tmp_path, capsys):
    assert main([*QUICK, "--reports_dir", str(tmp_path)]) == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "bench_vae/t/summary.json").read_text())
    assert summary["metrics"]["error_batch_2"] <= 1e-5
    # Smaller than a tile: there is nothing to cut.
    assert summary["metrics"]["error_tiled"] == 0
    rows = (tmp_path / "bench_vae/t/timed.csv").read_text().splitlines()
    assert len(rows) == 3 and "frames_per_second" in rows[0]


def test_tiles_of_a_larger_clip_give_other_latents(tmp_path):
    assert main([*QUICK, "--size", "32x576x1", "--reports_dir", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "bench_vae/t/summary.json").read_text())
    assert summary["metrics"]["error_tiled"] > 1e-4


def test_a_batch_that_gives_something_else_is_not_timed(tmp_path, capsys, monkeypatch):
    encode = vae.WanVae.encode
    monkeypatch.setattr(vae.WanVae, "encode", lambda self, videos: encode(self, videos) * len(videos))
    assert main([*QUICK, "--reports_dir", str(tmp_path)]) == 2
    assert "batch of 2" in capsys.readouterr().err and not list(tmp_path.rglob("summary.json"))


def test_sizes_that_do_not_fit_are_refused(tmp_path, capsys):
    assert main([*QUICK, "--size", "32x30x5", "--reports_dir", str(tmp_path)]) == 2
    assert "multiples of 16 px" in capsys.readouterr().err
    for flags in (["--size", "32x32"], ["--batches", "0"], ["--batches", "2,"]):
        with pytest.raises(SystemExit, match="2"):
            main([*flags, "--reports_dir", str(tmp_path)])


def test_the_weights_are_the_same_in_every_run():
    sizes, video = VaeSizes("2.2", 8, 8), torch.zeros(1, 3, 1, 32, 32)
    one, again = (random_vae(sizes, torch.float32, torch.device("cpu")) for _ in range(2))
    assert torch.equal(one.encode(video), again.encode(video))
