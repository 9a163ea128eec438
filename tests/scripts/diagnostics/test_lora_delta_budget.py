import csv
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.wan.arch import PUBLISHED, WanArch, expected_shapes
from models.wan.checkpoint import open_transformer
from models.wan.names import dit_to_diffusers
from models.wan.probes.delta import measure_delta
from models.wan.probes.subject import Subject
from utils.report import read_summary
from utils.sparse_weights import write_sparse_safetensors

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "diagnostics" / "lora_delta_budget.py"
ARCH = WanArch(
    model_type="ti2v",
    dim=32,
    ffn_dim=64,
    freq_dim=16,
    in_dim=48,
    out_dim=48,
    num_heads=2,
    num_layers=3,
    text_len=512,
    eps=1e-6,
    text_dim=24,
)
SHAPES = expected_shapes(ARCH)
TARGETS = [f"blocks.{block}.cross_attn.{projection}" for block in range(3) for projection in "kv"]
RANK = 4


def load_script():
    spec = importlib.util.spec_from_file_location("lora_delta_budget", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["lora_delta_budget"] = module
    spec.loader.exec_module(module)
    return module


probe = load_script()


def signs(*shape, seed=0):
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0


def write_base(directory, dtype=torch.float32, shapes=SHAPES, changes=None):
    """A sharded DiT in the official layout whose every linear weight consists of 20 and -20."""
    directory.mkdir(parents=True)
    tensors = {name: (20 * signs(*shape)).to(dtype) for name, shape in shapes.items()} | (changes or {})
    weight_map = {}
    for number in (1, 2):
        shard = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        part = {
            name: tensor for index, (name, tensor) in enumerate(tensors.items()) if index % 2 == number - 1
        }
        save_file(part, directory / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = directory / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(ARCH.to_config_json()))
    return directory


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "ti2v")


def unit_pair(module, factor=1.0):
    """A and B with B A made of `factor` and -factor, exactly in every dtype; spread over all ranks."""
    out_features, in_features = SHAPES[f"{module}.weight"][0], SHAPES[f"{module}.weight"][1]
    down = torch.zeros(RANK, in_features)
    for row in range(RANK):
        down[row, row::RANK] = signs(len(range(row, in_features, RANK)), seed=row)
    return down, factor * signs(out_features, 1, seed=9).expand(-1, RANK).clone()


NAMINGS = {
    "official": lambda module: (f"diffusion_model.{module}", "lora_A.weight", "lora_B.weight"),
    "comfyui": lambda module: (f"diffusion_model.{module}", "lora_down.weight", "lora_up.weight"),
    "peft": lambda module: (f"base_model.model.{module}", "lora_A.default.weight", "lora_B.default.weight"),
    "kohya": lambda module: (f"lora_unet_{module.replace('.', '_')}", "lora_down.weight", "lora_up.weight"),
    "diffusers": lambda module: (f"transformer.{dit_to_diffusers(module)}", "lora_A.weight", "lora_B.weight"),
}


def write_adapter(
    directory,
    *,
    naming="official",
    dtype=torch.float32,
    alpha=None,
    factor=1.0,
    targets=TARGETS,
    peft_alpha=None,
    metadata=None,
):
    """An adapter for the base above with ratio `factor * scale / 20` in every module."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module in targets:
        stem, a, b = NAMINGS[naming](module)
        down, up = unit_pair(module, factor)
        tensors[f"{stem}.{a}"], tensors[f"{stem}.{b}"] = down.to(dtype), up.to(dtype)
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(float(alpha), dtype=dtype)
    save_file(tensors, directory / "adapter_model.safetensors", metadata)
    if peft_alpha is not None:
        (directory / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": peft_alpha}))
    return directory / "adapter_model.safetensors"


def ratios_of(adapter, base):
    subject = Subject(adapter, base, None, None, None, ())
    return {delta.module: delta.ratio for delta in measure_delta(subject, open_transformer(base)).deltas}


SCALES = {
    "no alpha": {},
    "alpha = rank": {"alpha": RANK},
    "alpha = rank / 4": {"alpha": RANK / 4, "factor": 4.0},
    "alpha = 2 rank": {"alpha": 2 * RANK, "factor": 0.5},
    "peft's config": {"peft_alpha": 2 * RANK, "factor": 0.5},
}


@pytest.mark.parametrize(("naming", "scale"), itertools.product(NAMINGS, SCALES))
def test_a_known_ratio_is_reported_in_every_naming_alpha_and_dtype(tmp_path, base, naming, scale):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        adapter = write_adapter(tmp_path / str(dtype), naming=naming, dtype=dtype, **SCALES[scale])
        ratios = ratios_of(adapter, base)
        assert list(ratios) == TARGETS
        # Largest error measured: 0.
        assert all(abs(ratio - 0.05) < 1e-6 for ratio in ratios.values())


@pytest.mark.parametrize(
    ("naming", "pattern"),
    [
        ("peft", r"blocks\.1\.cross_attn\.k"),
        ("peft", "1.cross_attn.k"),
        ("diffusers", r"blocks\.1\.attn2\.to_k"),
    ],
)
def test_peft_scales_that_are_not_the_same_everywhere(tmp_path, base, naming, pattern):
    """Rank-stabilised: alpha / sqrt(rank); one module has an alpha of its own, by the name it has in the file."""
    adapter = write_adapter(tmp_path, naming=naming)
    config = {"r": RANK, "lora_alpha": 2, "use_rslora": True, "alpha_pattern": {pattern: 8}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ratios = ratios_of(adapter, base)
    assert abs(ratios.pop("blocks.1.cross_attn.k") - 0.2) < 1e-6
    assert all(abs(ratio - 0.05) < 1e-6 for ratio in ratios.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_base_may_have_any_float_dtype(tmp_path, dtype):
    ratios = ratios_of(write_adapter(tmp_path / "adapter"), write_base(tmp_path / "base", dtype))
    assert all(abs(ratio - 0.05) < 1e-6 for ratio in ratios.values())


def test_random_weights_and_every_linear_of_the_model(tmp_path):
    random = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    tensors = {}
    for name, shape in SHAPES.items():
        if name.endswith(".weight") and len(shape) >= 2:
            down, up = torch.randn(3, *shape[1:], generator=random), torch.randn(
                shape[0], 3, generator=random
            )
            formed = up.double() @ down.flatten(1).double()
            up *= 0.05 * weights[name].double().norm() / formed.norm()
            module = name.removesuffix(".weight")
            tensors |= {
                f"diffusion_model.{module}.lora_A.weight": down,
                f"diffusion_model.{module}.lora_B.weight": up,
            }
    save_file(tensors, tmp_path / "adapter.safetensors")
    ratios = ratios_of(tmp_path / "adapter.safetensors", write_base(tmp_path / "base", changes=weights))
    assert len(ratios) == 10 * 3 + 7
    # B is rounded to float32 after scaling: largest error measured 2.4e-9.
    assert all(abs(ratio - 0.05) < 1e-6 for ratio in ratios.values())


def run(tmp_path, *arguments):
    status = probe.main(
        [*map(str, arguments), "--reports_dir", str(tmp_path / "reports"), "--run_tag", "tag"]
    )
    directory = tmp_path / "reports" / "lora_delta_budget" / "tag"
    return status, directory, read_summary(directory) if directory.exists() else None


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_whole_report(tmp_path, base, capsys):
    adapter = write_adapter(tmp_path / "adapter", targets=[*TARGETS, "blocks.1.ffn.0"])
    status, directory, summary = run(tmp_path, "--adapter", adapter.parent, "--base", base)
    assert status == 0
    assert summary.verdict == "pass"
    assert summary.caps == {"max_delta_ratio": 0.05, "weak_ratio": 1e-4}
    metrics = summary.metrics
    assert metrics["max_ratio"] == pytest.approx(0.05, abs=1e-6)
    assert metrics["mean_ratio"] == pytest.approx(0.05, abs=1e-6)
    assert (metrics["num_modules"], metrics["num_over_cap"], metrics["ranks"]) == (7, 0, [RANK])
    assert metrics["num_weak"] == 0 and "max_spectral_ratio" not in metrics
    assert metrics["mean_effective_rank"] == pytest.approx(1.0, abs=1e-5)
    assert {name: group["num_modules"] for name, group in metrics["types"].items()} == {
        "cross_attn": 6,
        "ffn": 1,
    }
    assert [entry.role for entry in summary.inputs] == ["adapter", "base", "base"]
    assert summary.inputs[0].size_bytes == adapter.stat().st_size

    names = {path.name for path in directory.iterdir()}
    assert names == {
        "report.md",
        "summary.json",
        "modules.csv",
        "blocks.csv",
        "types.csv",
        "ratio_per_block.png",
    }
    modules = table(directory / "modules.csv")
    assert {row["module"] for row in modules} == {*TARGETS, "blocks.1.ffn.0"}
    assert all(abs(float(row["ratio"]) - 0.05) < 1e-6 for row in modules)
    assert float(modules[0]["delta_norm"]) / float(modules[0]["weight_norm"]) == float(modules[0]["ratio"])
    assert [(row["block"], row["num_modules"]) for row in table(directory / "blocks.csv")] == [
        ("0", "2"),
        ("1", "3"),
        ("2", "2"),
    ]
    assert [row["type"] for row in table(directory / "types.csv")] == ["cross_attn", "ffn"]
    assert (directory / "ratio_per_block.png").stat().st_size < 100_000
    text = (directory / "report.md").read_text()
    assert "**Verdict: PASS.** All 7 modules are within the cap of 0.05" in text and "![" in text
    assert str(directory) in capsys.readouterr().out


def test_a_base_in_scaled_8_bits_and_one_under_diffusers_names(tmp_path, base):
    """Weights of 20 and -20 are 1 and -1 in float8, with the scale 20 beside them."""
    adapter = write_adapter(tmp_path / "adapter")
    tensors = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name, shape in SHAPES.items():
        tensors[name] = 20 * signs(*shape)
        if name.removesuffix(".weight") in TARGETS:
            tensors[name] = signs(*shape).to(torch.float8_e4m3fn)
            tensors[name.removesuffix(".weight") + ".scale_weight"] = torch.tensor(20.0)
    save_file(tensors, tmp_path / "scaled.safetensors")
    renamed = {dit_to_diffusers(name): 20 * signs(*shape) for name, shape in SHAPES.items()}
    save_file(renamed, tmp_path / "diffusers.safetensors")
    for other in ("scaled.safetensors", "diffusers.safetensors"):
        ratios = ratios_of(adapter, tmp_path / other)
        assert list(ratios) == TARGETS
        assert all(abs(ratio - 0.05) < 1e-6 for ratio in ratios.values()), other


def test_the_mean_has_a_cap_of_its_own(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter")
    arguments = ("--adapter", adapter, "--base", base, "--max_delta_ratio", 0.06)
    status, _, summary = run(tmp_path, *arguments, "--max_mean_delta_ratio", 0.049)
    assert status == 1 and summary.caps["max_mean_delta_ratio"] == 0.049
    assert "The mean ratio is 0.0500, over its cap of 0.049." in summary.explanation
    assert (
        run(tmp_path / "other", *arguments, "--max_mean_delta_ratio", 0.05)[0] == 0
    )  # on the cap is within it
    directory = write_run(
        tmp_path / "output" / "run",
        base,
        rest="[budget]\nmax_delta_ratio = 0.06\nmax_mean_delta_ratio = 0.04",
    )
    status, _, summary = run(tmp_path / "run", "--adapter", directory)
    assert status == 1 and summary.caps["max_mean_delta_ratio"] == 0.04


def test_modules_that_do_hardly_anything_are_counted(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter")
    tensors = load_file(adapter)
    tensors["diffusion_model.blocks.1.cross_attn.v.lora_B.weight"] *= 2.0**-10
    save_file(tensors, adapter)
    status, directory, summary = run(tmp_path, "--adapter", adapter, "--base", base)
    assert status == 0 and summary.metrics["num_weak"] == 1
    assert "1 of them do hardly anything" in summary.explanation
    weak = [row["module"] for row in table(directory / "modules.csv") if row["is_weak"] == "True"]
    assert weak == ["blocks.1.cross_attn.v"]
    assert [row["num_weak"] for row in table(directory / "blocks.csv")] == ["0", "1", "0"]


def test_what_counts_as_weak_is_a_flag(tmp_path, base, capsys):
    arguments = ("--adapter", write_adapter(tmp_path / "adapter"), "--base", base, "--max_delta_ratio", 0.2)
    status, _, summary = run(tmp_path, *arguments, "--min_delta_ratio", 0.051)
    assert status == 3 and summary.metrics["num_weak"] == 6 and summary.caps["weak_ratio"] == 0.051
    assert run(tmp_path / "other", *arguments, "--min_delta_ratio", 0.049)[0] == 0
    assert run(tmp_path / "third", *arguments, "--min_delta_ratio", 0.3)[0] == 2
    assert "nothing could pass" in capsys.readouterr().err


def test_the_ratio_of_spectral_norms(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter")
    status, directory, summary = run(tmp_path, "--adapter", adapter, "--base", base, "--spectral")
    assert status == 0
    source = open_transformer(base)
    for row in table(directory / "modules.csv"):
        down, up = unit_pair(row["module"])
        expected = torch.linalg.matrix_norm(up.double() @ down.double(), 2) / torch.linalg.matrix_norm(
            source.get(f"{row['module']}.weight").double(), 2
        )
        # Largest relative error measured: 1.2e-7.
        assert float(row["spectral_ratio"]) == pytest.approx(expected.item(), rel=1e-5)
    assert summary.metrics["max_spectral_error"] < 1e-3
    modules = table(directory / "modules.csv")
    for kind in ("block", "type"):
        for row in table(directory / f"{kind}s.csv"):
            ratios = [float(module["spectral_ratio"]) for module in modules if module[kind] == row[kind]]
            assert float(row["max_spectral_ratio"]) == max(ratios)
            assert float(row["mean_spectral_ratio"]) == pytest.approx(sum(ratios) / len(ratios))
    assert summary.metrics["max_spectral_ratio"] > summary.metrics["max_ratio"]  # all in one direction


def test_the_base_is_read_once_for_all_time(tmp_path, base, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
    adapter = write_adapter(tmp_path / "adapter")
    arguments = ("--adapter", adapter, "--base", base)
    counts = []
    for number, extra in enumerate(((), (), ("--spectral",), ("--spectral",))):
        _, _, summary = run(tmp_path / str(number), *arguments, *extra)
        counts.append(summary.metrics["num_base_tensors_read"])
        assert summary.metrics["max_ratio"] == pytest.approx(0.05, abs=1e-6)
    assert counts == [6, 0, 6, 0]


def test_a_base_of_zeros_is_said_to_be_one(tmp_path):
    """As a file is that was made at its full size and never filled."""
    write_sparse_safetensors(tmp_path / "zeros.safetensors", SHAPES)
    adapter = write_adapter(tmp_path / "adapter")
    status, directory, summary = run(
        tmp_path, "--adapter", adapter, "--base", tmp_path / "zeros.safetensors", "--spectral"
    )
    assert status == 1 and any("6 of 6 adapted weights" in note for note in summary.notes)
    assert summary.metrics["max_ratio"] is None and summary.metrics["max_spectral_error"] == 0.0
    assert {row["ratio"] for row in table(directory / "modules.csv")} == {"inf"}


def test_a_kohya_file_that_lost_its_alpha_is_remarked(tmp_path, base, capsys):
    adapter = write_adapter(tmp_path / "bare", naming="kohya")
    _, _, summary = run(tmp_path, "--adapter", adapter, "--base", base)
    assert any("no alpha for 6 of 6 modules" in note for note in summary.notes)
    assert "no alpha for 6 of 6" in capsys.readouterr().out
    whole = write_adapter(tmp_path / "whole", naming="kohya", alpha=RANK)
    assert not run(tmp_path / "other", "--adapter", whole, "--base", base)[2].notes


def test_the_variants_of_an_adapter_and_a_base_that_do_not_fit_are_named(tmp_path, capsys):
    """Files with the published names and sizes, and no data."""
    base = tmp_path / "wan22_5b.safetensors"
    write_sparse_safetensors(base, expected_shapes(PUBLISHED["ti2v-5b"]))
    targets = [f"blocks.{block}.cross_attn.{projection}" for block in (0, 35) for projection in "kv"]
    tensors = {f"diffusion_model.{module}.lora_A.weight": torch.ones(2, 5120) for module in targets}
    tensors |= {f"diffusion_model.{module}.lora_B.weight": torch.ones(5120, 2) for module in targets}
    save_file(tensors, tmp_path / "adapter.safetensors")
    assert run(tmp_path, "--adapter", tmp_path / "adapter.safetensors", "--base", base)[0] == 2
    error = capsys.readouterr().err
    assert (
        "blocks.0.cross_attn.k adapts [5120, 5120] (t2v-a14b, i2v-a14b), the base has [3072, 3072] (ti2v-5b)"
        in error
    )
    assert "the base has no blocks.35.cross_attn.v (that of t2v-a14b, i2v-a14b fits)" in error
    text = {
        "lora_te1_block_0.lora_down.weight": torch.ones(2, 8),
        "lora_te1_block_0.lora_up.weight": torch.ones(8, 2),
    }
    save_file(text, tmp_path / "text.safetensors")
    assert run(tmp_path, "--adapter", tmp_path / "text.safetensors", "--base", base)[0] == 2
    assert "lora_te1_block_0 belongs to a text encoder" in capsys.readouterr().err


def test_no_product_of_the_size_of_a_weight_is_formed(tmp_path, base, monkeypatch):
    """Every tensor that is computed on the way is smaller than the weight that it is about."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
                largest.append(result.numel())
            return result

    subject = Subject(write_adapter(tmp_path / "adapter"), base, None, None, None, ())
    with Watch():
        measure_delta(subject, open_transformer(base), norms_directory=tmp_path / "norms")
    assert largest and max(largest) == RANK * RANK


@pytest.mark.parametrize(
    ("factor", "cap", "status", "verdict", "explanation"),
    [
        (1.0, 0.051, 0, "pass", "All 6 modules are within the cap of 0.051"),
        (
            1.0,
            0.049,
            1,
            "fail",
            "6 of 6 modules over the cap of 0.049; the farthest is blocks.0.cross_attn.k with 0.0500.",
        ),
        (2.0**-10, 0.05, 3, "inconclusive", "hardly anything: the largest ratio is 4.88e-05"),
        (0.0, 0.05, 3, "inconclusive", "hardly anything: the largest ratio is 0"),
        (2.0**-10, 1e-5, 1, "fail", "6 of 6 modules over the cap of 1e-05"),
    ],
)
def test_verdict_and_exit_status(tmp_path, base, factor, cap, status, verdict, explanation):
    adapter = write_adapter(tmp_path / "adapter", factor=factor)
    found, _, summary = run(tmp_path, "--adapter", adapter, "--base", base, "--max_delta_ratio", cap)
    assert (found, summary.verdict) == (status, verdict)
    assert explanation in summary.explanation
    assert summary.caps["max_delta_ratio"] == cap


def test_one_module_over_its_cap_is_found(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter")
    tensors = {
        f"diffusion_model.{module}.lora_{part}.weight": tensor
        for module in TARGETS
        for part, tensor in zip("AB", unit_pair(module), strict=True)
    }
    tensors["diffusion_model.blocks.1.cross_attn.v.lora_B.weight"] *= 1.25
    save_file(tensors, adapter)
    status, directory, summary = run(tmp_path, "--adapter", adapter, "--base", base)
    assert status == 1
    assert (
        "1 of 6 modules over the cap of 0.05; the farthest is blocks.1.cross_attn.v with 0.0625"
        in summary.explanation
    )
    assert [row["module"] for row in table(directory / "modules.csv") if row["is_over_cap"] == "True"] == [
        "blocks.1.cross_attn.v"
    ]


CONFIG = """
output_dir = "{output}"
dataset = "dataset.toml"
[model]
type = "wan"
ckpt_path = "{base}"
cache_text_embeddings = true
train_text_encoder = false
freeze_transformer = true
{model}
[adapter]
type = "lora"
[optimizer]
type = "adamw"
lr = 1e-4
{rest}
"""


def write_run(directory, base, model="", rest="", epochs=(1,), **adapter):
    for epoch in epochs:
        write_adapter(directory / f"epoch{epoch}", **adapter)
        os.utime(directory / f"epoch{epoch}" / "adapter_model.safetensors", (epoch, epoch))
    (directory / "config.toml").write_text(
        CONFIG.format(output=directory.parent, base=base, model=model, rest=rest)
    )
    return directory


def content(directory):
    return {
        path: (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns)
        for path in directory.rglob("*")
    }


def test_without_arguments_it_takes_the_newest_run_says_so_and_leaves_it_alone(
    tmp_path, base, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_run(Path("output/a/older"), base, epochs=(1,))
    newest = write_run(Path("output/b/newer"), base, epochs=(2, 3), rest="[budget]\nmax_delta_ratio = 0.04")
    before = content(Path("output"))
    assert probe.main([]) == 1
    assert content(Path("output")) == before
    said = capsys.readouterr().out
    assert (
        f"adapter: {newest / 'epoch3' / 'adapter_model.safetensors'} (of the newest run below output)" in said
    )
    assert f"base: {base} (from {newest / 'config.toml'})" in said
    (directory,) = Path("reports/lora_delta_budget").iterdir()
    summary = read_summary(directory)
    assert summary.caps["max_delta_ratio"] == 0.04
    assert summary.metrics["cap_source"] == f"[budget] of {newest / 'config.toml'}"
    assert [entry.role for entry in summary.inputs] == ["adapter", "config", "base", "base"]
    assert any("newest run" in note for note in summary.notes)


def test_an_adapter_inside_a_run_brings_its_config(tmp_path, base):
    directory = write_run(tmp_path / "output" / "run", base, rest="[budget]\nmax_delta_ratio = 0.06")
    status, _, summary = run(tmp_path, "--adapter", directory)
    assert (status, summary.caps["max_delta_ratio"]) == (0, 0.06)


def test_a_config_names_the_run_and_flags_win_over_it(tmp_path, base):
    directory = write_run(
        tmp_path / "output" / "run", tmp_path / "gone", rest="[budget]\nmax_delta_ratio = 0.06"
    )
    status, _, summary = run(
        tmp_path, "--config", directory / "config.toml", "--base", base, "--max_delta_ratio", 0.04
    )
    assert (status, summary.caps["max_delta_ratio"]) == (1, 0.04)


def test_a_config_outside_a_run_means_its_newest_run(tmp_path, base):
    write_run(tmp_path / "output" / "run", base)
    config = tmp_path / "train.toml"
    config.write_text((tmp_path / "output" / "run" / "config.toml").read_text())
    assert run(tmp_path, "--config", config)[0] == 0


@pytest.fixture
def a14b(tmp_path, base):
    """Two experts; the adapter's ratio is 0.05 on the high-noise one and 0.025 on the other."""
    root = tmp_path / "a14b"
    root.mkdir()
    (root / "high_noise_model").symlink_to(base)
    doubled = {name: 40 * signs(*shape) for name, shape in SHAPES.items()}
    write_base(root / "low_noise_model", changes=doubled)
    return root


def test_the_expert_is_that_of_the_flag_or_of_the_run(tmp_path, a14b, capsys):
    adapter = write_adapter(tmp_path / "adapter")
    assert run(tmp_path, "--adapter", adapter, "--base", a14b)[0] == 2
    assert "--expert" in capsys.readouterr().err
    for expert, ratio in (("high_noise", 0.05), ("low_noise", 0.025)):
        place = tmp_path / f"flag_{expert}"
        _, _, summary = run(place, "--adapter", adapter, "--base", a14b, "--expert", expert)
        assert summary.metrics["max_ratio"] == pytest.approx(ratio, abs=1e-6)
        assert summary.metrics["expert"] == expert
        directory = write_run(tmp_path / f"run_{expert}", a14b, model=f'expert = "{expert}"')
        _, _, summary = run(tmp_path / f"reports_{expert}", "--adapter", directory)
        assert summary.metrics["max_ratio"] == pytest.approx(ratio, abs=1e-6)


def test_an_adapter_that_names_its_expert_is_held_against_that_one(tmp_path, a14b, capsys):
    adapter = write_adapter(tmp_path / "adapter", metadata={"expert": "low_noise"})
    _, _, summary = run(tmp_path, "--adapter", adapter, "--base", a14b)
    assert summary.metrics["expert"] == "low_noise" and not summary.notes
    assert summary.metrics["max_ratio"] == pytest.approx(0.025, abs=1e-6)
    _, _, other = run(tmp_path / "other", "--adapter", adapter, "--base", a14b, "--expert", "high_noise")
    assert other.metrics["max_ratio"] == pytest.approx(0.05, abs=1e-6)
    assert any("for the expert low_noise, but it is held against high_noise" in note for note in other.notes)
    unnamed = write_adapter(tmp_path / "unnamed", metadata={"expert": "none"})
    assert run(tmp_path / "third", "--adapter", unnamed, "--base", a14b)[0] == 2
    assert "--expert" in capsys.readouterr().err


def test_diffusers_second_transformer_is_the_low_noise_expert(tmp_path, a14b, capsys):
    adapter = write_adapter(tmp_path / "adapter", naming="diffusers")
    first = load_file(adapter)
    second = {key.replace("transformer.", "transformer_2."): tensor.clone() for key, tensor in first.items()}
    save_file(second, adapter)
    _, _, summary = run(tmp_path, "--adapter", adapter, "--base", a14b)
    assert summary.metrics["expert"] == "low_noise"
    assert summary.metrics["max_ratio"] == pytest.approx(0.025, abs=1e-6)
    save_file(first | second, adapter)
    assert run(tmp_path / "both", "--adapter", adapter, "--base", a14b, "--expert", "low_noise")[0] == 2
    assert "a file must hold one adapter" in capsys.readouterr().err


def test_an_expert_that_the_base_does_not_have_is_refused(tmp_path, base, a14b, capsys):
    adapter = write_adapter(tmp_path / "adapter")
    for place in (base, a14b / "low_noise_model"):
        assert run(tmp_path, "--adapter", adapter, "--base", place, "--expert", "high_noise")[0] == 2
        assert "high_noise_model" in capsys.readouterr().err


def test_an_adapter_for_another_width_names_ten_modules(tmp_path, base, capsys):
    targets = [f"blocks.{block}.cross_attn.{projection}" for block in range(6) for projection in "kv"]
    tensors = {f"diffusion_model.{module}.lora_A.weight": torch.ones(2, 40) for module in targets}
    tensors |= {f"diffusion_model.{module}.lora_B.weight": torch.ones(40, 2) for module in targets}
    save_file(tensors, tmp_path / "wide.safetensors")
    assert run(tmp_path, "--adapter", tmp_path / "wide.safetensors", "--base", base)[0] == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert f"12 of 12 modules do not fit {base}" in error
    assert "blocks.0.cross_attn.k adapts [40, 40], the base has [32, 32]" in error
    assert "the base has no blocks.3.cross_attn.k" in error
    assert sum(error.count(module) for module in targets) == 10
    assert not (tmp_path / "reports").exists()


def spoil_adapter(adapter, base):
    save_file({"diffusion_model.blocks.0.cross_attn.k.dora_scale": torch.ones(1)}, adapter)


def spoil_adapter_values(adapter, base):
    tensors = {"blocks.0.cross_attn.k.lora_A.weight": torch.full((2, 32), float("nan"))}
    save_file(tensors | {"blocks.0.cross_attn.k.lora_B.weight": torch.ones(32, 2)}, adapter)


def merge_adapter(adapter, base):
    save_file({name: torch.ones(shape) for name, shape in SHAPES.items()}, adapter)


def cut_adapter(adapter, base):
    adapter.write_bytes(adapter.read_bytes()[:-10])


def cut_base(adapter, base):
    shard = base / "diffusion_pytorch_model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])


def only_a(adapter, base):
    save_file({"diffusion_model.blocks.0.cross_attn.k.lora_A.weight": torch.ones(2, 32)}, adapter)


def empty_adapter(adapter, base):
    save_file({}, adapter)


def lokr_adapter(adapter, base):
    save_file({"lora_unet_blocks_0_cross_attn_k.lokr_w1": torch.ones(2, 2)}, adapter)


def remove_shard(adapter, base):
    (base / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink()


def spoil_base_values(adapter, base):
    replace_base(base, changes={"blocks.0.cross_attn.k.weight": torch.full((32, 32), float("inf"))})


def quantise_base(adapter, base):
    replace_base(base, changes={"blocks.0.cross_attn.k.weight": torch.ones(32, 32).to(torch.float8_e4m3fn)})


def use_another_model(adapter, base):
    replace_base(base, shapes={"encoder.layer.weight": (4, 4), "shared.weight": (4, 4)})


def replace_base(base, **arguments):
    for path in base.iterdir():
        path.unlink()
    base.rmdir()
    write_base(base, **arguments)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_adapter, "DoRA"),
        (spoil_adapter_values, "NaN"),
        (merge_adapter, "full weights"),
        (cut_adapter, "truncated"),
        (only_a, "A or B is missing"),
        (empty_adapter, "empty"),
        (lokr_adapter, "LoKr"),
        (cut_base, "truncated"),
        (remove_shard, "missing"),
        (spoil_base_values, "NaN or infinite"),
        (quantise_base, "F8_E4M3"),
        (use_another_model, "is not a DiT of Wan 2.2"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_report(tmp_path, capsys, spoil, words):
    base, adapter = write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter")
    spoil(adapter, base)
    assert run(tmp_path, "--adapter", adapter, "--base", base)[0] == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "reports").exists()


class Harmful:
    """Unpickling it would run code."""

    def __reduce__(self):
        return (Path.touch, (Path("code_was_run"),))


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, base, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"blocks.0.cross_attn.k.lora_A.weight": Harmful()}, "adapter.pth")
    assert run(tmp_path, "--adapter", "adapter.pth", "--base", base)[0] == 2
    assert "read from .safetensors files only" in capsys.readouterr().err
    adapter = write_adapter(tmp_path / "adapter")
    assert run(tmp_path, "--adapter", adapter, "--base", "adapter.pth")[0] == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not Path("code_was_run").exists()


def test_200_damaged_headers_are_never_a_crash_and_never_silence(tmp_path, base, capsys):
    """Bits are flipped, or the file is cut, in the header of the adapter: a message, or a report about what is there."""
    original = write_adapter(tmp_path / "adapter").read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    random = np.random.default_rng(0)
    statuses = []
    for number in range(200):
        data = bytearray(original)
        if number % 4 == 3:
            data = data[: int(random.integers(0, header))]
        else:
            data[int(random.integers(0, header))] ^= 1 << int(random.integers(0, 8))
        adapter = tmp_path / f"damaged_{number}.safetensors"
        adapter.write_bytes(data)
        status, _, summary = run(tmp_path / str(number), "--adapter", adapter, "--base", base)
        error = capsys.readouterr().err
        statuses.append(status)
        if status == 2:
            assert error.startswith("error: ") and error.count("\n") == 1 and summary is None, error
        else:
            # What was hit says nothing about the adapter, such as a space: then the numbers are the same.
            assert status == 0 and error == "" and summary is not None, (number, status, error)
            assert summary.metrics["num_modules"] == len(TARGETS)
            assert summary.metrics["mean_ratio"] == pytest.approx(0.05, abs=1e-6)
    assert statuses.count(2) > 150


@pytest.mark.parametrize(
    "arguments",
    [
        ["--adapter", "missing.safetensors", "--base", "{base}"],
        ["--adapter", "{adapter}", "--base", "missing"],
        ["--adapter", "{adapter}"],
        ["--config", "missing.toml"],
        [],
    ],
)
def test_what_is_missing_is_named(tmp_path, base, arguments, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adapter = write_adapter(tmp_path / "adapter")
    assert run(tmp_path, *(text.format(base=base, adapter=adapter) for text in arguments))[0] == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and any(word in error for word in ("missing", "--base", "output"))


def test_a_taken_run_tag_is_refused_before_anything_is_measured(tmp_path, base, capsys):
    adapter = write_adapter(tmp_path / "adapter")
    assert run(tmp_path, "--adapter", adapter, "--base", base)[0] == 0
    assert run(tmp_path, "--adapter", adapter, "--base", base)[0] == 2
    assert "choose another --run_tag" in capsys.readouterr().err


def test_as_a_person_runs_it(tmp_path, base):
    """The script as a process, because the exit status is what the outside sees."""
    adapter = write_adapter(tmp_path / "adapter", factor=2.0)
    command = [sys.executable, str(SCRIPT), "--adapter", str(adapter), "--base", str(base)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, "")
    assert "fail: 6 of 6 modules over the cap of 0.05" in done.stdout
    assert len(list((tmp_path / "reports" / "lora_delta_budget").iterdir())) == 1


def test_help_needs_no_torch():
    code = f"import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\nexcept SystemExit as e: assert not e.code\nsys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, timeout=60
        ).returncode
        == 0
    )
