import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.wan.arch import WanArch, expected_shapes
from tests.helpers.rights import locked_folder
from tests.helpers.weight_files import (
    NUM_SHARDS,
    as_diffusers,
    dit,
    published,
    renamed,
    write_a14b,
    write_fp8_scaled,
    write_sharded,
)
from utils.config.schema import AdapterConfig
from utils.lora_targets import linear_modules, resolve_targets
from utils.report import read_summary
from utils.sparse_weights import write_sparse_safetensors

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "diagnostics" / "weights_inspect.py"


def load_script():
    spec = importlib.util.spec_from_file_location("weights_inspect", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["weights_inspect"] = module
    spec.loader.exec_module(module)
    return module


probe = load_script()
VARIANTS = ("ti2v-5b", "t2v-a14b", "i2v-a14b")


@pytest.fixture
def look(tmp_path, capsys):
    """`look(path, ...)`: run the probe in this process; status, re-read summary (None without a report), and what it said."""
    numbers = iter(range(1000))

    def run(*arguments):
        tag = f"run{next(numbers)}"
        status = probe.main(
            [*map(str, arguments), "--reports_dir", str(tmp_path / "reports"), "--run_tag", tag]
        )
        said = capsys.readouterr()
        report = tmp_path / "reports" / "weights_inspect" / tag
        return status, read_summary(report) if report.exists() else None, said.out + said.err

    return run


def only_part(summary):
    (part,) = summary.metrics["parts"]
    return part


def random_dit(seed, num_layers=3, dim=32):
    arch = WanArch("t2v", dim, 64, 16, 16, 16, 2, num_layers, 512, 1e-6, 24)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes(arch).items()}


LAYOUTS = {
    "official": lambda shapes, path, variant: write_sharded(path, shapes, NUM_SHARDS[variant]),
    "one file": lambda shapes, path, variant: one_file(path, shapes),
    "ComfyUI prefix": lambda shapes, path, variant: one_file(
        path, renamed(shapes, lambda name: f"model.diffusion_model.{name}")
    ),
    "short prefix": lambda shapes, path, variant: one_file(
        path, renamed(shapes, lambda name: f"diffusion_model.{name}")
    ),
    "diffusers": lambda shapes, path, variant: write_sharded(path, as_diffusers(shapes), 3),
    "fp8_scaled": lambda shapes, path, variant: write_fp8_scaled(path.with_suffix(".safetensors"), shapes),
}
EXPECTED = {
    "official": ("official", "", "plain"),
    "one file": ("official", "", "plain"),
    "ComfyUI prefix": ("official", "model.diffusion_model.", "plain"),
    "short prefix": ("official", "diffusion_model.", "plain"),
    "diffusers": ("diffusers", "", "plain"),
    "fp8_scaled": ("official", "", "fp8_scaled"),
}


def one_file(path, shapes, dtype="F16"):
    write_sparse_safetensors(path.with_suffix(".safetensors"), shapes, dtype)
    return path.with_suffix(".safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_recognised_in_every_layout(look, tmp_path, variant, layout):
    path = LAYOUTS[layout](dit(variant), tmp_path / "model", variant)
    status, summary, said = look(path)
    part = only_part(summary)
    assert (status, summary.verdict) == (0, "pass"), said
    assert (part["kind"], part["variant"], part["has_published_sizes"]) == ("transformer", variant, True)
    assert (part["naming"], part["prefix"], part["storage"]) == EXPECTED[layout]
    parameters = {"ti2v-5b": 4_999_787_712, "t2v-a14b": 14_288_491_584, "i2v-a14b": 14_288_901_184}
    assert part["num_parameters"] == parameters[variant]
    assert part["expert"] is None


@pytest.mark.parametrize(
    ("table", "column", "what", "naming"),
    [
        ("umt5_xxl_keys", "official_key", "UMT5 encoder", "official"),
        ("umt5_xxl_keys", "transformers_key", "UMT5 encoder", "Hugging Face"),
        ("wan21_vae_keys", "official_key", "VAE of Wan 2.1", "official"),
        ("wan21_vae_keys", "diffusers_key", "VAE of Wan 2.1", "diffusers"),
        ("wan22_vae_keys", "official_key", "VAE of Wan 2.2", "official"),
        ("wan22_vae_keys", "diffusers_key", "VAE of Wan 2.2", "diffusers"),
    ],
)
def test_encoders_and_vaes_are_recognised(look, tmp_path, table, column, what, naming):
    status, summary, _ = look(one_file(tmp_path / "part", published(table, column)))
    part = only_part(summary)
    assert (status, part["what"], part["naming"], part["has_published_sizes"]) == (0, what, naming, True)


def test_the_tokenizer_and_fp8_of_an_encoder_for_comfyui_are_said(look, tmp_path):
    shapes = published("umt5_xxl_keys", "transformers_key")
    status, summary, said = look(one_file(tmp_path / "plain", shapes))
    assert status == 0 and "no spiece_model" in said
    path = write_fp8_scaled(
        tmp_path / "fp8.safetensors", shapes | {"spiece_model": (4548313,)}, (".scale_weight",)
    )
    status, summary, said = look(path)
    assert (status, only_part(summary)["storage"]) == (0, "fp8_scaled")
    assert "travels in the file (spiece_model)" in said


@pytest.mark.parametrize("variant", ["t2v-a14b", "i2v-a14b"])
def test_both_experts_of_an_official_root_are_told_by_their_folders(look, tmp_path, variant):
    status, summary, said = look(write_a14b(tmp_path / "root", variant))
    assert status == 0
    told = {part["expert"]: part["told_by"] for part in summary.metrics["parts"]}
    assert told == {
        "high_noise": "the folder high_noise_model",
        "low_noise": "the folder low_noise_model",
    }
    # There are no values in these files, and it does not claim that there are.
    assert "all sampled values are 0, so whether they hold different weights is open" in said
    assert summary.metrics["num_tensors"] == 2 * 1095
    rows = list(csv.DictReader((tmp_path / "reports/weights_inspect/run0/keys.csv").open()))
    wanted = {(name, "x".join(map(str, shape))) for name, shape in dit(variant).items()}
    for expert in ("high_noise", "low_noise"):
        found = {(row["key"], row["shape"]) for row in rows if row["part"] == f"transformer.{expert}"}
        assert found == wanted


def test_a_root_with_one_expert_is_incomplete_and_an_expert_alone_is_not(look, tmp_path):
    root = write_a14b(tmp_path / "root", "t2v-a14b")
    assert look(root, "--expert", "low_noise")[0] == 0
    shutil.rmtree(root / "low_noise_model")
    status, summary, said = look(root)
    assert (status, summary.verdict) == (1, "fail") and "low_noise_model is missing" in said
    assert look(root / "high_noise_model")[0] == 0
    status, summary, said = look(root, "--expert", "low_noise")
    assert (status, summary) == (2, None) and "holds no low_noise expert" in said


def test_diffusers_roots_have_the_high_noise_expert_under_the_plain_name(look, tmp_path):
    for folder in ("transformer", "transformer_2"):
        write_sharded(tmp_path / "root" / folder, as_diffusers(dit("i2v-a14b")), 3)
    status, summary, _ = look(tmp_path / "root")
    assert (status, summary.metrics["layout"]) == (0, ["diffusers directory"])
    experts = {Path(part["path"]).name: part["expert"] for part in summary.metrics["parts"]}
    assert experts == {"transformer": "high_noise", "transformer_2": "low_noise"}
    (tmp_path / "root" / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.9}))
    shutil.rmtree(tmp_path / "root" / "transformer_2")
    status, _, said = look(tmp_path / "root")
    assert status == 1 and "transformer_2 is missing" in said


@pytest.mark.parametrize(
    ("name", "metadata", "flag", "expert", "basis"),
    [
        ("wan2.2_t2v_high_noise_14B_fp16", None, None, "high_noise", "the file name"),
        ("Wan2_2-T2V-A14B-LOW_fp8", None, None, "low_noise", "the file name"),
        ("model", {"expert": "low_noise"}, None, "low_noise", "the file's metadata"),
        ("model", None, "high_noise", "high_noise", "the flag --expert"),
        ("highlights_slow", None, None, None, "nothing"),
    ],
)
def test_what_an_expert_is_told_by_is_said(look, tmp_path, name, metadata, flag, expert, basis):
    path = tmp_path / f"{name}.safetensors"
    write_sparse_safetensors(path, dit("t2v-a14b"), "F16", metadata)
    status, summary, said = look(path, *(["--expert", flag] if flag else []))
    part = only_part(summary)
    assert (status, part["expert"]) == (0, expert)
    assert part["told_by"].startswith(basis)
    assert ("Wan 2.1's 14B text-to-video model" in said) == (expert is None)


def test_contradictions_about_the_expert_are_said(look, tmp_path):
    path = tmp_path / "high_noise.safetensors"
    write_sparse_safetensors(path, dit("t2v-a14b"), "F16", {"expert": "low_noise"})
    _, summary, said = look(path)
    assert only_part(summary)["expert"] == "low_noise"
    assert (
        "warning: the file's metadata says low_noise, but the file name high_noise.safetensors says high_noise"
        in said
    )


def test_one_expert_given_twice_is_found_out_by_its_values(look, tmp_path, tiny_t2v):
    status, _, said = look(tiny_t2v)
    assert status == 0 and "their weights differ (median relative distance" in said
    root = Path(shutil.copytree(tiny_t2v, tmp_path / "twice"))
    shutil.rmtree(root / "low_noise_model")
    shutil.copytree(root / "high_noise_model", root / "low_noise_model")
    status, _, said = look(root)
    assert status == 1 and "both experts hold the same weights" in said


@pytest.mark.parametrize("fixture", ["tiny_ti2v", "tiny_t2v", "tiny_i2v"])
def test_a_whole_checkpoint_with_pth_files(look, request, fixture):
    status, summary, _ = look(request.getfixturevalue(fixture))
    kinds = sorted({part["kind"] for part in summary.metrics["parts"]})
    assert (status, kinds) == (0, ["text_encoder", "transformer", "vae"])
    assert not any(part["has_published_sizes"] for part in summary.metrics["parts"])


def test_missing_tensors_and_wrong_shapes_fail_and_ten_are_named(look, tmp_path):
    shapes = dit("ti2v-5b")
    kept = {name: shape for name, shape in shapes.items() if not name.startswith("blocks.7.")}
    status, summary, said = look(one_file(tmp_path / "holes", kept))
    assert (status, summary.metrics["num_problems"]) == (1, 27)
    assert (
        said.count("problem: ") == 11 and "blocks.7.modulation is missing" in said and "and 17 more" in said
    )
    wrong = shapes | {"blocks.3.cross_attn.k.weight": (3072, 4096), "extra.weight": (4,)}
    del wrong["head.head.bias"]
    status, summary, said = look(one_file(tmp_path / "wrong", wrong))
    assert (status, only_part(summary)["variant"], summary.metrics["num_problems"]) == (1, "ti2v-5b", 3)
    for text in (
        "blocks.3.cross_attn.k.weight is [3072, 4096] instead of [3072, 3072]",
        "head.head.bias is missing",
        "extra.weight is not one of its tensors",
    ):
        assert text in said


def test_the_last_blocks_of_a_published_size_are_missed_and_whole_numbers_are_no_weights(look, tmp_path):
    shapes = dit("ti2v-5b")
    cut = {name: shape for name, shape in shapes.items() if not name.startswith("blocks.29.")}
    assert look(one_file(tmp_path / "cut", cut))[0] == 1
    dtypes = dict.fromkeys(shapes, "F16") | {"blocks.0.ffn.0.weight": "I64"}
    write_sparse_safetensors(tmp_path / "int.safetensors", shapes, dtypes)
    status, _, said = look(tmp_path / "int.safetensors")
    assert status == 1 and "blocks.0.ffn.0.weight holds I64" in said


def test_a_scale_without_its_weight_fails(look, tmp_path):
    path = write_fp8_scaled(tmp_path / "m.safetensors", dit("ti2v-5b"))
    shapes = {"scaled_fp8": (0,), "blocks.0.ffn.9.scale_weight": ()} | dit("ti2v-5b")
    write_sparse_safetensors(path, shapes, dict.fromkeys(shapes, "F16") | {"scaled_fp8": "F8_E4M3"})
    status, _, said = look(path)
    assert status == 1 and "blocks.0.ffn.9.scale_weight has no blocks.0.ffn.9.weight" in said


FOREIGN = {
    "Wan 2.1 image-to-video": dit("i2v-a14b")
    | {f"blocks.{n}.cross_attn.{p}_img.weight": (5120, 5120) for n in range(40) for p in "kv"},
    "1.3B": {
        name: tuple(1536 if size == 3072 else 8960 if size == 14336 else size for size in shape)
        for name, shape in dit("ti2v-5b").items()
    },
    "VACE": dit("t2v-a14b") | {f"vace_blocks.{n}.before_proj.weight": (4, 4) for n in range(4)},
    "CLIP text encoder": {f"text_model.encoder.layers.{n}.mlp.fc1.weight": (4, 4) for n in range(9)},
    "begin with abc (3)": {f"abc.{n}": (2,) for n in range(3)},
    "no tensors": {},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_part_of_wan_22_is_inconclusive_and_described(look, tmp_path, name):
    status, summary, said = look(one_file(tmp_path / "file", FOREIGN[name]))
    assert (status, summary.verdict) == (3, "inconclusive"), said
    assert name in summary.explanation


def test_all_parts_of_an_all_in_one_file_are_found(look, tmp_path):
    shapes = renamed(dit("ti2v-5b"), lambda name: f"model.diffusion_model.{name}")
    shapes |= renamed(
        published("umt5_xxl_keys", "transformers_key"),
        lambda name: f"text_encoders.umt5xxl.transformer.{name}",
    )
    shapes |= renamed(published("wan22_vae_keys", "official_key"), lambda name: f"vae.{name}")
    status, summary, _ = look(one_file(tmp_path / "all", shapes))
    assert status == 0
    assert [part["what"] for part in summary.metrics["parts"]] == [
        "DiT of ti2v-5b",
        "UMT5 encoder",
        "VAE of Wan 2.2",
    ]


def test_a_file_of_the_trained_tensors_of_an_encoder_is_named_so(look, tmp_path):
    names = published("umt5_xxl_keys", "transformers_key")
    top = {
        name: shape
        for name, shape in names.items()
        if name.startswith(("encoder.block.22.", "encoder.block.23."))
    }
    status, summary, said = look(one_file(tmp_path / "text_encoder", top))
    assert (status, only_part(summary)["kind"]) == (1, "text_encoder")
    assert "holds 20 of the encoder's 242 tensors" in said and "save_text_encoder_full = false" in said


ADAPTER_NAMES = {
    "ComfyUI (diffusion_model.)": lambda module: f"diffusion_model.{module}.lora_{{}}.weight",
    "PEFT": lambda module: f"base_model.model.{module}.lora_{{}}.weight",
    "kohya": lambda module: f"lora_unet_{module.replace('.', '_')}.lora_{{}}.weight",
    "diffusers": lambda module: f"transformer.{module.replace('cross_attn.k', 'attn2.to_k')}.lora_{{}}.weight",
    "bare": lambda module: f"{module}.lora_{{}}.weight",
}


def adapter_shapes(naming, dim=3072, rank=16, blocks=range(20, 30)):
    shapes = {}
    for block in blocks:
        name = ADAPTER_NAMES[naming](f"blocks.{block}.cross_attn.k")
        down, up = ("down", "up") if naming == "kohya" else ("A", "B")
        shapes |= {name.format(down): (rank, dim), name.format(up): (dim, rank)}
    return shapes


@pytest.mark.parametrize("naming", ADAPTER_NAMES)
def test_an_adapter_is_described(look, tmp_path, naming):
    status, summary, _ = look(one_file(tmp_path / "lora", adapter_shapes(naming)))
    part = only_part(summary)
    assert (status, part["kind"], part["naming"], part["what"]) == (0, "adapter", naming, "LoRA of rank 16")
    assert part["ranks"] == [16] and part["fits"] == ["ti2v-5b"]
    assert part["targets"] == ["cross_attn.k in blocks 20-29"]


@pytest.mark.parametrize("naming", ["PEFT", "kohya", "diffusers"])
def test_the_tensors_of_an_adapter_are_grouped_over_blocks(look, tmp_path, naming):
    look(one_file(tmp_path / "lora", adapter_shapes(naming)))
    directory = next((tmp_path / "reports" / "weights_inspect").iterdir())
    rows = list(csv.DictReader((directory / "shapes.csv").open(newline="")))
    assert {(row["pattern"], row["shape"], row["tensors"]) for row in rows} == {
        ("blocks.N.cross_attn.k.A", "16x3072", "10"),
        ("blocks.N.cross_attn.k.B", "3072x16", "10"),
    }
    text = (directory / "report.md").read_text()
    assert "adapter: cross_attn.k in blocks 20-29" in text and "No blocks" not in text


def test_an_adapter_of_the_patch_convolution_fits_its_variant(look, tmp_path):
    """As lora_delta_budget accepts it: A has the kernel's shape."""
    name = "diffusion_model.patch_embedding.lora_{}.weight"
    shapes = {name.format("A"): (4, 48, 1, 2, 2), name.format("B"): (3072, 4, 1, 1, 1)}
    adapter = one_file(tmp_path / "lora", shapes)
    status, summary, _ = look(adapter)
    assert status == 0 and only_part(summary)["fits"] == ["ti2v-5b"]
    status, _, said = look(adapter, one_file(tmp_path / "five", dit("ti2v-5b")))
    assert status == 0 and "all 1 adapted modules are in the DiT" in said


def test_remarks_about_two_files_of_one_name_say_which(look, tmp_path):
    one = one_file(tmp_path / "a", adapter_shapes("PEFT"))
    other = one_file(tmp_path / "b", adapter_shapes("PEFT", rank=8))
    _, summary, _ = look(one, other)
    assert len(set(summary.notes)) == len(summary.notes)
    assert {note.partition(": ")[0] for note in summary.notes} == {"A:adapter", "B:adapter"}


def test_a_checkpoint_and_a_config_are_two_questions(look, tmp_path, capsys):
    status, _, said = look(one_file(tmp_path / "a", adapter_shapes("PEFT")), "--config", "x.toml")
    assert status == 2 and "leave one of them out" in said


def test_a_place_for_targets_that_is_not_writable_is_refused_before_the_report(tmp_path, capsys):
    with locked_folder(0o555) as folder:
        words = ["x", "--targets", "cross_attn.k", "--out", str(folder / "targets.txt")]
        assert probe.main([*words, "--reports_dir", str(tmp_path / "reports")]) == 2
    assert "choose another --out" in capsys.readouterr().err and not (tmp_path / "reports").exists()


def test_broken_and_other_kinds_of_adapters(look, tmp_path):
    shapes = adapter_shapes("PEFT")
    del shapes["base_model.model.blocks.20.cross_attn.k.lora_A.weight"]
    status, _, said = look(one_file(tmp_path / "half", shapes))
    assert status == 1 and "blocks.20.cross_attn.k has no A" in said
    lokr = {f"diffusion_model.blocks.{n}.cross_attn.k.lokr_w{m}": (4, 4) for n in range(4) for m in (1, 2)}
    status, summary, _ = look(one_file(tmp_path / "lokr", lokr))
    assert status == 3 and "LoKr" in summary.explanation


def test_an_adapter_against_a_dit_fits_or_not(look, tmp_path):
    adapter = one_file(tmp_path / "lora", adapter_shapes("ComfyUI (diffusion_model.)"))
    fitting, other = one_file(tmp_path / "five", dit("ti2v-5b")), one_file(tmp_path / "big", dit("i2v-a14b"))
    status, _, said = look(adapter, fitting)
    assert status == 0 and "all 10 adapted modules are in the DiT" in said
    status, _, said = look(adapter, other)
    assert status == 1 and "10 of 10 adapted modules do not fit" in said
    assert "blocks.20.cross_attn.k adapts [3072, 3072], the base has [5120, 5120]" in said


def test_two_variants_side_by_side(look, tmp_path):
    status, summary, _ = look(
        one_file(tmp_path / "a", dit("ti2v-5b")), "--against", one_file(tmp_path / "b", dit("t2v-a14b"))
    )
    (diff,) = summary.metrics["differences"]
    assert status == 0 and diff["counts"] == {"only in B": 270, "shape": 825}
    assert diff["sentences"][0].startswith("the sizes differ: dim 3072")
    report = (tmp_path / "reports/weights_inspect/run0/report.md").read_text()
    assert "blocks.N.self_attn.q.weight (10)" in report and "blocks.N.modulation (30)" in report


def test_two_experts_differ_in_no_name_and_in_values(look, tmp_path):
    save_file(random_dit(0), tmp_path / "high_noise.safetensors")
    save_file(random_dit(1), tmp_path / "low_noise.safetensors")
    status, summary, _ = look(tmp_path / "high_noise.safetensors", tmp_path / "low_noise.safetensors")
    (diff,) = summary.metrics["differences"]
    assert status == 0 and set(diff["counts"]) == {"values"} and diff["values"] == "different"
    assert diff["median_distance"] > 1


def test_a_nameless_file_in_another_format_is_found_to_be_one_of_the_experts(look, tmp_path):
    weights = {expert: random_dit(seed) for seed, expert in enumerate(("high_noise", "low_noise"))}
    for expert, tensors in weights.items():
        (tmp_path / "root" / f"{expert}_model").mkdir(parents=True)
        save_file(tensors, tmp_path / "root" / f"{expert}_model" / "model.safetensors")
    prefixed = {
        f"model.diffusion_model.{name}": tensor.bfloat16() for name, tensor in weights["low_noise"].items()
    }
    save_file(prefixed, tmp_path / "x.safetensors")
    _, summary, _ = look(tmp_path / "x.safetensors", tmp_path / "root")
    found = {diff["what"].rpartition(", ")[2]: diff["values"] for diff in summary.metrics["differences"]}
    assert found == {"high_noise": "different", "low_noise": "rounded"}


def test_a_merged_file_is_found_by_the_tensors_that_moved(look, tmp_path):
    base, merged = random_dit(0), random_dit(0)
    for block in (1, 2):
        merged[f"blocks.{block}.cross_attn.k.weight"] *= 1.05
    save_file(base, tmp_path / "base.safetensors")
    save_file(merged, tmp_path / "merged.safetensors")
    _, summary, _ = look(tmp_path / "merged.safetensors", tmp_path / "base.safetensors")
    (diff,) = summary.metrics["differences"]
    assert (diff["values"], diff["counts"]) == ("near", {"values": 2})
    assert diff["median_distance"] == pytest.approx(0.05, abs=1e-6)
    assert any("blocks.N.cross_attn.k.weight (2)" in sentence for sentence in diff["sentences"])
    _, summary, said = look(tmp_path / "base.safetensors", tmp_path / "base.safetensors")
    assert summary.metrics["differences"][0]["values"] == "identical" and "the same weights" in said


def test_checkpoints_without_a_part_in_common_are_refused(look, tmp_path):
    one, other = one_file(tmp_path / "a", dit("ti2v-5b")), one_file(
        tmp_path / "b", published("umt5_xxl_keys", "official_key")
    )
    status, summary, said = look(one, other)
    assert (status, summary) == (2, None) and "have no part in common" in said


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_target_list_is_what_include_file_reads(look, tmp_path, layout):
    path = LAYOUTS[layout](dit("i2v-a14b"), tmp_path / "model", "i2v-a14b")
    out = tmp_path / "targets" / "kv.txt"
    status, summary, _ = look(path, "--targets", "cross_attn.{k,v}", "--blocks", "20-29,35", "--out", out)
    assert (status, summary.metrics["num_targets"]) == (0, 22)
    assert out.read_text() == (tmp_path / "reports/weights_inspect/run0/targets.txt").read_text()
    chosen = resolve_targets(
        linear_modules(dit("i2v-a14b")), AdapterConfig(rank=4, include_file=str(out)), None
    )
    blocks = [*range(20, 30), 35]
    assert chosen == [f"blocks.{block}.cross_attn.{projection}" for block in blocks for projection in "kv"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--targets", "cross_attn.z"], 'pattern "cross_attn.z" matches no module; the modules are'),
        (["--targets", "cross_attn.{k,z}"], '("cross_attn.z") matches no module'),
        (
            ["--targets", "cross_attn.k", "--blocks", "25-34"],
            "there is no block 30; the blocks of this DiT are 0-29",
        ),
        (["--targets", "cross_attn.k", "--blocks", "9-3"], "is no range of blocks"),
        (["--targets", "cross_attn.{k"], "{ without }"),
        (["--blocks", "3"], "go with --targets"),
    ],
)
def test_targets_that_are_not_there_are_refused_with_what_there_is(look, tmp_path, flags, message):
    status, summary, said = look(one_file(tmp_path / "m", dit("ti2v-5b")), *flags)
    assert (status, summary) == (2, None) and message in said
    assert said.startswith("error: ") and said.count("\n") == 1


def test_targets_need_a_dit_and_stay_out_of_runs(look, tmp_path):
    status, _, said = look(
        one_file(tmp_path / "t5", published("umt5_xxl_keys", "official_key")), "--targets", "attn.k"
    )
    assert status == 2 and "holds no Wan 2.2 DiT" in said
    (tmp_path / "run").mkdir()
    for name in ("config.toml", "metrics.jsonl"):
        (tmp_path / "run" / name).touch()
    path = one_file(tmp_path / "m", dit("ti2v-5b"))
    status, _, said = look(path, "--targets", "cross_attn.k", "--out", tmp_path / "run" / "t.txt")
    assert status == 2 and "lies in the training run" in said and not (tmp_path / "run" / "t.txt").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or directory"),
        (lambda path: path.mkdir(), "holds no weights (it is empty)"),
        (lambda path: (path.mkdir(), (path / "notes.txt").write_text("x")), "there are notes.txt"),
        (lambda path: path.write_text("x"), "not a weight file that can be read here"),
        (
            lambda path: (
                path.mkdir(),
                one_file(path / "m-00001-of-00002", {"a": (1,)}),
                one_file(path / "m-00002-of-00002", {"b": (1,)}),
            ),
            "no index",
        ),
    ],
)
def test_places_without_weights_are_refused_in_one_line(look, tmp_path, make, message):
    make(tmp_path / "place")
    status, summary, said = look(tmp_path / "place")
    assert (status, summary) == (2, None) and message in said
    assert said.startswith("error: ") and said.count("\n") == 1


class Harmful:
    def __reduce__(self):
        return (os.mkdir, ("made_by_a_weight_file",))


def test_code_in_a_pth_file_is_refused_and_not_run(look, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Harmful()}, tmp_path / "bad.pth")
    status, summary, said = look("bad.pth")
    assert (status, summary) == (2, None) and "code in a weight file is never run" in said
    assert not (tmp_path / "made_by_a_weight_file").exists()


def test_without_arguments_the_checkpoint_of_the_newest_run_is_taken_and_said(
    look, tmp_path, monkeypatch, tiny_ti2v
):
    monkeypatch.chdir(tmp_path)
    status, _, said = look()
    assert status == 2 and "no training run" in said
    text = (ROOT / "configs" / "smoke_dit_lora.toml").read_text().splitlines()
    lines = [f'ckpt_path = "{tiny_ti2v}"' if line.startswith("ckpt_path") else line for line in text]
    for age, name in enumerate(("new", "old")):
        run = tmp_path / "output" / "x" / name
        run.mkdir(parents=True)
        (run / "config.toml").write_text("\n".join(lines) + "\n")
        os.utime(run / "config.toml", (2_000_000_000 - age,) * 2)
    status, summary, said = look()
    assert status == 0 and "output/x/new/config.toml (the newest run below output)" in said
    assert {part["kind"] for part in summary.metrics["parts"]} == {"transformer", "text_encoder", "vae"}
    assert look("--config", tmp_path / "output/x/old/config.toml")[0] == 0
    # A path of its own in the config replaces that part.
    other = one_file(tmp_path / "vae", published("wan22_vae_keys", "official_key"))
    changed = [f'vae_path = "{other}"' if line.startswith("ckpt_path") else line for line in lines]
    both = [
        new
        for line, new in zip(lines, changed, strict=True)
        for new in ([line, new] if line != new else [line])
    ]
    (run / "config.toml").write_text("\n".join(both) + "\n")
    _, summary, _ = look("--config", run / "config.toml")
    assert next(part["path"] for part in summary.metrics["parts"] if part["kind"] == "vae") == str(other)


def test_what_a_run_saved(look, tmp_path):
    run = tmp_path / "run"
    for epoch in (1, 2):
        (run / f"epoch{epoch}").mkdir(parents=True)
        path = run / f"epoch{epoch}" / "adapter_model.safetensors"
        write_sparse_safetensors(
            path, adapter_shapes("ComfyUI (diffusion_model.)", rank=4 * epoch), "F32", {"variant": "ti2v-5b"}
        )
        os.utime(run / f"epoch{epoch}", (10**9 + epoch,) * 2)
    (run / "config.toml").touch()
    status, summary, said = look(run)
    assert (status, only_part(summary)["ranks"]) == (0, [8])
    assert "its metadata say that it is for ti2v-5b" in said


def test_headers_need_no_torch(tmp_path):
    root = write_a14b(tmp_path / "root", "t2v-a14b")
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['weights_inspect.py', {str(root)!r}, '--targets', 'cross_attn.k', '--reports_dir', {str(tmp_path / 'r')!r}]\n"
        f"try:\n    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "assert not {'torch', 'matplotlib', 'pandas'} & set(sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_program_itself(tmp_path):
    path = one_file(tmp_path / "m", dit("ti2v-5b"))
    command = [sys.executable, str(SCRIPT), str(path), "--reports_dir", str(tmp_path / "r"), "--run_tag", "x"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "report: " in done.stdout and (tmp_path / "r" / "weights_inspect" / "x" / "shapes.csv").is_file()
    # A second time under that name is refused before anything is read.
    assert subprocess.run(command, capture_output=True, env=environment, timeout=60).returncode == 2


def test_a_bfloat16_file_holds_what_it_did(tmp_path):
    """The values that the other tests compare are really those of the file."""
    from utils.tensor_samples import Sampler
    from utils.tensor_source import open_safetensors

    save_file({"a": torch.linspace(-3, 3, 100).bfloat16()}, tmp_path / "x.safetensors")
    with Sampler(open_safetensors([tmp_path / "x.safetensors"])).open() as sampler:
        assert sampler.values("a").tolist() == load_file(tmp_path / "x.safetensors")["a"].double().tolist()
