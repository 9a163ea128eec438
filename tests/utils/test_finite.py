import pytest
import torch

from utils.finite import all_finite

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1, 7, 64, 1000, 40_000])
def test_one_bad_number_is_found_wherever_it_stands(dtype, size):
    generator = torch.Generator().manual_seed(size)
    good = torch.randn(size, generator=generator).to(dtype)
    assert all_finite(good)
    places = {0, size // 2, size - 1, *torch.randint(size, (8,), generator=generator).tolist()}
    for place in places:
        for value in (torch.nan, torch.inf, -torch.inf):
            bad = good.clone()
            bad[place] = value
            assert not all_finite(bad), (place, value)


def test_extremes_are_finite_and_what_is_no_float_is_too():
    for dtype in FLOATS:
        limits = torch.finfo(dtype)
        assert all_finite(torch.tensor([limits.min, limits.max], dtype=dtype))
    assert all_finite(torch.arange(3)) and all_finite(torch.zeros(0))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bits(dtype):
    values = torch.linspace(-400, 400, 33)
    assert all_finite(values.to(dtype))
    values[7] = torch.nan
    assert not all_finite(values.to(dtype))
    if dtype == torch.float8_e5m2:
        assert not all_finite(torch.tensor([1.0, torch.inf]).to(dtype))
