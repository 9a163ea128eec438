"""The same weights in every layout train the same numbers, bit for bit, and save the same names."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from models.wan.checkpoint import TEXT_ENCODER_FILE, open_text_encoder, open_transformer
from models.wan.probes.encoder_subject import find_encoder
from scripts.diagnostics import te_eval
from tests.helpers.layouts import write_comfyui, write_diffusers
from tests.helpers.workspace import Workspace, make_workspace
from utils.files import combined_fingerprint
from utils.metrics import read_metrics

SHORT = ("max_steps=2",)
MODES = ("dit_lora", "encoder_ft")
LAYOUTS = {
    "diffusers": write_diffusers,
    "comfyui": write_comfyui,
    "comfyui without prefix": lambda official, root: write_comfyui(official, root, ""),
}


class Runs:
    """Short runs with one dataset, each with an output directory of its own."""

    def __init__(self, root: Path, dataset: Path, official: Path) -> None:
        self.root, self.official = root, official
        self.place = make_workspace(root, official, dataset)
        self.losses: dict[tuple[str, ...], list[float]] = {}

    def train(self, mode: str, checkpoint: Path, *overrides: str) -> tuple[list[float], Path]:
        """Losses, and the run's directory."""
        work = Workspace(self.root, checkpoint)
        out = self.root / f"out{len(list(self.root.glob('out*')))}"
        assert work.train(mode, *SHORT, *overrides, f"output_dir={out}") == 0
        (run,) = out.iterdir()
        return [row["loss"] for row in read_metrics(run)], run

    def reference(self, mode: str, *overrides: str) -> list[float]:
        """Losses of the official layout; trained once."""
        key = (mode, *overrides)
        if key not in self.losses:
            self.losses[key] = self.train(mode, self.official, *overrides)[0]
        return self.losses[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_ti2v, tiny_dataset) -> Runs:
    return Runs(tmp_path_factory.mktemp("layouts"), tiny_dataset, tiny_ti2v)


@pytest.fixture(scope="module", params=LAYOUTS)
def checkpoint(request, tmp_path_factory, tiny_ti2v) -> Path:
    return LAYOUTS[request.param](tiny_ti2v, tmp_path_factory.mktemp("layout") / "ckpt")


@pytest.mark.parametrize("mode", MODES)
def test_a_layout_trains_the_numbers_of_the_official_one(runs, checkpoint, mode):
    losses, run = runs.train(mode, checkpoint)
    assert losses == runs.reference(mode)
    assert len(losses) == 2
    if mode == "dit_lora":
        with safe_open(run / "epoch1" / "adapter_model.safetensors", framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata()
        assert all(name.startswith("diffusion_model.blocks.") for name in names)
        assert all(".cross_attn.k." in name or ".cross_attn.v." in name for name in names)
        place = checkpoint / "transformer"
        if not place.is_dir():
            (place,) = (checkpoint / "diffusion_models").glob("*.safetensors")
        assert metadata["targets"] == "cross_attn.k in blocks 0-3; cross_attn.v in blocks 0-3"
        assert metadata["rank"] == "4" and metadata["num_targets"] == "8"
        assert (metadata["variant"], metadata["expert"], metadata["boundary"]) == ("ti2v-5b", "none", "none")
        assert len(metadata["encoder_hash"]) == 32
        assert metadata["base_hash"] == combined_fingerprint(open_transformer(place).files)
    else:
        saved = open_text_encoder(run / "epoch1" / "text_encoder.safetensors")
        assert saved.shapes == open_text_encoder(runs.official / TEXT_ENCODER_FILE).shapes


def test_a_mix_trains_the_numbers_of_the_official_one(runs, tiny_ti2v, tmp_path):
    """The DiT of a diffusers directory, ComfyUI's encoder and its tokenizer, the official VAE; an empty ckpt_path."""
    diffusers, comfyui = write_diffusers(tiny_ti2v, tmp_path / "d"), write_comfyui(tiny_ti2v, tmp_path / "c")
    (tmp_path / "empty").mkdir()
    losses, _ = runs.train(
        "dit_lora",
        tmp_path / "empty",
        f"model.transformer_path={diffusers / 'transformer'}",
        f"model.llm_path={comfyui / 'text_encoders' / 'umt5_xxl_bf16.safetensors'}",
        f"model.vae_path={tiny_ti2v / 'Wan2.2_VAE.pth'}",
    )
    assert losses == runs.reference("dit_lora")


@pytest.mark.parametrize(
    ("expert", "other"),
    [("low_noise", "high_noise"), pytest.param("high_noise", "low_noise", marks=pytest.mark.long)],
)
def test_experts_are_found_in_every_layout(tiny_t2v, tiny_dataset, tmp_path, expert, other):
    runs = Runs(tmp_path, tiny_dataset, tiny_t2v)
    choose = f"model.expert={expert}"
    expected = runs.reference("dit_lora", choose)
    for layout, write in LAYOUTS.items():
        checkpoint = write(tiny_t2v, tmp_path / layout)
        losses, run = runs.train("dit_lora", checkpoint, choose)
        assert losses == expected, layout
        shutil.rmtree(run)
    assert expected != runs.reference("dit_lora", f"model.expert={other}")


def test_a_tuned_encoder_is_found_and_read_in_every_format(runs, tmp_path):
    """One encoder, saved in four formats: probes find each, and all train one translator."""
    losses, drifts = {}, {}
    for name in ("hf", "official", "official_pth", "comfyui"):
        _, run = runs.train("encoder_ft", runs.official, f"model.save_text_encoder_format={name}")
        assert find_encoder(run) == find_encoder(run / "epoch1")
        losses[name] = runs.train("dit_lora", runs.official, f"model.llm_path={run / 'epoch1'}")[0]
        flags = ["--text_encoder", str(run), "--reports_dir", str(tmp_path), "--run_tag", name]
        assert te_eval.main(flags) == 0
        summary = json.loads((tmp_path / "te_eval" / name / "summary.json").read_text())
        drifts[name] = summary["metrics"]["neutral_drift"]
    assert all(values == losses["hf"] for values in losses.values())
    assert losses["hf"] != runs.reference("dit_lora")  # it was trained
    assert len(set(drifts.values())) == 1 and drifts["hf"] > 0
