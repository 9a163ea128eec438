"""`[samples]` as flags of the grid, and what of it a checkpoint, its prompts or this machine cannot give."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from models.wan.arch import VARIANTS
from models.wan.preflight import preflight
from models.wan.prompts import NEGATIVE_PROMPT
from models.wan.sample_defaults import fill_flags, flags_of
from models.wan.sample_flags import unchecked_settings
from scripts.diagnostics.prompt_grid import build_parser
from tests.helpers.workspace import linked_copy
from utils.config.load import ConfigError, load_config
from utils.config.schema import SamplesConfig

CONFIG = """
output_dir = "{root}/output"
dataset = "{root}/dataset.toml"
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
[samples]
"""


@pytest.fixture
def problems(tmp_path, tiny_dataset, monkeypatch):
    """`problems(checkpoint, 'frames = 4', model='expert = "both"')`: keys, reasons and mends of what is refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset.toml").write_text(f'[[directory]]\npath = "{tiny_dataset}"\n')
    (tmp_path / "words.txt").write_text("a red circle\na blue square\n")
    Image.new("RGB", (64, 64)).save(tmp_path / "first.png")

    def load(checkpoint: Path, *lines: str, model: str = "") -> dict[str, str]:
        text = CONFIG.format(root=tmp_path, checkpoint=checkpoint, model=model) + "\n".join(lines)
        (tmp_path / "config.toml").write_text(text)
        try:
            load_config(tmp_path / "config.toml", check_files=True, preflight=preflight)
        except ConfigError as error:
            return {problem.key: f"{problem.reason} -> {problem.fix}" for problem in error.problems}
        return {}

    return load


def flags(*words: str):
    return build_parser().parse_args(["--config", "config.toml", "--run", "a=b", *words])


def test_what_no_flag_says_is_as_the_section_has_it() -> None:
    samples = SamplesConfig(prompts="a.txt", size="64x32", steps=3, seeds=1, seed=7, negative_prompt="")
    args = flags("--steps", "9", "--seed", "0")
    fill_flags(args, samples)
    assert (args.steps, args.seed) == (9, 0)  # said, 0 too
    assert (args.prompts, args.size, args.seeds, args.negative_prompt) == (Path("a.txt"), (64, 32), 1, "")
    assert (args.solver, args.max_prompts, args.max_neutral_change) == ("unipc", 4, 0.1)


def test_without_the_section_it_is_as_its_defaults_are() -> None:
    args, other = flags(), flags()
    fill_flags(args, None)
    fill_flags(other, SamplesConfig())
    assert args == other
    assert args.negative_prompt == NEGATIVE_PROMPT and (args.seeds, args.seed) == (2, 0)


def test_a_guidance_that_is_said_is_that_of_both_experts() -> None:
    samples = SamplesConfig(guidance=4.0, guidance_low=2.0)
    args = flags("--guidance", "6")
    fill_flags(args, samples)
    assert (args.guidance, args.guidance_low) == (6.0, None)
    args = flags("--guidance_low", "6")
    fill_flags(args, samples)
    assert (args.guidance, args.guidance_low) == (4.0, 6.0)


@pytest.mark.parametrize(
    ("words", "section", "expected"),
    [
        ((), True, True),
        ((), False, False),
        (("--reuse_text_keys",), False, True),
        (("--no-reuse_text_keys",), True, False),
    ],
)
def test_whether_text_keys_are_kept(words, section, expected) -> None:
    args = flags(*words)
    fill_flags(args, SamplesConfig(reuse_text_keys=section))
    assert unchecked_settings(args, VARIANTS["ti2v-5b"]).reuse_text_keys is expected
    alone = unchecked_settings(flags(*words), VARIANTS["ti2v-5b"])
    assert alone.reuse_text_keys is (words != ("--no-reuse_text_keys",))


def test_every_key_is_a_flag_or_about_when_and_where() -> None:
    assert vars(flags_of(SamplesConfig())).keys() <= vars(flags()).keys()


def test_what_a_variant_can_make_is_taken(problems, tiny_ti2v, tiny_t2v, tiny_i2v) -> None:
    assert problems(tiny_ti2v) == {}
    assert problems(tiny_ti2v, 'size = "64x64"', "frames = 5", 'image = "first.png"') == {}
    assert problems(tiny_t2v, "guidance_low = 2.0", model='expert = "both"') == {}
    assert problems(tiny_i2v, 'image = "first.png"', "frames = 5", model='expert = "low_noise"') == {}


def test_what_it_cannot_is_refused_all_at_once_with_what_it_can(problems, tiny_ti2v) -> None:
    found = problems(tiny_ti2v, 'size = "60x64"', "frames = 4", "guidance_low = 2.0", 'expert = "low_noise"')
    assert found.keys() == {
        "samples.size",
        "samples.frames",
        "samples.guidance_low",
        "samples.expert",
    }
    assert found["samples.size"].endswith("-> the nearest is 64x64")
    assert found["samples.frames"].endswith("-> the nearest is 1 or 5")
    assert found["samples.guidance_low"] == "ti2v-5b has no low-noise expert -> leave it out"


@pytest.mark.parametrize(
    ("line", "key", "words"),
    [
        ('prompts = "none.txt"', "samples.prompts", '"none.txt" does not exist'),
        ('domain_prompts = "none.txt"', "samples.domain_prompts", '"none.txt" does not exist'),
        ('image = "none.png"', "samples.image", '"none.png" does not exist'),
        ('image = "words.txt"', "samples.image", "not readable as an image"),
        ('reports_dir = "words.txt/a"', "samples.reports_dir", "is not a directory"),
        ('image = "first.png"\nframes = 1', "samples.frames", "-> ask for 5"),
        ('device = "cuda:77"', "samples.device", 'is "cuda:77", and'),
        (
            'prompts = "words.txt"\ndomain_prompts = "words.txt"',
            "samples.domain_prompts",
            "2 of its prompts are among the neutral ones",
        ),
    ],
)
def test_files_and_devices_that_are_not_there(problems, tiny_ti2v, line, key, words) -> None:
    (found,) = problems(tiny_ti2v, line).items()
    assert found[0] == key and words in found[1]
    assert "red circle" not in found[1]


def test_first_frames_by_variant(problems, tiny_t2v, tiny_i2v) -> None:
    (found,) = problems(tiny_i2v, model='expert = "low_noise"').items()
    assert found == ("samples.image", "i2v-a14b makes clips of a first frame -> give it with samples.image")
    (found,) = problems(tiny_t2v, 'image = "first.png"', model='expert = "low_noise"').items()
    assert found[0] == "samples.image" and "t2v-a14b takes no first frame" in found[1]


def test_a_checkpoint_of_one_expert_draws_alone_or_not_at_all(problems, tiny_t2v, tmp_path) -> None:
    checkpoint = linked_copy(tiny_t2v, tmp_path / "half")
    shutil.rmtree(checkpoint / "low_noise_model")
    expert = 'expert = "high_noise"'
    (found,) = problems(checkpoint, model=expert).items()
    assert found[0] == "samples" and "needs the low_noise expert too" in found[1]
    assert 'samples.expert = "high_noise"' in found[1]
    assert problems(checkpoint, expert, model=expert) == {}
