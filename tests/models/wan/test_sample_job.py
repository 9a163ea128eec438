"""Jobs of the sampler: what is said of long prompts, one load for several variations, and batches that change nothing."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from models.wan import sample_job
from models.wan.arch import VARIANTS
from models.wan.checkpoint import TOKENIZER_DIR
from models.wan.sample_adapters import AdapterChoice, choose_adapters, parse_weighted
from models.wan.sample_job import SampleJob, Variation, Where, check_job, decode, sample, warn_of_cut_prompts
from models.wan.sampling_settings import official_settings
from models.wan.text_encoder import MAX_TEXT_TOKENS, WanTokenizer
from utils.errors import UserError

HERE = Where(torch.device("cpu"))


@pytest.fixture
def job(tiny_t2v, make_config):
    config = make_config("dit_lora", model={"ckpt_path": str(tiny_t2v), "expert": "low_noise"})
    settings = replace(official_settings(VARIANTS["t2v-a14b"]), width=32, height=32, num_frames=1, steps=3)
    prompts = ("a red circle", "a blue square", "a red circle that moves to the right")
    return SampleJob(config, settings, prompts, (3, 4, 5), "")


@pytest.fixture
def opened(monkeypatch):
    """The experts whose DiT is opened, in order."""
    experts = []

    def recorded(config, model, *rest):
        experts.append(model.expert)
        return open_dit(config, model, *rest)

    open_dit = sample_job.open_dit
    monkeypatch.setattr(sample_job, "open_dit", recorded)
    return experts


def test_what_is_cut_off_is_what_the_encoder_does_not_see(tiny_t2v):
    tokenizer = WanTokenizer(tiny_t2v / TOKENIZER_DIR)
    prompt = " ".join(["red"] * 511 + ["blue", "green"])
    assert tokenizer.count(prompt) == 514
    assert tokenizer.cut_off(prompt) == "blue green"
    assert len(tokenizer(prompt)) == MAX_TEXT_TOKENS
    assert tokenizer(prompt) == tokenizer(" ".join(["red"] * 511))
    assert tokenizer.cut_off("red " * 511) == ""
    said = []
    warn_of_cut_prompts(tokenizer, {"red": "prompt 1", prompt: "prompt 2"}, True, said.append)
    warn_of_cut_prompts(tokenizer, {prompt: "the negative prompt"}, False, said.append)
    assert said == [
        'warning: prompt 2 has 514 tokens, and Wan reads 512; its end, 2 tokens, is not seen: "blue green"',
        "warning: the negative prompt has 514 tokens, and Wan reads 512; its end, 2 tokens, is not seen",
    ]


def test_each_expert_is_loaded_once_whatever_there_is_to_draw(job, opened):
    steps = []
    where = replace(HERE, on_progress=steps.append)
    both = replace(job, variations=(Variation(), Variation()), batch_size=2)
    first, second = sample(both, where)
    assert opened == ["high_noise", "low_noise"]
    assert steps == list(range(13))
    assert torch.equal(first, second)
    assert first.shape == (3, 16, 1, 4, 4)
    # Measured: 5.5e-6.
    torch.testing.assert_close(sample(replace(job, batch_size=1), HERE)[0], first, rtol=0, atol=1e-3)
    (video,) = decode(job, [first], HERE)
    assert video.shape == (3, 3, 1, 32, 32)


def test_an_expert_without_steps_is_not_loaded(job, opened):
    # With one step all of the way is the high-noise expert's.
    sample(replace(job, settings=replace(job.settings, steps=1)), HERE)
    assert opened == ["high_noise"]


def test_a_missing_adapter_or_encoder_is_met_before_anything_is_loaded(job, tmp_path):
    check_job(job)
    with pytest.raises(UserError, match="check --text_encoder"):
        check_job(replace(job, variations=(Variation(text_encoder=tmp_path / "none"),)))
    with pytest.raises(UserError, match=r"none\.safetensors: no such file"):
        missing = AdapterChoice(tmp_path / "none.safetensors", 1.0, "low_noise")
        check_job(replace(job, variations=(Variation((missing,)),)))


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a/b", "a/b", 1.0),
        ("a/b:0.5", "a/b", 0.5),
        ("a:b", "a:b", 1.0),
        ("a:b:-2", "a:b", -2.0),
        ("a:1e-3", "a", 1e-3),
    ],
)
def test_paths_with_weights(text, path, weight):
    assert parse_weighted(text)[0].as_posix() == path
    assert parse_weighted(text)[1] == weight


@pytest.mark.parametrize("text", ["", ":1", "a:nan", "a:inf"])
def test_weights_that_mean_nothing(text):
    with pytest.raises(UserError, match="write FILE or FILE:WEIGHT"):
        parse_weighted(text)


def test_the_directory_of_a_pair_stands_for_both_adapters(tmp_path):
    pair = tmp_path / "pair"
    pair.mkdir()
    (pair / "pair.json").touch()
    for expert in ("high_noise", "low_noise"):
        name = "diffusion_model.blocks.0.cross_attn.k.lora_A.weight"
        file = pair / f"adapter_{expert}.safetensors"
        save_file({name: torch.zeros(2, 4)}, file, {"expert": expert, "variant": "t2v-a14b"})
    found = choose_adapters(VARIANTS["t2v-a14b"], [f"{pair}:0.5"])
    assert [(choice.path.name, choice.weight, choice.expert) for choice in found] == [
        ("adapter_high_noise.safetensors", 0.5, "high_noise"),
        ("adapter_low_noise.safetensors", 0.5, "low_noise"),
    ]
