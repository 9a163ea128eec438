"""The VAE against diffusers, with names converted by diffusers' own code (2.1) or the published key list (2.2)."""

import inspect
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file

from models.wan.component_shapes import VaeSizes, expected_vae_shapes
from models.wan.names import vae_to_diffusers
from models.wan.vae import LATENT_STATS, load_vae
from tests.helpers.diffusers_wan import VAE_CONFIGS, published_vae_names
from utils.errors import UserError

KEYS = Path(__file__).resolve().parents[2] / "assets" / "keys"
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["2.1", "2.2"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def reference(kind):
    """diffusers' own module with random weights."""
    torch.manual_seed(0)
    return AutoencoderKLWan(**VAE_CONFIGS[kind]).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def official_state(kind, reference):
    """The reference's weights under official names, by the published list and not by this project's map."""
    state = reference.state_dict()
    return {official: state[diffusers].clone() for official, diffusers in published_vae_names(kind).items()}


@pytest.fixture(scope="module")
def vae(official_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "Wan_VAE.pth"
    torch.save(official_state, path)
    return load_vae(path, torch.float32, CPU)


@pytest.fixture(scope="module")
def video_BCFHW():
    return torch.rand(2, 3, 5, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1


def normalise_by_hand(latents, kind, inverse=False):
    stats = LATENT_STATS[kind]
    channels = []
    for channel, mean, std in zip(latents.unbind(1), stats.mean, stats.std, strict=True):
        channels.append(channel * std + mean if inverse else (channel - mean) / std)
    return torch.stack(channels, dim=1)


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_2_1_names_agree_with_diffusers_converter():
    shapes = expected_vae_shapes(VaeSizes("2.1", 96, 96))
    # The converter looks at nothing but names, so each "tensor" can be the official name itself.
    theirs = convert_wan_vae_to_diffusers({name: name for name in shapes})
    assert {official: name for name, official in theirs.items()} == vae_to_diffusers(shapes, "2.1")


@pytest.mark.parametrize(
    ("sizes", "config"),
    [
        (VaeSizes("2.1", 96, 96), VAE_CONFIGS["2.1"] | {"base_dim": 96}),
        (VaeSizes("2.2", 160, 256), VAE_CONFIGS["2.2"] | {"base_dim": 160, "decoder_base_dim": 256}),
    ],
)
def test_the_published_sizes_fill_diffusers_module_exactly(sizes, config):
    with torch.device("meta"):
        module = AutoencoderKLWan(**config)
    shapes = expected_vae_shapes(sizes)
    ours = {renamed: shapes[name] for name, renamed in vae_to_diffusers(shapes, sizes.kind).items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_encode_is_the_posterior_mean_normalised(vae, reference, kind, video_BCFHW):
    latents = vae.encode(video_BCFHW)
    expected = normalise_by_hand(reference.encode(video_BCFHW).latent_dist.mean, kind)
    assert latents.shape == (2, vae.latent_channels, 2, 64 // vae.stride[1], 96 // vae.stride[2])
    assert relative_error(latents, expected) < 1e-6  # measured: 0 (bit-equal) for both kinds


def test_decode_undoes_the_normalisation(vae, reference, kind):
    shape = (1, vae.latent_channels, 2, 4, 6)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    video = vae.decode(latents)
    expected = reference.decode(normalise_by_hand(latents, kind, inverse=True)).sample
    assert video.shape == (1, 3, 5, 4 * vae.stride[1], 6 * vae.stride[2])
    assert relative_error(video, expected) < 1e-6  # measured: 0 (bit-equal) for both kinds


def test_2_1_latents_equal_those_of_weights_that_diffusers_converted(video_BCFHW, tmp_path):
    # diffusers has no converter for 2.2, whose names are checked against the published list above.
    sizes = VaeSizes("2.1", 8, 8)
    generator = torch.Generator().manual_seed(3)
    state = {
        name: torch.randn(shape, generator=generator) * 0.1
        for name, shape in expected_vae_shapes(sizes).items()
    }
    torch.save(state, tmp_path / "vae.pth")
    module = AutoencoderKLWan(**VAE_CONFIGS["2.1"]).eval().requires_grad_(False)
    module.load_state_dict(convert_wan_vae_to_diffusers(dict(state)))
    expected = normalise_by_hand(module.encode(video_BCFHW).latent_dist.mode(), "2.1")
    latents = load_vae(tmp_path / "vae.pth", torch.float32, CPU).encode(video_BCFHW)
    assert relative_error(latents, expected) < 1e-6  # measured: 0 (bit-equal)


def test_2_1_statistics_are_those_of_diffusers_defaults():
    parameters = inspect.signature(AutoencoderKLWan.__init__).parameters
    assert LATENT_STATS["2.1"].mean == tuple(parameters["latents_mean"].default)
    assert LATENT_STATS["2.1"].std == tuple(parameters["latents_std"].default)


def test_2_2_statistics_have_the_published_ends():
    stats = LATENT_STATS["2.2"]
    assert (len(stats.mean), len(stats.std)) == (48, 48)
    assert (stats.mean[0], stats.mean[-1], stats.std[0], stats.std[-1]) == (-0.2289, -0.0667, 0.4765, 0.7744)


def test_latents_of_the_first_frame_depend_on_it_alone(vae, video_BCFHW):
    still = vae.encode(video_BCFHW[:, :, :1])
    assert relative_error(vae.encode(video_BCFHW)[:, :, :1], still) < 1e-5  # measured: 0 for both kinds


def test_no_gradient_flows(vae, video_BCFHW):
    assert not vae.encode(video_BCFHW[:1, :, :1].requires_grad_()).requires_grad


def test_bfloat16_weights_give_float32_latents_close_by(official_state, vae, video_BCFHW, tmp_path):
    torch.save(official_state, tmp_path / "vae.pth")
    rounded = load_vae(tmp_path / "vae.pth", torch.bfloat16, CPU).encode(video_BCFHW)
    assert rounded.dtype == torch.float32
    assert 0 < relative_error(rounded, vae.encode(video_BCFHW)) < 3e-2  # measured: 2.9e-3 (2.1), 6.0e-3 (2.2)


def test_safetensors_with_official_names_is_the_same_vae(official_state, vae, video_BCFHW, tmp_path):
    save_file(official_state, tmp_path / "vae.safetensors")
    again = load_vae(tmp_path / "vae.safetensors", torch.float32, CPU)
    assert torch.equal(again.encode(video_BCFHW[:1]), vae.encode(video_BCFHW[:1]))


def test_loaded_weights_do_not_hang_on_the_file(official_state, vae, video_BCFHW, tmp_path):
    path = tmp_path / "vae.pth"
    torch.save(official_state, path)
    loaded = load_vae(path, torch.float32, CPU)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(loaded.encode(video_BCFHW[:1]), vae.encode(video_BCFHW[:1]))


@pytest.mark.parametrize(
    "shape", [(1, 3, 4, 64, 64), (1, 3, 5, 64, 60), (1, 3, 5, 60, 64), (1, 4, 5, 64, 64), (3, 5, 64, 64)]
)
def test_videos_that_would_be_cut_are_refused(vae, shape):
    with pytest.raises(ValueError, match=r"frames of|a video is"):
        vae.encode(torch.zeros(shape))


def test_latents_of_the_other_kind_are_refused(vae):
    with pytest.raises(ValueError, match="latents of the Wan"):
        vae.decode(torch.zeros(1, 7, 1, 4, 4))


def test_a_file_that_is_no_vae_is_refused_by_name(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(
        UserError, match=r"other\.pth: is not a VAE of Wan 2\.2: its 1 names begin with weight"
    ):
        load_vae(tmp_path / "other.pth", torch.float32, CPU)


@pytest.mark.parametrize(
    ("fixture", "file", "stride"), [("tiny_ti2v", "Wan2.2_VAE.pth", 16), ("tiny_t2v", "Wan2.1_VAE.pth", 8)]
)
def test_latents_of_the_small_checkpoint_are_of_order_one(request, fixture, file, stride, video_BCFHW):
    vae = load_vae(request.getfixturevalue(fixture) / file, torch.float32, CPU)
    assert vae.stride == (4, stride, stride)
    latents = vae.encode(video_BCFHW)
    assert latents.isfinite().all()
    assert 0.3 < latents.std().item() < 3.0
    assert (vae.decode(latents).abs() == 1.0).float().mean() < 0.2
