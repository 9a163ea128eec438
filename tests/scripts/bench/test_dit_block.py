"""The benchmark at tiny size: real runs, what it refuses, and counted numbers checked exactly. No test says how fast anything is."""

import json
from dataclasses import replace

import pytest
import torch

from models.wan.arch import PUBLISHED
from models.wan.rope import rope_table
from scripts.bench import dit_block, peers
from scripts.bench.dit_block import BFLOAT16, FLOAT32, MIXED, main
from scripts.bench.dit_count import CPU, GPU, OURS, PEER, PLAIN, count_adapters, count_block
from scripts.bench.dit_sides import Case, build_pair
from utils.compiled import graphs_compiled
from utils.errors import UserError

TINY = replace(
    PUBLISHED["ti2v-5b"],
    dim=128,
    ffn_dim=256,
    num_heads=1,
    num_layers=2,
    in_dim=16,
    out_dim=16,
    text_dim=32,
    text_len=48,
)
GRID = (2, 2, 3)
QUICK = ["--rounds", "2", "--grids", "1x4x4", "--dim", "128"]


def summary_of(root):
    return json.loads((root / "bench_dit_block/t/summary.json").read_text())


@pytest.mark.long
def test_it_measures_and_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dit_block, "SIZES", {"cpu": {"block": TINY, "model": TINY}})
    status = main([*QUICK, "--reports_dir", str(tmp_path), "--run_tag", "t"])
    assert status in (0, 1, 3), capsys.readouterr().err
    timed = (tmp_path / "bench_dit_block/t/timed.csv").read_text().splitlines()
    # Three precisions of a block and of a model, forward and both.
    assert len(timed) == 1 + 3 * 2 * 2 and timed[0].startswith("what,ratio,low,high")
    agreement = (tmp_path / "bench_dit_block/t/agreement.csv").read_text().splitlines()
    assert len(agreement) == 1 + 3 * 2
    metrics = summary_of(tmp_path)["metrics"]
    assert metrics["machine"]["threads"] == 1 and metrics["traffic_ours_bf16_cpu"] > 0
    assert summary_of(tmp_path)["caps"]["max_traffic_ours_bf16_cpu"] == 323
    assert summary_of(tmp_path)["caps"]["max_saved_kib_ours_fp32_residual_cpu"] == 149


def test_another_version_of_the_peer_is_skipped_with_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(peers.NAMED, "diffusers", "0.1.0")
    assert main([*QUICK, "--reports_dir", str(tmp_path), "--run_tag", "t"]) in (0, 1)
    line = "diffusers: skipped, version 0.42.1 is installed and 0.1.0 is named"
    assert line in capsys.readouterr().out and line in summary_of(tmp_path)["notes"]
    assert not (tmp_path / "bench_dit_block/t/timed.csv").exists()
    # Ours is counted all the same.
    assert "traffic_ours_bf16_cpu" in summary_of(tmp_path)["metrics"]


def test_an_absent_peer_is_skipped_with_a_line(monkeypatch):
    def absent(name):
        raise peers.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(peers.metadata, "version", absent)
    assert "not installed" in peers.why_not("diffusers")


def test_the_named_versions_are_those_that_are_pinned():
    from pathlib import Path

    pinned = (Path(__file__).parents[3] / "constraints.txt").read_text().splitlines()
    assert {f"{name}=={version}" for name, version in peers.NAMED.items()} <= set(pinned)


def test_outputs_that_disagree_are_not_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dit_block, "SIZES", {"cpu": {"block": TINY}})
    # In float32 a block is bit-equal.
    monkeypatch.setattr(dit_block, "BFLOAT16", replace(BFLOAT16, tolerance=0.0))
    assert main([*QUICK, "--only", "block", "--reports_dir", str(tmp_path), "--run_tag", "t"]) == 2
    assert "outputs differ" in capsys.readouterr().err
    assert not list(tmp_path.rglob("summary.json"))


@pytest.mark.parametrize("subject", ["block", "model"])
def test_a_changed_weight_is_seen_in_output_and_gradients(subject):
    pair = build_pair(Case(subject, TINY, FLOAT32, GRID, torch.device("cpu")))
    (row,) = pair.check()
    # Measured: a block 1e-7, a model 2e-6, of which all is diffusers' sinusoid.
    assert row["output"] < 5e-6 and row["gradients"] < 5e-6
    with torch.no_grad():
        pair.ours._wanted[0].mul_(1.01)
    with pytest.raises(UserError, match="differ"):
        pair.check()


@pytest.mark.parametrize("subject", ["block", "model"])
def test_compiled_sides_agree_as_plain_ones_do(without_inductor, subject):
    pair = build_pair(Case(subject, TINY, FLOAT32, GRID, torch.device("cpu"), compile=True))
    before = graphs_compiled()
    (row,) = pair.check()
    assert row["output"] < 1e-5 and row["gradients"] < 1e-5
    assert graphs_compiled() > before


@pytest.mark.parametrize("subject", ["block", "model"])
def test_products_in_8_bits_err_more_than_bfloat16_and_it_is_told(subject):
    (plain,) = build_pair(Case(subject, TINY, BFLOAT16, GRID, torch.device("cpu"))).check()
    (row,) = build_pair(Case(subject, TINY, BFLOAT16, GRID, torch.device("cpu"), float8=True)).check()
    assert row["what"].endswith("8 bits against bfloat16")
    # Measured: outputs 0.02, gradients 0.05 to 0.07.
    assert 2 * plain["output"] < row["output"] < 0.1 and 2 * plain["gradients"] < row["gradients"] < 0.2


def test_both_sides_want_gradients_of_the_same():
    block = build_pair(Case("block", TINY, MIXED, GRID, torch.device("cpu")))
    _, gradients = block.ours.both()
    # A and B of key and value, and the hidden state.
    assert len(gradients) == 2 * 2 + 1
    assert block.ours.forward().grad_fn is None


def test_grids_and_widths_that_mean_nothing_are_refused(tmp_path, capsys):
    for flags in (["--grids", "4x4"], ["--grids", "0x4x4"], ["--dim", "100"], ["--dim", "0"]):
        with pytest.raises(SystemExit, match="2"):
            main([*flags, "--reports_dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_missing_gpu_is_a_mistake_of_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["--device", "cuda", "--reports_dir", str(tmp_path)]) == 2
    assert "--device" in capsys.readouterr().err and not list(tmp_path.iterdir())


def saved_by_hand(arch, tokens, stream, projected):
    """Bytes that one frozen block keeps, bfloat16 products; `stream`, `projected`: bytes of a number as the norms keep it."""
    wide, narrow, text = arch.dim * 4, arch.dim * 2, arch.text_len
    norms = (
        3 * tokens * arch.dim * stream + 3 * tokens * 2 * 4
    )  # inputs, means and deviations of the layer norms
    rms = (
        3 * tokens * (arch.dim * projected + 4)
    )  # inputs and scales: query and key, and the query of the text
    attention = 4 * tokens * narrow + 2 * (tokens + text) * narrow + 2 * 4 * tokens * arch.num_heads
    rope = 2 * tokens * arch.head_dim // 2 * 4
    rows = 6 * wide + 2 * wide  # modulation as one tensor, and 1 + scale twice
    return norms + rms + attention + rope + rows + tokens * arch.ffn_dim * 2


def test_what_a_block_keeps_is_what_its_shapes_say():
    tokens = GRID[0] * GRID[1] * GRID[2]
    for precision in (BFLOAT16, MIXED):
        for rms in (GPU, CPU):
            stream = precision.residual.itemsize
            found = count_block(OURS, TINY, precision, rms, GRID)
            assert found.saved_kib * 1024 * tokens == saved_by_hand(TINY, tokens, stream, 2)
        found = count_block(PLAIN, TINY, precision, GPU, GRID)
        assert found.saved_kib * 1024 * tokens == saved_by_hand(TINY, tokens, 4, 4)


@pytest.mark.parametrize(("precision", "traffic", "saved"), [(BFLOAT16, 323, 131), (MIXED, 400, 149)])
def test_the_targets_are_met_at_the_real_size(precision, traffic, saved):
    for rms in (GPU, CPU):
        found = count_block(OURS, PUBLISHED["ti2v-5b"], precision, rms)
        assert found.traffic <= traffic and found.saved_kib <= saved


def test_adapters_add_less_without_a_second_pass_and_none_add_nothing():
    paths = ("cross_attn.k", "cross_attn.q")
    bare = count_adapters((), TINY, BFLOAT16, GRID, lean=True)
    frozen = count_block(OURS, TINY, BFLOAT16, GPU, GRID)
    assert (bare.kernels, bare.units, bare.saved_kib) == (frozen.kernels, frozen.units, frozen.saved_kib)
    lean, peft = (count_adapters(paths, TINY, BFLOAT16, GRID, lean=choice) for choice in (True, False))
    assert bare.traffic < lean.traffic < peft.traffic
    assert bare.saved_kib < lean.saved_kib < peft.saved_kib


@pytest.mark.parametrize("lean", [True, False])
def test_our_side_is_lean_or_plain_as_asked(lean):
    pair = build_pair(Case("model", TINY, FLOAT32, GRID, torch.device("cpu"), lean=lean))
    (row,) = pair.check()
    assert ("plain" in row["what"]) is not lean and row["output"] < 1e-5


def test_the_count_does_not_leave_a_fake_table_behind():
    count_block(OURS, TINY, BFLOAT16, CPU, GRID)
    cosine, _ = rope_table(GRID, TINY.head_dim, torch.device("cpu"))
    assert type(cosine) is torch.Tensor and cosine[0, 0, 0] == 1


def test_a_gpu_runs_fewer_kernels_and_diffusers_is_counted_by_the_same_rule():
    found = {
        (side, rms): count_block(side, TINY, BFLOAT16, rms, GRID)
        for side in (PLAIN, PEER)
        for rms in (GPU, CPU)
    }
    for side in (PLAIN, PEER):
        assert sum(found[side, GPU].kernels) < sum(found[side, CPU].kernels)
        assert found[side, GPU].traffic < found[side, CPU].traffic
    # No kernel of the lean path is another one on a GPU, and it runs fewer than the plain one.
    lean = count_block(OURS, TINY, BFLOAT16, CPU, GRID)
    assert lean.kernels == count_block(OURS, TINY, BFLOAT16, GPU, GRID).kernels
    assert lean.traffic < found[PLAIN, GPU].traffic
