"""The benchmark of sampling at tiny size: a real run, what it predicts, and what it refuses. No test says how fast anything is."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from models.wan.arch import PUBLISHED
from models.wan.costs import dit_block_flops, dit_head_flops, dit_input_flops, dit_text_flops
from models.wan.text_reuse import TextReuse
from scripts.bench import sampling
from scripts.bench.sampling import kept_bytes, main, predicted_ratio

QUICK = ["--rounds", "1", "--steps", "2", "--grids", "1x2x2,2x2x3", "--run_tag", "t"]
FIVE_B = PUBLISHED["ti2v-5b"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    arch = replace(FIVE_B, dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, text_len=64, freq_dim=8)
    monkeypatch.setattr(sampling, "SIZES", {"cpu": arch})


def test_it_measures_and_reports(tmp_path, capsys):
    assert main([*QUICK, "--reports_dir", str(tmp_path)]) == 0, capsys.readouterr().err
    directory = tmp_path / "bench_sampling/t"
    assert json.loads((directory / "summary.json").read_text())["metrics"]["machine"]["threads"] == 1
    timed = list(csv.DictReader((directory / "timed.csv").open()))
    assert [row["what"] for row in timed] == ["4 tokens, 2 steps, float32", "12 tokens, 2 steps, float32"]
    assert all(0 < float(row["predicted"]) < 1 for row in timed)
    predicted = list(csv.DictReader((directory / "predicted.csv").open()))
    assert [row["tokens"] for row in predicted][:2] == ["390", "880"]
    trained = list(csv.DictReader((directory / "trained.csv").open()))
    assert [row["tokens"] for row in trained] == ["27280", "5070", "390", "20280"]
    # Counted by hand: 1,970 TFLOP with a backward pass through the first block too.
    assert float(trained[0]["step_tflop"]) == pytest.approx(1970, rel=0.02)
    assert float(trained[0]["share"]) == pytest.approx(2 * 30 * 512 * 2 * 3072**2 / 1944.1e12, rel=1e-2)


def test_samples_with_other_bits_are_not_timed(tmp_path, capsys, monkeypatch):
    made = TextReuse.made

    def changed(self, number, makers, make):
        kept = made(self, number, makers, make)
        return (kept[0] * 1.0001, kept[1]) if isinstance(kept, tuple) else kept

    monkeypatch.setattr(TextReuse, "made", changed)
    assert main([*QUICK, "--reports_dir", str(tmp_path)]) == 2
    assert "4 tokens" in capsys.readouterr().err and not list(tmp_path.rglob("summary.json"))


def test_the_predicted_ratio_is_that_of_the_passes_added_up():
    tokens, steps = 390, 50
    one = FIVE_B.num_layers * dit_block_flops(FIVE_B, tokens)
    one += dit_input_flops(FIVE_B, tokens) + dit_head_flops(FIVE_B, tokens)
    text = dit_text_flops(FIVE_B)
    assert predicted_ratio(FIVE_B, tokens, steps) == pytest.approx(
        (steps * (one - text) + text) / (steps * one)
    )
    assert predicted_ratio(FIVE_B, tokens, 1) == 1.0
    assert predicted_ratio(FIVE_B, 27_280, steps) > 0.998


def test_what_is_kept_is_counted_as_it_is_kept():
    dit = sampling.random_dit(sampling.SIZES["cpu"], "float32", torch.device("cpu"))
    texts = sampling.random_texts(sampling.SIZES["cpu"], torch.device("cpu"))
    text = texts[0][None]
    latents = torch.zeros(1, 48, 1, 4, 4)
    with dit.keeping([text]), torch.no_grad():
        dit.velocities(latents, torch.full((1, 1), 500.0), [text])
        made = dit._reuse._made.values()
        kept = [tensor for one in made for tensor in (one if isinstance(one, tuple) else (one,))]
        assert sum(tensor.nbytes for tensor in kept) == kept_bytes(sampling.SIZES["cpu"], 4)
    # The published size, as docs/performance.md has it.
    assert kept_bytes(FIVE_B, 2) == 188_743_680 + 512 * 3072 * 2
