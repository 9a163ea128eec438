"""The committed tiny Wan: read as a user's checkpoint is, and drawing what it is told."""

import json

import numpy as np
import pytest
from PIL import Image

from models.wan.pictures import to_frames
from models.wan.sampling import sample_latents
from scripts.sample import main as sample
from scripts.tiny_world.asset import ASSET, load_official, read_quality, write_official
from scripts.tiny_world.build import digest
from scripts.tiny_world.captions import EVALUATION, evaluation_prompts
from scripts.tiny_world.checker import read_picture
from scripts.tiny_world.drawing import Drawing, draw, text_states
from scripts.tiny_world.quality import judge
from scripts.tiny_world.vae_quality import measure_vae
from train import main as train
from utils.errors import UserError

TRAINING = """
output_dir = "{out}"
dataset = "{out}/dataset.toml"
epochs = 1
[model]
type = "wan"
ckpt_path = "{checkpoint}"
expert = "high_noise"
dtype = "float32"
cache_text_embeddings = true
train_text_encoder = false
freeze_transformer = true
[adapter]
rank = 4
[optimizer]
lr = 1e-3
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_script):
    out = tmp_path_factory.mktemp("trained") / "tiny"
    done = run_script("make_tiny_wan.py", "--trained", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "trained on the tiny world" in done.stdout
    return out


@pytest.fixture(scope="module")
def model(trained):
    return load_official(trained)


@pytest.fixture(scope="module")
def config(trained, tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    path = place / "config.toml"
    path.write_text(TRAINING.format(out=place, checkpoint=trained), encoding="utf-8")
    return path


def best() -> Drawing:
    return Drawing(**read_quality()["drawing"])


def test_the_asset_is_small_and_is_what_was_measured():
    assert sum(path.stat().st_size for path in ASSET.iterdir()) < 10_000_000
    quality = read_quality()
    for name, expected in quality["sha256"].items():
        assert digest(ASSET / name) == expected, name
    text = (ASSET / "README.md").read_text(encoding="utf-8")
    assert f"Provenance: {quality['provenance']}.\n" in text
    assert set(quality["results"]) == set(EVALUATION)
    for name, shares in quality["results"].items():
        assert f"| {name} | {shares['both_right']:.1%} |" in text


def test_the_official_layout_is_whole_and_both_experts_are_the_one_that_was_trained(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"high_noise_model", "low_noise_model", "Wan2.1_VAE.pth", "google", "configuration.json"} <= names
    assert "models_t5_umt5-xxl-enc-bf16.pth" in names
    high, low = (
        {p.name: digest(p) for p in (trained / f"{side}_noise_model").iterdir()} for side in ("high", "low")
    )
    assert high == low
    assert len(high) == 8  # config.json, the index, six shards


def test_a_missing_asset_is_said_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match="make tiny-world"):
        write_official(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_trained_goes_with_no_variant(run_script, tmp_path):
    done = run_script("make_tiny_wan.py", "--trained", "--variant", "ti2v-5b", "--out", tmp_path / "new")
    assert done.returncode == 2
    assert "not allowed with" in done.stderr
    assert not (tmp_path / "new").exists()


def test_train_accepts_it(config, trained, tmp_path, capsys):
    media = tmp_path / "media"
    media.mkdir()
    for index in range(2):
        Image.fromarray(np.full((48, 48, 3), 60, np.uint8)).save(media / f"{index}.png")
        (media / f"{index}.txt").write_text("a red circle\n")
    (config.parent / "dataset.toml").write_text(
        f'resolutions = [48]\nframe_buckets = [1]\n[[directory]]\npath = "{media}"\n'
    )
    assert train(["--config", str(config), "--dry_run"]) == 0
    assert "dry run: everything is in place" in capsys.readouterr().err


def test_it_draws_what_it_is_told(model):
    """With the whole transformer and its padding to 512, not with the short cut that measuring takes."""
    prompts = [prompt for name in ("short", "verbose") for prompt in evaluation_prompts(name, 12, 11)]
    texts = [prompt.text for prompt in prompts]
    (empty,) = text_states(model, [""])
    latents = sample_latents(
        model.dit, text_states(model, texts), list(range(24)), best().settings(), negative_states=empty
    )
    drawn = np.stack([to_frames(video)[0] for video in model.vae.decode(latents)])
    assert judge(prompts, drawn)["both_right"] >= 0.9  # quality.json has 0.98 to 1 of 216


def test_the_short_cut_draws_the_same_as_the_whole_transformer(model, relative_error):
    prompts = [prompt.text for prompt in evaluation_prompts("short", 3, 0)]
    (empty,) = text_states(model, [""])
    whole = sample_latents(
        model.dit, text_states(model, prompts), [5, 6, 7], best().settings(), negative_states=empty
    )
    latents, pictures = draw(model, prompts, best(), [5, 6, 7])
    assert relative_error(latents, whole) < 1e-4  # measured: 1.3e-6
    expected = np.stack([to_frames(video)[0] for video in model.vae.decode(whole)])
    assert np.abs(pictures.astype(int) - expected).max() <= 1
    other, _ = draw(model, prompts, best(), [8, 6, 7])
    # The samples of a batch are independent of one another, and another seed is another picture.
    assert relative_error(other[1:], latents[1:]) < 1e-5
    assert relative_error(other[:1], latents[:1]) > 0.1


@pytest.mark.long
def test_a_user_can_sample_it(config, tmp_path):
    drawing = best()
    out = tmp_path / "picture.png"
    flags = ["--size", "48x48", "--steps", str(drawing.steps), "--shift", str(drawing.shift)]
    flags += ["--guidance", str(drawing.guidance), "--solver", drawing.solver, "--negative_prompt", ""]
    seen = []
    for seed in range(3):
        command = [
            "--config",
            str(config),
            "--prompt",
            "a blue circle",
            "--seed",
            str(seed),
            "--out",
            str(out),
        ]
        assert sample([*command, *flags, "--device", "cpu"]) == 0
        reading = read_picture(np.asarray(Image.open(out)))
        seen.append((reading.colour, reading.nearest))
    assert seen.count(("blue", "circle")) >= 2


def test_the_vae_keeps_the_world_and_has_the_published_statistics(model):
    found = measure_vae(model.vae)
    assert found == read_quality()["vae"]
    assert found["frames_right"][0] > 0.95
    assert abs(found["latent_std"] - 1) < 0.1


def test_quality_says_where_the_committed_weights_come_from():
    quality = json.loads((ASSET / "quality.json").read_text(encoding="utf-8"))
    command, seed = "python -m scripts.tiny_world.build", 0
    assert (quality["command"], quality["seed"]) == (command, seed)
    assert quality["provenance"] == f"made by `{command}` with seed {seed}, from nothing in one run"
    assert max(row["both_right"] for row in quality["sweep"]) == next(
        row["both_right"]
        for row in quality["sweep"]
        if all(row[key] == value for key, value in quality["drawing"].items())
    )
