import pytest
import torch

from scripts.tiny_world.compact import CompactDit, padding_bias, velocity
from scripts.tiny_world.dit_training import ARCH, encode_ids, new_dit, new_umt5


@pytest.fixture(scope="module")
def parts():
    dit, umt5 = new_dit(0), new_umt5(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dit.parameters():  # the head begins at zero, and biases would hide behind it
            parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    return dit.requires_grad_(False), umt5.eval().requires_grad_(False)


def test_padding_as_one_row_is_the_same_as_512_rows(parts, relative_error):
    dit, umt5 = parts
    generator = torch.Generator().manual_seed(1)
    text, lens = encode_ids(umt5, [[4, 36, 11, 1], [1], [7, 8, 9, 10, 11, 12, 13, 14, 1]])
    assert not text[1, 1:].any()
    latents = torch.randn(3, ARCH.in_dim, 2, 6, 6, generator=generator)
    times = torch.tensor([[900.0], [500.0], [20.0]])
    expected = dit(latents, times, text)
    found = velocity(dit, latents, times, text, lens)
    assert relative_error(found, expected) < 1e-5  # measured: 2e-6
    assert torch.equal(CompactDit(dit)(latents, times, text), found)
    # Without the padding's weight the answer is another one: the test can fail.
    unpadded = velocity(dit, latents, times, text, torch.full_like(lens, ARCH.text_len - 1))
    assert relative_error(unpadded, expected) > 1e-2


def test_the_bias_counts_the_padding():
    bias = padding_bias(torch.tensor([2, 4]), 4, 512)[:, 0, 0]
    assert bias[:, :-1].tolist() == [[0, 0, -torch.inf, -torch.inf], [0, 0, 0, 0]]
    assert bias[:, -1].exp().tolist() == pytest.approx([510, 508])
