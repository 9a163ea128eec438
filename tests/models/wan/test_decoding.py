"""Decoding: whole, in tiles, and what is said when memory does not suffice."""

import pytest
import torch

from models.wan.checkpoint import VAE_FILES
from models.wan.decoding import decode_latents
from models.wan.vae import load_vae
from utils.errors import UserError


@pytest.fixture(scope="module")
def vae(tiny_ti2v):
    return load_vae(tiny_ti2v / VAE_FILES["2.2"], torch.float32, torch.device("cpu"))


@pytest.fixture
def limited(vae, monkeypatch):
    """Let decoding fail for want of memory as torch does on a GPU or a CPU, of the whole or of everything."""

    def limit(error, *, also_tiles=False):
        decode = vae._module.decode

        def failing(latents):
            if also_tiles or not vae._module.use_tiling:
                raise error
            return decode(latents)

        monkeypatch.setattr(vae._module, "decode", failing)

    return limit


# 320 x 32 px: two tiles of 256 px side by side.
LATENTS = torch.randn(2, 48, 1, 2, 20, generator=torch.Generator().manual_seed(0))
ON_A_GPU = torch.OutOfMemoryError("CUDA out of memory")
ON_A_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


def test_tiles_cover_the_picture_and_differ_little(vae):
    whole = decode_latents(vae, LATENTS, "never")
    tiled = decode_latents(vae, LATENTS, "always")
    assert whole.shape == tiled.shape == (2, 3, 1, 32, 320)
    assert not torch.equal(whole, tiled)
    # Measured: 0.060 in the mean, with random weights; the attention in the middle sees one tile.
    assert (whole - tiled).abs().mean() < 0.1
    assert torch.equal(whole, decode_latents(vae, LATENTS, "auto"))


@pytest.mark.parametrize("error", [ON_A_GPU, ON_A_CPU], ids=["gpu", "cpu"])
def test_out_of_memory_falls_back_to_tiles_and_says_so_once(vae, limited, error):
    expected = decode_latents(vae, LATENTS, "always")
    limited(error)
    said = []
    assert torch.equal(decode_latents(vae, LATENTS, "auto", said.append), expected)
    assert len(said) == 1
    assert "not enough memory to decode 1 x 2 x 20 latents" in said[0]
    assert "in tiles" in said[0]
    assert not vae._module.use_tiling


def test_without_memory_for_tiles_it_is_the_users_to_mend(vae, limited):
    limited(ON_A_GPU, also_tiles=True)
    with pytest.raises(UserError, match="not even in tiles; ask for fewer frames"):
        decode_latents(vae, LATENTS, "auto")
    with pytest.raises(UserError, match="decode with --tiling auto"):
        decode_latents(vae, LATENTS, "never")


def test_another_error_is_not_taken_for_it(vae, limited):
    limited(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        decode_latents(vae, LATENTS, "auto")
