import math

import pytest
import torch
from safetensors.torch import save_file

from utils.errors import UserError
from utils.tensor_samples import (
    NUM_SLICES,
    SLICE_VALUES,
    Sampler,
    compare_samples,
    decode,
    likeness,
    median_distance,
    slice_starts,
)
from utils.tensor_source import open_pth, open_safetensors

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "U8": torch.uint8,
}


def save(path, **tensors):
    save_file(tensors, path)
    return open_safetensors([path])


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2", "BF16", "F16"])
def test_every_bit_pattern_is_decoded_as_torch_does(name):
    codes = torch.arange(256 if name.startswith("F8") else 65536)
    kind = torch.uint8 if name.startswith("F8") else torch.uint16
    tensor = codes.to(kind).view(DTYPES[name])
    found = torch.from_numpy(decode(codes.to(kind).numpy().tobytes(), name))
    assert torch.equal(found.nan_to_num(1e9, 2e9, 3e9), tensor.double().nan_to_num(1e9, 2e9, 3e9))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (64,), (65,), (192,), (193,), (40, 70)])
def test_samples_are_the_values_at_their_places(tmp_path, name, shape):
    numbers = torch.arange(math.prod(shape)).reshape(shape) % 7
    source = save(tmp_path / "x.safetensors", first=torch.ones(3), a=numbers.to(DTYPES[name]))
    flat = numbers.double().flatten()
    expected = [flat[start : start + SLICE_VALUES] for start in slice_starts(len(flat))]
    with Sampler(source).open() as sampler:
        found = sampler.values("a").tolist()
    assert found == (torch.cat(expected).tolist() if expected else [])
    assert len(found) == min(len(flat), NUM_SLICES * SLICE_VALUES)


def test_a_pth_file_gives_the_same_samples(tmp_path):
    tensor = torch.randn(30, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    source = save(tmp_path / "x.safetensors", a=tensor)
    torch.save({"a": tensor}, tmp_path / "x.pth")
    with Sampler(source).open() as one, Sampler(open_pth(tmp_path / "x.pth")).open() as other:
        assert one.values("a").tolist() == other.values("a").tolist()


def test_scales_of_fp8_files_are_applied(tmp_path):
    weight = torch.tensor([[0.5, -1.0]]).to(torch.float8_e4m3fn)
    tensors = {
        "scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn),
        "l.weight": weight,
        "l.scale_weight": torch.tensor(3.0),
    }
    source = save(tmp_path / "x.safetensors", **tensors)
    with Sampler(source).open() as sampler:
        assert sampler.values("l.weight").tolist() == [1.5, -3.0]


def held_against(tmp_path, a, b):
    left, right = save(tmp_path / "a.safetensors", t=a), save(tmp_path / "b.safetensors", t=b)
    return compare_samples(Sampler(left), Sampler(right), {"t": ("t", "t")})


def test_what_samples_say(tmp_path):
    base = torch.randn(50, 50, generator=torch.Generator().manual_seed(1)) * 0.03
    other = torch.randn(50, 50, generator=torch.Generator().manual_seed(2)) * 0.03
    cases = {
        "identical": base.clone(),
        "near": base * 1.01,
        "different": other,
    }
    for expected, tensor in cases.items():
        found = held_against(tmp_path, tensor, base)
        assert likeness(found) == expected, expected
    assert median_distance(held_against(tmp_path, base * 1.01, base)) == pytest.approx(0.01, rel=1e-4)
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        assert likeness(held_against(tmp_path, base.to(dtype), base)) == "rounded", dtype
    # A change of 5 % is not what rounding to bfloat16 does, and within one format nothing is.
    assert likeness(held_against(tmp_path, (base * 1.05).bfloat16(), base)) == "near"


def test_zeros_and_values_that_are_not_finite(tmp_path):
    zeros, broken = torch.zeros(10), torch.full((10,), math.nan)
    found = held_against(tmp_path, zeros, zeros)
    assert found["t"].is_zero and likeness(found) == "identical"
    assert likeness(held_against(tmp_path, torch.ones(10), zeros)) == "different"
    assert likeness(held_against(tmp_path, broken, broken)) == "identical"
    assert likeness(held_against(tmp_path, broken, torch.ones(10))) == "different"


def test_files_that_go_away_or_shrink_are_named(tmp_path):
    source = save(tmp_path / "x.safetensors", a=torch.ones(10))
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-4])
    with Sampler(source).open() as sampler, pytest.raises(UserError, match="became shorter"):
        sampler.values("a")
    (tmp_path / "x.safetensors").unlink()
    with Sampler(source).open() as sampler, pytest.raises(UserError, match="cannot be read"):
        sampler.values("a")
