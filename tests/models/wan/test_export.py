"""A tuned encoder in every format: what is written is what was trained, other programs read it, and what is unsound is refused."""

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from models.wan import export
from models.wan.checkpoint import TEXT_ENCODER_FILE, TOKENIZER_DIR, open_text_encoder, open_text_encoder_part
from models.wan.component_shapes import Umt5Sizes, expected_umt5_shapes
from models.wan.export import PTH_METADATA, TEXT_ENCODER_CONFIG, EncoderFormat, save_text_encoder
from models.wan.layers import TEXT_PREFIX
from models.wan.names import umt5_to_hf
from models.wan.text_encoder import WanTokenizer
from models.wan.tokenizer_place import has_tokenizer, read_spiece
from utils.errors import UserError

FORMATS = ("hf", "official", "official_pth", "comfyui")
METADATA = {"format": "pt", "variant": "ti2v-5b", "expert": "none", "base_hash": "0" * 32}
SIZES = st.builds(
    Umt5Sizes,
    vocab_size=st.integers(3, 9),
    d_model=st.sampled_from([4, 6]),
    num_heads=st.sampled_from([1, 2]),
    d_kv=st.sampled_from([2, 3]),
    d_ff=st.integers(2, 5),
    num_layers=st.integers(1, 3),
    num_buckets=st.integers(2, 4),
)


def draw(shapes, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def as_trained(tensors):
    """Parameters as the pipeline names them."""
    return {TEXT_PREFIX + umt5_to_hf(name): tensor for name, tensor in tensors.items()}


def tokenizer_dir(root):
    place = root / "tokenizer"
    place.mkdir()
    (place / "spiece.model").write_bytes(bytes(range(50)))
    return place


@settings(max_examples=15)
@given(
    sizes=SIZES,
    formats=st.permutations(FORMATS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_round_trips_through_all_formats_are_the_identity(sizes, formats, dtype, data):
    shapes = expected_umt5_shapes(sizes)
    trained_names = data.draw(st.sets(st.sampled_from(sorted(shapes)), min_size=1))
    base, trained = draw(shapes, 1, dtype), draw({name: shapes[name] for name in trained_names}, 2, dtype)
    expected = base | trained
    with TemporaryDirectory() as place:
        root = Path(place)
        save_file(base, root / "base.safetensors")
        source, tokenizer = open_text_encoder(root / "base.safetensors"), tokenizer_dir(root)
        changed = as_trained(trained)
        for name in formats:  # each is written from what the one before it was read as
            directory = root / name
            directory.mkdir()
            how = EncoderFormat(name, True, tokenizer)
            written = save_text_encoder(changed, source, dtype, directory, METADATA, how)
            source, changed = open_text_encoder(written[0]), {}
            assert source.shapes == shapes
            assert all(torch.equal(source.get(key), tensor) for key, tensor in expected.items())


@settings(max_examples=10)
@given(sizes=SIZES, name=st.sampled_from(["hf", "official"]), data=st.data())
def test_the_trained_tensors_alone_come_back_too(sizes, name, data):
    shapes = expected_umt5_shapes(sizes)
    names = data.draw(st.sets(st.sampled_from(sorted(shapes)), min_size=1, max_size=len(shapes) - 1))
    trained = draw({key: shapes[key] for key in names}, 2, torch.float32)
    with TemporaryDirectory() as place:
        root = Path(place)
        save_file(draw(shapes, 1, torch.float32), root / "base.safetensors")
        source = open_text_encoder(root / "base.safetensors")
        how = EncoderFormat(name, False, root)
        written = save_text_encoder(as_trained(trained), source, torch.float32, root, METADATA, how)
        part = open_text_encoder_part(written[0])
        assert part.shapes.keys() == names
        assert all(torch.equal(part.get(key), tensor) for key, tensor in trained.items())


@pytest.fixture
def written(tiny_ti2v, tmp_path):
    """`written(format)`: the files of the tiny encoder, one norm of it changed."""
    base = open_text_encoder(tiny_ti2v / TEXT_ENCODER_FILE)

    def write(name, trained=None):
        directory = tmp_path / name
        directory.mkdir()
        how = EncoderFormat(name, True, tiny_ti2v / TOKENIZER_DIR)
        changed = as_trained({"norm.weight": torch.full((64,), 0.5)} if trained is None else trained)
        return save_text_encoder(changed, base, torch.bfloat16, directory, METADATA, how)

    return write


def test_files_and_names_of_each_format(written, tiny_ti2v):
    official = open_text_encoder(tiny_ti2v / TEXT_ENCODER_FILE).shapes
    hf = {umt5_to_hf(name) for name in official}
    for name, names, files in (
        ("hf", hf, ["text_encoder.safetensors", TEXT_ENCODER_CONFIG]),
        ("official", set(official), ["text_encoder.safetensors"]),
        ("comfyui", hf | {"spiece_model"}, ["text_encoder.safetensors", TEXT_ENCODER_CONFIG]),
    ):
        paths = written(name)
        assert [path.name for path in paths] == files
        assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(files)
        assert load_file(paths[0]).keys() == names
        assert open_text_encoder(paths[0]).metadata() == METADATA
    paths = written("official_pth")
    assert [path.name for path in paths] == [TEXT_ENCODER_FILE, PTH_METADATA]
    loaded = torch.load(paths[0], weights_only=True)
    assert loaded.keys() == official.keys()
    assert json.loads(paths[1].read_text()) == METADATA
    own = sum(2 * math.prod(shape) for shape in official.values())
    assert paths[0].stat().st_size < own * 1.3 + 30_000  # no storage twice


def test_transformers_loads_hf_and_comfyui_files_to_one_encoder(written):
    from transformers import AutoConfig, UMT5EncoderModel

    states = []
    for name in ("hf", "comfyui"):
        weights, description = written(name)
        tensors = {key: one for key, one in load_file(weights).items() if key != "spiece_model"}
        model, report = UMT5EncoderModel.from_pretrained(
            None,
            config=AutoConfig.from_pretrained(description.parent),
            state_dict=tensors,
            output_loading_info=True,
        )
        assert not report["unexpected_keys"]
        assert set(report["missing_keys"]) <= {"encoder.embed_tokens.weight"}
        with torch.no_grad():
            states.append(model(input_ids=torch.tensor([[5, 9, 1]])).last_hidden_state)
    assert torch.equal(*states)


def test_a_file_for_comfyui_is_a_tokenizer_too_and_can_be_tuned_again(written, tiny_ti2v, tmp_path):
    (weights, _), directory = written("comfyui"), tiny_ti2v / TOKENIZER_DIR
    assert has_tokenizer(weights) and not has_tokenizer(written("hf")[0])
    assert read_spiece(weights) == (directory / "spiece.model").read_bytes()
    inside, beside = WanTokenizer(weights), WanTokenizer(directory)
    for caption in ("a red circle moves to the right", "", "  odd\n spaces “quoted” é 中", "word " * 600):
        assert inside(caption) == beside(caption)
        assert inside.count(caption) == beside.count(caption)
    (tmp_path / "again").mkdir()
    how = EncoderFormat("comfyui", True, weights)
    again = save_text_encoder(
        {}, open_text_encoder(weights), torch.bfloat16, tmp_path / "again", METADATA, how
    )
    first, second = load_file(weights), load_file(again[0])
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", FORMATS)
def test_an_encoder_that_is_not_finite_is_refused(written, name):
    broken = torch.ones(64)
    broken[3] = torch.nan
    with pytest.raises(UserError, match=r"norm\.weight holds NaN or infinite values, so its training has"):
        written(name, {"norm.weight": broken})


@pytest.mark.parametrize("first", ["values", "names"])
def test_a_file_that_is_not_what_was_meant_is_refused(written, monkeypatch, first):
    """As a failing disk, or a library that writes something else, would make it."""

    def wrong(tensors, path, metadata):
        tensors = dict(tensors)
        if first == "values":
            tensors["shared.weight"] = tensors["shared.weight"] + 1
        else:
            del tensors["encoder.final_layer_norm.weight"]
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(export, "save_file", wrong)
    expected = "was written with other values" if first == "values" else "holds only a part|is missing"
    with pytest.raises(UserError, match=expected):
        written("hf")
