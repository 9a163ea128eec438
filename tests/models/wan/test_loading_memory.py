"""Weights stream from the files to where they live: the peak of memory while a stage loads, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models.wan.arch import expected_shapes
from models.wan.component_shapes import Umt5Sizes, expected_umt5_shapes

ROOT = Path(__file__).resolve().parents[3]
WORKER = ROOT / "tests" / "workers" / "load_stage.py"
NUM_BLOCKS, NUM_SHARDS = 8, 4
BLOCK_WEIGHTS = 8 * 512 * 512 + 2 * 512 * 2048


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, make_arch: Any) -> Path:
    """A DiT in float32 of four shards of two blocks (34 MB) each, and a UMT5 of eight blocks in bfloat16 as `.pth`."""
    root = tmp_path_factory.mktemp("large")
    arch = make_arch("ti2v", dim=512, ffn_dim=2048, num_heads=4, num_layers=NUM_BLOCKS)
    (root / "config.json").write_text(json.dumps(arch.to_config_json()))
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(NUM_SHARDS)]
    for name, shape in expected_shapes(arch).items():
        number = int(name.split(".")[1]) // 2 if name.startswith("blocks.") else 0
        shards[number][name] = torch.full(shape, 0.01)
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"m-{number:05d}.safetensors"
        save_file(shard, root / file)
        weight_map |= dict.fromkeys(shard, file)
    (root / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sizes = Umt5Sizes(
        vocab_size=512, d_model=512, num_heads=8, d_kv=64, d_ff=2048, num_layers=NUM_BLOCKS, num_buckets=32
    )
    shapes = expected_umt5_shapes(sizes)
    torch.save(
        {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()},
        root / "umt5.pth",
    )
    return root


def load(root: Path, mode: str, first: int, last: int, *flags: str) -> dict[str, int]:
    command = [sys.executable, str(WORKER), "--root", str(root), "--mode", mode]
    command += ["--first", str(first), "--last", str(last), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # Freed memory of this size goes back at once, as that of the published models' larger tensors does.
    environment["MALLOC_MMAP_THRESHOLD_"] = "100000"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    print({name: f"{value / 1e6:.1f} MB" for name, value in measured.items()})
    return measured


def test_a_stage_of_the_dit(large):
    """Half the blocks in bfloat16: 34 MB. Measured at the peak: 51 MB; the files' own pages alone would be 67 MB more."""
    measured = load(large, "dit_lora", 1, 4)
    share, shard = 4 * BLOCK_WEIGHTS * 2, 2 * BLOCK_WEIGHTS * 4
    assert share < measured["owned"] < 1.01 * share
    assert measured["peak"] < measured["owned"] + shard


def test_a_stage_of_the_encoder(large):
    """Trained weights become float32: 67 MB of a file of 67 MB, of which no more than a block is there at once.

    Measured: 67 MB owned, 77 MB at the peak.
    """
    measured = load(large, "encoder_ft", 1, 4)
    share = 4 * (4 * 512 * 512 + 3 * 512 * 2048) * 4
    assert share < measured["owned"] < 1.01 * share
    assert measured["peak"] < measured["owned"] + 20e6


def test_weights_in_8_bits_are_never_all_there_in_full(large):
    """One weight after the other is read, rounded and let go of. Measured: 34 MB owned, 46 MB at the peak."""
    measured = load(large, "dit_lora", 1, 8, "--transformer_dtype", "float8")
    assert NUM_BLOCKS * BLOCK_WEIGHTS < measured["owned"] < 1.02 * NUM_BLOCKS * BLOCK_WEIGHTS
    assert measured["peak"] < measured["owned"] + 20e6


MERGE = """
import sys
from pathlib import Path
from models.wan.lora_merge import merge_lora
from tests.workers.load_stage import memory_kib
import safetensors.torch, torch
root, out = Path(sys.argv[1]), Path(sys.argv[2])
import models.wan.probes.subject  # what is loaded along is no part of the peak
before = memory_kib("VmRSS")
merge_lora(root / "lora.safetensors", root, out)
print(1024 * (memory_kib("VmHWM") - before))
"""


def test_a_merge_holds_one_shard_at_most_and_not_the_model(large: Path, tmp_path: Path) -> None:
    """Of 136 MB in four shards: pages of the shard that is read count too, until it is let go."""
    module = "diffusion_model.blocks.0.cross_attn.k"
    lora = {f"{module}.lora_A.weight": torch.ones(2, 512), f"{module}.lora_B.weight": torch.ones(512, 2)}
    save_file(lora, large / "lora.safetensors")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["MALLOC_MMAP_THRESHOLD_"] = "100000"
    command = [sys.executable, "-c", MERGE, str(large), str(tmp_path / "merged")]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=120, check=False
        )
    finally:
        (large / "lora.safetensors").unlink()
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.splitlines()[-1])
    whole = sum(path.stat().st_size for path in large.glob("m-*.safetensors"))
    print(f"{peak / 1e6:.1f} MB of {whole / 1e6:.1f} MB")
    assert peak < 0.6 * whole  # measured: 62 MB of 144; without letting go 156 MB
