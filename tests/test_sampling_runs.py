"""scripts/sample.py as a person runs it, on tiny checkpoints: pictures, clips, adapters, stages, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from scripts.sample import main
from utils.data.videos import pictures_at, probe_video

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--size", "64x64", "--steps", "3", "--device", "cpu"]


@pytest.fixture(scope="session")
def write_config(tmp_path_factory):
    """`write_config(checkpoint, "pipeline_stages = 2", model='expert = "low_noise"')`: a training config."""

    def write(checkpoint: Path, top: str = "", model: str = "") -> str:
        path = tmp_path_factory.mktemp("config") / "config.toml"
        path.write_text(f"""
output_dir = "unused"
dataset = "unused.toml"
epochs = 1
{top}
[model]
type = "wan"
ckpt_path = "{checkpoint}"
dtype = "float32"
cache_text_embeddings = true
train_text_encoder = false
freeze_transformer = true
{model}
[adapter]
rank = 4
[optimizer]
lr = 1e-3
""")
        return str(path)

    return write


@pytest.fixture(scope="session")
def ti2v_config(tiny_ti2v, write_config):
    return write_config(tiny_ti2v)


@pytest.fixture(scope="session")
def t2v_config(tiny_t2v, write_config):
    return write_config(tiny_t2v, model='expert = "high_noise"')


def write_adapter(path, *, scale=1.0, metadata=None, modules=("cross_attn.k", "cross_attn.v"), width=128):
    """A LoRA on one block that changes what is drawn."""
    generator = torch.Generator().manual_seed(len(str(modules)))
    tensors = {}
    for module in modules:
        name = f"diffusion_model.blocks.0.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, width, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(width, 4, generator=generator) * scale
    save_file(tensors, path, metadata={"format": "pt"} | (metadata or {}))
    return path


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out + said.err


def draw(capsys, config, out, *more):
    """The pixels of a small picture."""
    status, said = run(capsys, "--config", config, "--prompt", "a red circle", "--out", out, *SMALL, *more)
    assert status == 0, said
    return np.asarray(Image.open(out), dtype=np.int64)


def test_a_picture_by_seed(ti2v_config, tmp_path, capsys):
    first = draw(capsys, ti2v_config, tmp_path / "a.png", "--seed", 1)
    assert first.shape == (64, 64, 3)
    assert first.std() > 5
    assert np.array_equal(first, draw(capsys, ti2v_config, tmp_path / "b.png", "--seed", 1))
    assert not np.array_equal(first, draw(capsys, ti2v_config, tmp_path / "c.png", "--seed", 2))
    assert not np.array_equal(
        first,
        draw(
            capsys, ti2v_config, tmp_path / "d.png", "--seed", 1, "--solver", "euler", "--negative_prompt", ""
        ),
    )


def test_it_says_what_it_does(ti2v_config, tmp_path, capsys):
    out = tmp_path / "a.png"
    _, said = run(capsys, "--config", ti2v_config, "--prompt", "red " * 600, "--out", out, *SMALL)
    assert "ti2v-5b, 64x64 px, 1 frame; unipc, 3 steps, shift 5, guidance 5\n" in said
    assert "prompt 1 has 601 tokens, and Wan reads 512; its end, 89 tokens, is not seen" in said
    assert said.endswith(f"written: {out}\n")
    assert "sampling 3/3" in said


def test_clips_begin_with_their_first_frame(ti2v_config, tiny_i2v, write_config, tmp_path, capsys):
    image = tmp_path / "first.png"
    Image.new("RGB", (64, 64), (200, 30, 30)).save(image)
    for name, config in (
        ("ti2v", ti2v_config),
        ("i2v", write_config(tiny_i2v, model='expert = "low_noise"')),
    ):
        out = tmp_path / f"{name}.mp4"
        common = ["--config", config, "--prompt", "a red circle", "--frames", 5, *SMALL]
        status, said = run(capsys, *common, "--image", image, "--out", out)
        assert status == 0, said
        facts = probe_video(out)
        assert (facts.width, facts.height, facts.num_frames) == (64, 64, 5)
        assert facts.num_frames / facts.seconds == pytest.approx(24 if name == "ti2v" else 16, rel=0.01)
        assert len(list(pictures_at(out, [0.0], facts.start_seconds))) == 1
    # Without --size the image's aspect ratio decides; the area of the published size would take long here.
    from models.wan.arch import VARIANTS
    from models.wan.sample_flags import settings_from
    from scripts.sample import build_parser

    args = build_parser().parse_args(
        ["--config", ti2v_config, "--prompt", "x", "--image", str(image), "--out", "x.mp4"]
    )
    settings = settings_from(args, VARIANTS["ti2v-5b"])
    assert (settings.width, settings.height, settings.num_frames) == (960, 928, 121)


def test_adapters_with_weights_and_without_some_modules(ti2v_config, tmp_path, capsys):
    keys = write_adapter(tmp_path / "k.safetensors", modules=("cross_attn.k",))
    both = write_adapter(tmp_path / "kv.safetensors")

    def drawn(*more):
        return draw(capsys, ti2v_config, tmp_path / "a.png", *more)

    base, with_keys, with_both = drawn(), drawn("--adapter", keys), drawn("--adapter", both)
    assert not np.array_equal(base, with_keys)
    assert not np.array_equal(with_keys, with_both)
    assert np.array_equal(base, drawn("--adapter", f"{both}:0"))
    # Two halves are a whole, and one minus itself is nothing; but for rounding.
    assert np.abs(with_both - drawn("--adapter", f"{both}:0.5", "--adapter", f"{both}:0.5")).max() <= 1
    assert np.abs(base - drawn("--adapter", both, "--adapter", f"{both}:-1")).max() <= 1
    without_values = drawn("--adapter", both, "--adapter_exclude", "cross_attn.v")
    assert not np.array_equal(without_values, base)
    assert not np.array_equal(without_values, with_both)


def test_each_expert_takes_its_own_adapters(t2v_config, tmp_path, capsys):
    plain = write_adapter(tmp_path / "plain.safetensors")
    low = write_adapter(tmp_path / "low.safetensors", metadata={"expert": "low_noise", "variant": "t2v-a14b"})
    i2v = write_adapter(tmp_path / "i2v.safetensors", metadata={"expert": "low_noise", "variant": "i2v-a14b"})

    def drawn(*more):
        return draw(capsys, t2v_config, tmp_path / "a.png", *more)

    base, at_low = drawn(), drawn("--adapter", low)
    assert not np.array_equal(base, at_low)
    assert np.array_equal(at_low, drawn("--adapter_low", plain))
    assert not np.array_equal(at_low, drawn("--adapter_high", plain))
    assert not np.array_equal(base, drawn("--expert", "low_noise"))
    for more, message in (
        (
            ("--adapter", plain),
            "does not say for which expert of t2v-a14b it is; write --adapter_high or --adapter_low",
        ),
        (("--adapter_high", low), "is an adapter of the low_noise expert"),
        (("--adapter", i2v), "is an adapter of i2v-a14b, and t2v-a14b is sampled"),
        (("--adapter", low, "--expert", "high_noise"), "is for the other expert"),
    ):
        out = tmp_path / "no.png"
        status, said = run(capsys, "--config", t2v_config, "--prompt", "x", "--out", out, *SMALL, *more)
        assert (status, out.exists()) == (2, False)
        assert message in said


def test_a_checkpoint_of_one_expert(tiny_t2v, write_config, tmp_path, capsys):
    alone = tmp_path / "alone"
    alone.mkdir()
    for part in tiny_t2v.iterdir():
        if part.name != "high_noise_model":
            (alone / part.name).symlink_to(part)
    config = write_config(alone, model='expert = "low_noise"')
    status, said = run(capsys, "--config", config, "--prompt", "x", "--out", tmp_path / "a.png", *SMALL)
    assert status == 2
    assert "high_noise_model" in said
    assert "with one expert alone, write --expert" in said
    draw(capsys, config, tmp_path / "a.png", "--expert", "low_noise")


def test_a_tuned_encoder_changes_the_picture(ti2v_config, tiny_ti2v, tmp_path, capsys):
    from models.wan.checkpoint import TEXT_ENCODER_FILE, open_text_encoder

    source = open_text_encoder(tiny_ti2v / TEXT_ENCODER_FILE)
    tensors = {name: source.get(name).float() * 1.2 for name in source.shapes}
    save_file(tensors, tmp_path / "text_encoder.safetensors")
    base = draw(capsys, ti2v_config, tmp_path / "a.png")
    assert not np.array_equal(base, draw(capsys, ti2v_config, tmp_path / "a.png", "--text_encoder", tmp_path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--size", "60x64"], "the nearest is 64x64"),
        (["--frames", "6", "--out", "a.mp4"], "the nearest is 5 or 9"),
        (["--frames", "5"], "a .png holds one frame, not 5"),
        (["--out", "a.gif"], "ends in neither .png nor .mp4"),
        (["--adapter", "missing"], "missing: no such file or directory"),
        (["--adapter", ":2"], "write FILE or FILE:WEIGHT"),
        (["--expert", "low_noise"], "ti2v-5b has no experts"),
        (["--adapter_low", "KV"], "ti2v-5b has no experts; write --adapter"),
        (
            ["--adapter", "KV", "--adapter_exclude", "self_attn.*"],
            "matches no module of the adapters; they have cross_attn.k",
        ),
        (["--adapter", "KV", "--adapter_exclude", "*"], "leaves nothing of"),
        (["--adapter", "WIDE"], "2 of 2 modules do not fit"),
        (["--image", "none.png", "--frames", "5", "--out", "a.mp4"], "none.png"),
        (["--device", "tpu:0"], "--device tpu:0"),
        (["--set", "pipeline_stages=2"], "--device: each of several stages has its own"),
    ],
)
def test_what_is_refused_is_said_in_a_line(more, message, ti2v_config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_adapter(Path("kv.safetensors"))
    write_adapter(Path("wide.safetensors"), width=64)
    named = {"KV": "kv.safetensors", "WIDE": "wide.safetensors"}
    given = [
        "--config",
        ti2v_config,
        "--prompt",
        "x",
        "--out",
        "a.png",
        *SMALL,
        *(named.get(one, one) for one in more),
    ]
    status, said = run(capsys, *given)
    assert status == 2
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".safetensors",)]


@pytest.mark.parametrize("kind", ["directory", "no rights", "proc"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_drawn(
    kind, ti2v_config, tmp_path, capsys, monkeypatch
):
    from models.wan import sample_job

    monkeypatch.setattr(sample_job, "sample", lambda *_: pytest.fail("it was drawn"))
    out = tmp_path / "a.png"
    if kind == "directory":
        out.mkdir()
    elif kind == "no rights":
        (tmp_path / "file").touch()
        out = tmp_path / "file" / "a.png"
    else:
        out = Path("/proc/none/a.png")
    status, said = run(capsys, "--config", ti2v_config, "--prompt", "x", "--out", out, *SMALL)
    assert status == 2 and ("/proc/none" if kind == "proc" else str(out)) in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("seed", ["-1", "x", "99999999999999999999999"])
def test_a_seed_that_torch_cannot_take_is_wrong_use(seed, ti2v_config, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(capsys, "--config", ti2v_config, "--prompt", "x", "--out", tmp_path / "a.png", f"--seed={seed}")
    assert stopped.value.code == 2


def test_guidance_alone_is_that_of_both_experts(t2v_config, tmp_path, capsys):
    def drawn(*more):
        return draw(capsys, t2v_config, tmp_path / "a.png", *more)

    both = drawn("--guidance", "6")
    assert np.array_equal(both, drawn("--guidance", "6", "--guidance_low", "6"))
    assert not np.array_equal(both, drawn("--guidance", "6", "--guidance_low", "1.5"))


def test_two_stages_draw_what_one_does(t2v_config, tmp_path, capsys):
    """Both experts, one after the other, with an adapter on each, on two processes."""
    adapter = write_adapter(tmp_path / "kv.safetensors")
    more = ["--adapter_high", f"{adapter}:0.5", "--adapter_low", str(adapter), "--seed", "4"]
    draw(capsys, t2v_config, tmp_path / "one.png", *more)
    plain = draw(capsys, t2v_config, tmp_path / "plain.png", "--seed", "4")
    command = [
        sys.executable,
        str(ROOT / "scripts" / "sample.py"),
        "--config",
        t2v_config,
        "--prompt",
        "a red circle",
    ]
    command += ["--out", str(tmp_path / "two.png"), "--set", "pipeline_stages=2", *more, *SMALL[:4]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "starting as many processes" in done.stdout
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "two.png")), plain)
