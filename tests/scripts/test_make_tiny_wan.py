import hashlib
import json
import logging
import warnings
from pathlib import Path

import pytest
import sentencepiece
import torch

from models.wan.arch import VARIANTS, expected_shapes, load_arch
from models.wan.checkpoint import open_sharded, open_text_encoder, open_vae, text_encoder_sizes
from models.wan.component_shapes import vae_sizes

UMT5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FILES = [
    f"google/umt5-xxl/{name}"
    for name in ("special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json")
]
SENTENCES = [
    "a red circle moves to the right on a dark background",
    'An orange triangle stands still; it is "quixotic" (and 24 px wide)!',
    "  much   white space\tand a zorp & a blicket ½ ",
    "Ünknown létters and 漢字 🎉",
    "",
]


def dit_files(num_shards: int) -> list[str]:
    shards = [
        f"diffusion_pytorch_model-{k:05d}-of-{num_shards:05d}.safetensors" for k in range(1, num_shards + 1)
    ]
    return ["config.json", "diffusion_pytorch_model.safetensors.index.json", *shards]


def files_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def digests(directory: Path) -> dict[str, str]:
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in files_in(directory)}


def test_5b_holds_the_published_files(tiny_ti2v):
    expected = [
        *dit_files(3),
        "configuration.json",
        "Wan2.2_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        *TOKENIZER_FILES,
    ]
    assert files_in(tiny_ti2v) == sorted(expected)


@pytest.mark.parametrize("fixture", ["tiny_t2v", "tiny_i2v"])
def test_a14b_holds_the_published_files(request, fixture):
    experts = [
        f"{expert}/{name}" for expert in ("high_noise_model", "low_noise_model") for name in dit_files(6)
    ]
    expected = [
        *experts,
        "configuration.json",
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        *TOKENIZER_FILES,
    ]
    assert files_in(request.getfixturevalue(fixture)) == sorted(expected)


@pytest.mark.parametrize(
    ("fixture", "variant", "subdirectory"),
    [
        ("tiny_ti2v", "ti2v-5b", "."),
        ("tiny_t2v", "t2v-a14b", "low_noise_model"),
        ("tiny_i2v", "i2v-a14b", "high_noise_model"),
    ],
)
def test_dit_agrees_with_its_config_and_variant(request, fixture, variant, subdirectory):
    directory = request.getfixturevalue(fixture) / subdirectory
    source = open_sharded(directory)
    arch = load_arch(directory / "config.json", source.shapes)
    assert arch.variant == VARIANTS[variant]
    assert source.shapes == expected_shapes(arch)
    assert set(source.dtypes.values()) == {"F32"}
    index = json.loads((directory / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(source.get(name).nbytes for name in source.shapes)


def test_config_json_is_written_as_published(tiny_ti2v):
    text = (tiny_ti2v / "config.json").read_text()
    values = json.loads(text)
    first = ["_class_name", "_diffusers_version"]
    assert list(values) == first + sorted(set(values) - set(first))
    assert text == json.dumps(values, indent=2) + "\n"
    assert '"eps": 1e-06' in text


def test_the_two_experts_differ(tiny_t2v):
    high, low = (open_sharded(tiny_t2v / f"{expert}_noise_model") for expert in ("high", "low"))
    assert high.shapes == low.shapes
    assert not torch.equal(high.get("blocks.0.ffn.0.weight"), low.get("blocks.0.ffn.0.weight"))


def test_encoder_and_vae_have_the_published_names_and_dtypes(tiny_ti2v, tiny_t2v):
    encoder = open_text_encoder(tiny_ti2v / "models_t5_umt5-xxl-enc-bf16.pth")
    assert (
        text_encoder_sizes(encoder.shapes).d_model
        == open_sharded(tiny_ti2v).shapes["text_embedding.0.weight"][1]
    )
    assert set(encoder.dtypes.values()) == {"BF16"}
    for path, kind in ((tiny_ti2v / "Wan2.2_VAE.pth", "2.2"), (tiny_t2v / "Wan2.1_VAE.pth", "2.1")):
        vae = open_vae(path)
        assert vae_sizes(vae.shapes).kind == kind
        assert set(vae.dtypes.values()) == {"F32"}


def test_tokenizer_loads_without_warnings_and_equals_its_sentencepiece_model(tiny_ti2v, caplog):
    from transformers import AutoTokenizer

    directory = tiny_ti2v / "google" / "umt5-xxl"
    logging.getLogger("transformers").addHandler(
        caplog.handler
    )  # it does not hand its messages on to the root
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    spiece = sentencepiece.SentencePieceProcessor(model_file=str(directory / "spiece.model"))
    for sentence in SENTENCES:
        assert tokenizer(sentence)["input_ids"] == [*spiece.encode(sentence), tokenizer.eos_token_id]
    table_rows = open_text_encoder(tiny_ti2v / "models_t5_umt5-xxl-enc-bf16.pth").shapes[
        "token_embedding.weight"
    ][0]
    assert len(tokenizer) <= table_rows


def test_common_words_are_one_token_and_rare_words_several(tiny_ti2v):
    spiece = sentencepiece.SentencePieceProcessor(
        model_file=str(tiny_ti2v / "google" / "umt5-xxl" / "spiece.model")
    )
    assert spiece.encode("a red circle", out_type=str) == ["▁a", "▁red", "▁circle"]
    assert len(spiece.encode("blicket")) > 2


def test_reruns_are_equal_byte_for_byte_and_seeds_are_not(tiny_ti2v, run_script, tmp_path):
    for name, seed in (("again", 0), ("other", 1)):
        done = run_script(
            "make_tiny_wan.py", "--variant", "ti2v-5b", "--out", tmp_path / name, "--seed", seed
        )
        assert done.returncode == 0, done.stderr
    first, again, other = digests(tiny_ti2v), digests(tmp_path / "again"), digests(tmp_path / "other")
    assert again == first
    assert {name for name in first if other[name] != first[name] and "safetensors" in name} == {
        name for name in first if name.endswith(".safetensors")
    }


def test_layers_sets_the_depth_and_leaves_the_shared_blocks_alone(tiny_ti2v, run_script, tmp_path):
    done = run_script("make_tiny_wan.py", "--variant", "ti2v-5b", "--out", tmp_path / "deep", "--layers", 6)
    assert done.returncode == 0, done.stderr
    deep, shallow = open_sharded(tmp_path / "deep"), open_sharded(tiny_ti2v)
    assert load_arch(tmp_path / "deep" / "config.json", deep.shapes).num_layers == 6
    assert torch.equal(deep.get("blocks.3.ffn.0.weight"), shallow.get("blocks.3.ffn.0.weight"))


def test_text_layers_sets_the_depth_of_the_encoder(tiny_ti2v, run_script, tmp_path):
    done = run_script(
        "make_tiny_wan.py",
        *("--variant", "ti2v-5b", "--out", tmp_path / "deep", "--layers", 1, "--text_layers", 5),
    )
    assert done.returncode == 0, done.stderr
    deep, shallow = (open_text_encoder(root / UMT5_FILE) for root in (tmp_path / "deep", tiny_ti2v))
    assert (text_encoder_sizes(deep.shapes).num_layers, text_encoder_sizes(shallow.shapes).num_layers) == (
        5,
        3,
    )
    name = "blocks.2.ffn.fc1.weight"
    assert torch.equal(deep.get(name), shallow.get(name))


def test_a_directory_with_something_in_it_is_left_alone(run_script, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    done = run_script("make_tiny_wan.py", "--variant", "ti2v-5b", "--out", tmp_path)
    assert done.returncode == 2
    assert "never overwritten" in done.stderr
    assert "Traceback" not in done.stderr
    assert files_in(tmp_path) == ["mine.txt"]


def test_an_empty_directory_is_used(run_script, tmp_path):
    (tmp_path / "empty").mkdir()
    done = run_script("make_tiny_wan.py", "--variant", "ti2v-5b", "--out", tmp_path / "empty", "--layers", 1)
    assert done.returncode == 0, done.stderr
    assert "config.json" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--variant", "t2v-1b"],
        ["--variant", "ti2v-5b", "--layers", "0"],
        ["--variant", "ti2v-5b", "--text_layers", "0"],
    ],
)
def test_wrong_arguments_are_refused(run_script, tmp_path, arguments):
    done = run_script("make_tiny_wan.py", "--out", tmp_path / "new", *arguments)
    assert done.returncode == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flag", ["--seed", "--layers", "--text_layers"])
def test_trained_weights_refuse_what_they_cannot_follow(run_script, tmp_path, flag):
    done = run_script("make_tiny_wan.py", "--trained", flag, "2", "--out", tmp_path / "new")
    assert done.returncode == 2
    assert f"{flag}: not allowed with --trained" in done.stderr
    assert not (tmp_path / "new").exists()
