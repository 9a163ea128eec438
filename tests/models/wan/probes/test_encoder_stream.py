"""Two encoders run block by block, against the whole encoder, and what that costs in memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.wan.checkpoint import TEXT_ENCODER_FILE, TOKENIZER_DIR, open_text_encoder
from models.wan.component_shapes import Umt5Sizes, expected_umt5_shapes
from models.wan.names import umt5_to_hf
from models.wan.probes.encoder_stream import TABLE, open_encoder_pair, stream_states
from models.wan.text_encoder import WanTokenizer, load_umt5, pad_token_ids
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[4]
WORKER = ROOT / "tests" / "workers" / "stream_encoders.py"
CPU = torch.device("cpu")
CAPTIONS = ["a red circle moves to the right on a dark background", "a blue square", "", "two shapes meet"]


@pytest.fixture(scope="module")
def base(tiny_ti2v):
    return tiny_ti2v / TEXT_ENCODER_FILE


@pytest.fixture(scope="module")
def tensors(base):
    source = open_text_encoder(base)
    return {name: source.get(name).float() for name in source.shapes}


@pytest.fixture(scope="module")
def ids(tiny_ti2v):
    tokenizer = WanTokenizer(tiny_ti2v / TOKENIZER_DIR)
    return [tokenizer(caption) for caption in CAPTIONS]


@pytest.fixture
def write(tmp_path, tensors):
    """`write({...})`: the base in float32 with these tensors changed; `only=True`: nothing but these."""

    def save(changes, name="tuned.safetensors", *, only=False):
        shown = {} if only else tensors
        save_file(
            {umt5_to_hf(key): value.contiguous() for key, value in (shown | changes).items()}, tmp_path / name
        )
        return tmp_path / name

    return save


def noised(tensor, seed=0):
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    return tensor + 0.1 * tensor.std() * noise


def run(pair, ids, dtype=torch.float32):
    layers = []
    base, tuned = stream_states(pair, ids, dtype, CPU, layers.append)
    return base, tuned, layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_states_are_the_whole_encoders_bit_for_bit(base, tensors, write, ids, dtype):
    tuned_path = write({name: noised(tensor) for name, tensor in tensors.items() if tensor.ndim == 2})
    streamed = run(open_encoder_pair(base, tuned_path), ids, dtype)
    # The same order and padding: shortest first.
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    ids_BL, lens_B = pad_token_ids([ids[index] for index in order])
    mask_BL = (torch.arange(ids_BL.shape[1]) < lens_B[:, None]).long()
    for path, states in zip((base, tuned_path), streamed, strict=False):
        whole = load_umt5(open_text_encoder(path), dtype, CPU)
        with torch.no_grad():
            expected_BLD = whole(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        for row, index in enumerate(order):
            assert torch.equal(states[index], expected_BLD[row, : len(ids[index])])
    assert not torch.equal(streamed[0][0], streamed[1][0])


def test_each_layer_is_shown_once_and_says_whether_its_weights_moved(base, tensors, write, ids):
    name = "blocks.1.ffn.fc1.weight"
    pair = open_encoder_pair(base, write({name: tensors[name] * 1.5}))
    _, _, layers = run(pair, ids)
    assert [layer.layer for layer in layers] == ["tokens", "block 0", "block 1", "block 2", "norm"]
    assert [layer.weight_change > 0 for layer in layers] == [False, False, True, False, False]
    block = [tensor for key, tensor in tensors.items() if key.startswith("blocks.1.")]
    size = torch.cat([tensor.flatten() for tensor in block]).norm()
    assert layers[2].weight_change == pytest.approx(float(0.5 * tensors[name].norm() / size), rel=1e-5)
    moved = [not torch.equal(layer.base[0], layer.tuned[0]) for layer in layers]
    assert moved == [False, False, True, True, True]


def test_a_token_row_moves_the_prompts_that_hold_it_and_no_other(base, tensors, write, ids):
    token = ids[1][1]
    holding = [token in prompt for prompt in ids]
    assert True in holding and False in holding
    table = tensors[TABLE].clone()
    table[token] += 1.0
    base_states, tuned_states, layers = run(open_encoder_pair(base, write({TABLE: table})), ids)
    for one, other, holds in zip(base_states, tuned_states, holding, strict=True):
        assert torch.equal(one, other) == (not holds)
    assert layers[0].weight_change > 0


def test_many_prompts_are_split_into_batches(base, tensors, write, ids):
    """No prompt's states depend on which others are there, but for the rounding of products of another shape."""
    pair = open_encoder_pair(base, write({TABLE: noised(tensors[TABLE])}))
    many = [ids[index % 4] for index in range(70)]
    one, _, _ = run(pair, ids)
    all_of_them, tuned, _ = run(pair, many)
    assert len(all_of_them) == len(tuned) == 70
    for index, states in enumerate(all_of_them):
        assert states.shape == one[index % 4].shape
        torch.testing.assert_close(states, one[index % 4], rtol=1e-4, atol=1e-5)


def test_a_file_of_only_the_trained_tensors_is_laid_over_the_base(base, tensors, write, ids):
    changes = {name: noised(tensors[name]) for name in tensors if name.startswith("blocks.2.")}
    whole, partial = write(changes), write(changes, "part.safetensors", only=True)
    assert not open_encoder_pair(base, whole).is_partial
    pair = open_encoder_pair(base, partial)
    assert pair.is_partial
    expected, found = run(open_encoder_pair(base, whole), ids)[1], run(pair, ids)[1]
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def test_states_that_are_not_finite_are_refused(base, tensors, write, ids):
    pair = open_encoder_pair(base, write({"norm.weight": tensors["norm.weight"] * torch.nan}))
    with pytest.raises(UserError, match="tuned.safetensors: gives text states that are not finite"):
        run(pair, ids)


def test_a_tokenizer_of_another_model_is_refused(base, write):
    with pytest.raises(UserError, match="the tokenizer gives the token 5000"):
        run(open_encoder_pair(base, write({})), [[5, 5000, 1]])


def write_sizes(path, **changes):
    sizes = {"vocab_size": 384, "d_model": 64, "num_heads": 4, "d_kv": 16, "d_ff": 128, "num_layers": 3}
    shapes = expected_umt5_shapes(Umt5Sizes(**(sizes | changes), num_buckets=32))
    save_file({umt5_to_hf(name): torch.ones(shape) for name, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_model": 48}, "width 48"),
        ({"num_layers": 2}, "2 blocks"),
        ({"num_layers": 5}, "5 blocks"),
        ({"vocab_size": 100}, "100 tokens"),
    ],
)
def test_an_encoder_of_another_size_is_refused(base, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        open_encoder_pair(base, write_sizes(tmp_path / "other.safetensors", **changes))


def test_what_is_no_encoder_is_refused(base, tensors, write, tiny_ti2v, tmp_path):
    dit = next(tiny_ti2v.glob("diffusion*-00001-*.safetensors"))
    quantised = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items() if tensor.ndim == 2}
    marked = write({}, "marked.safetensors")
    save_file({"scaled_fp8": torch.zeros(2), "shared.weight": torch.zeros(384, 64)}, marked)
    wrong_part = write({"blocks.0.norm1.weight": torch.ones(48)}, "wrong.safetensors", only=True)
    torch.save({"a": 1}, tmp_path / "code.pth")
    for path, words in (
        (dit, "is not a UMT5 encoder of Wan 2.2: it is a DiT"),
        (write(quantised, "fp8.safetensors"), "quantised"),
        (marked, "quantised"),
        (wrong_part, "does not fit"),
        (tmp_path / "code.pth", "not a tensor"),
        (tmp_path / "missing.safetensors", "no such file"),
    ):
        with pytest.raises(UserError, match=words) as raised:
            open_encoder_pair(base, path)
        assert "\n" not in str(raised.value) and str(path) in str(raised.value)
    with pytest.raises(UserError, match="only a part"):
        open_encoder_pair(write({"norm.weight": torch.ones(64)}, "norm.safetensors", only=True), base)


def peak(root, num_layers):
    sizes = Umt5Sizes(512, 512, 8, 64, 2048, num_layers, 32)
    shapes = expected_umt5_shapes(sizes)
    for name, value in (("base", 0.01), ("tuned", 0.011)):
        save_file(
            {umt5_to_hf(key): torch.full(shape, value) for key, shape in shapes.items()},
            root / f"{name}_{num_layers}.safetensors",
        )
    command = [sys.executable, str(WORKER), str(root / f"base_{num_layers}.safetensors")]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "MALLOC_MMAP_THRESHOLD_": "100000",
    }
    done = subprocess.run(
        [*command, str(root / f"tuned_{num_layers}.safetensors")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


def test_memory_holds_one_block_of_each_encoder_and_not_all(tmp_path):
    """A block is 17 MB. Peak above the start: measured 56 MB with 2 blocks and 56 MB with 10 (340 MB for both encoders)."""
    block = (4 * 512 * 512 + 3 * 512 * 2048) * 4
    few, many = peak(tmp_path, 2), peak(tmp_path, 10)
    print(f"2 blocks: {few / 1e6:.0f} MB, 10 blocks: {many / 1e6:.0f} MB; a block: {block / 1e6:.0f} MB")
    assert few > 2 * block  # the measurement sees the two that have to be there
    assert many < few + block
    assert many < 5 * block
