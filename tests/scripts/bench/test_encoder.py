"""The encoder's benchmark at tiny size: real runs and what it refuses. No test says how fast anything is."""

import json
from dataclasses import replace

import pytest
import torch

from models.wan.text_encoder import load_umt5
from scripts.bench import encoder, peers
from scripts.bench.encoder import MIDDLE, Ours, Peer, Shape, Step, Umt5Weights, like_lengths, main, random_ids

TINY = replace(MIDDLE, vocab_size=64, d_model=32, num_heads=2, d_kv=16, d_ff=48, num_layers=2)
CPU = torch.device("cpu")
QUICK = ["--rounds", "1", "--prompts_per_round", "3", "--run_tag", "t"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(encoder, "SHAPES", (Shape("tiny", TINY, (9, 4)),))
    monkeypatch.setattr(encoder, "MIDDLE", TINY)
    monkeypatch.setattr(encoder, "CAPTION_TOKENS", (2, 40))


def summary_of(root):
    return json.loads((root / "bench_encoder/t/summary.json").read_text())


def test_it_measures_and_reports(tmp_path, capsys):
    assert main([*QUICK, "--reports_dir", str(tmp_path)]) in (0, 1), capsys.readouterr().err
    metrics = summary_of(tmp_path)["metrics"]
    assert metrics["caching_prompts_per_second"] > 0 and metrics["padded_prompts_per_second"] > 0
    assert metrics["caching_error"] < 1e-5
    rows = (tmp_path / "bench_encoder/t/timed.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 + 1
    assert len((tmp_path / "bench_encoder/t/agreement.csv").read_text().splitlines()) == 1 + 2


def test_another_version_of_the_peer_is_skipped_and_caching_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(peers.NAMED, "transformers", "4.0.0")
    assert main([*QUICK, "--reports_dir", str(tmp_path)]) in (0, 1)
    assert "transformers: skipped" in capsys.readouterr().out
    assert len((tmp_path / "bench_encoder/t/timed.csv").read_text().splitlines()) == 2


def test_outputs_that_disagree_are_not_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Peer, "states", lambda self, ids, lens: 2 * Ours.states(self, ids, lens))
    monkeypatch.setattr(Peer, "__init__", Ours.__init__)
    assert main([*QUICK, "--only", "blocks", "--reports_dir", str(tmp_path)]) == 2
    assert "differ by 5.0e-01" in capsys.readouterr().err and not list(tmp_path.rglob("summary.json"))


def test_states_of_padding_that_reach_further_are_refused(tmp_path, capsys, monkeypatch):
    """The padded side without its mask computes something else."""
    whole = encoder.encode_padded

    def unmasked(model, captions, device):
        return whole(lambda input_ids, attention_mask: model(input_ids=input_ids), captions, device)

    monkeypatch.setattr(encoder, "encode_padded", unmasked)
    assert main([*QUICK, "--only", "caching", "--reports_dir", str(tmp_path)]) == 2
    assert "caching: states" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_sides_train_the_same_weights(dtype):
    source = Umt5Weights(TINY, CPU)
    sides = [side(source, dtype, CPU) for side in (Ours, Peer)]
    assert [p.shape for p in sides[0].parameters] == [p.shape for p in sides[1].parameters]
    ids_BL, lens_B = random_ids((5, 3), TINY.vocab_size, CPU)
    states, gradients = Step(sides[0], ids_BL, lens_B).both()
    assert states[1, 3:].abs().max() == 0 and all(g.abs().sum() > 0 for g in gradients)


def test_captions_of_like_length_go_together():
    captions = [" ".join(["2"] * length) for length in (40, 3, 17, 5, 42, *[7] * 16)]
    batches = list(like_lengths(captions))
    assert sorted(caption for batch in batches for caption in batch) == sorted(captions)
    lengths = [[len(caption.split()) for caption in batch] for batch in batches]
    assert [len(batch) for batch in batches] == [16, 2, 1, 2]
    assert all(max(batch) // 16 == min(batch) // 16 for batch in lengths)


def test_the_weights_are_a_function_of_their_name():
    one, again = Umt5Weights(TINY, CPU), Umt5Weights(TINY, CPU)
    assert all(torch.equal(one.get(name), again.get(name)) for name in one.shapes)
    assert not torch.equal(one.get("blocks.0.attn.k.weight"), one.get("blocks.1.attn.k.weight"))
    assert torch.isfinite(load_umt5(one, torch.float32, CPU)(input_ids=torch.ones(1, 3).long())[0]).all()
