import json

import pytest

from models.wan.arch import VARIANTS, WanArch, expected_shapes, load_arch
from utils.errors import UserError

A14B = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "out_dim": 16}
PUBLISHED = [
    (
        "ti2v5b_keys",
        "ti2v-5b",
        {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30, "out_dim": 48},
    ),
    ("a14b_t2v_keys", "t2v-a14b", A14B),
    ("a14b_i2v_keys", "i2v-a14b", A14B),
]
DELETE = object()


@pytest.fixture
def write_config(tmp_path):
    def write(arch: WanArch, **changes):
        values = arch.to_config_json() | changes
        path = tmp_path / "config.json"
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not DELETE}))
        return path

    return write


@pytest.mark.parametrize(("keys", "variant", "sizes"), PUBLISHED)
def test_published_checkpoints_are_understood_tensor_for_tensor_in_order(
    keys, variant, sizes, published_rows, write_config
):
    info = VARIANTS[variant]
    published = {row[0]: tuple(map(int, row[1].split("x"))) for row in published_rows(keys)}
    arch = WanArch(
        model_type=info.model_type,
        freq_dim=256,
        in_dim=info.in_dim,
        text_len=512,
        eps=1e-6,
        text_dim=4096,
        **sizes,
    )
    assert list(expected_shapes(arch).items()) == list(published.items())
    assert load_arch(write_config(arch), published) == arch
    assert arch.head_dim == 128


def test_config_json_is_the_published_one(make_arch, published_rows):
    # The published file of TI2V-5B, key for key and in its order; its size on the hub is 251 bytes.
    arch = make_arch("ti2v", dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, text_dim=4096)
    text = json.dumps(arch.to_config_json(), indent=2) + "\n"
    assert len(text.encode()) == 251
    assert list(json.loads(text)) == [
        "_class_name",
        "_diffusers_version",
        "dim",
        "eps",
        "ffn_dim",
        "freq_dim",
        "in_dim",
        "model_type",
        "num_heads",
        "num_layers",
        "out_dim",
        "text_len",
    ]


def test_variants_are_told_apart_by_what_they_fix():
    assert {
        name: (info.in_dim, info.out_dim, info.vae_kind, info.fps) for name, info in VARIANTS.items()
    } == {
        "ti2v-5b": (48, 48, "2.2", 24),
        "t2v-a14b": (16, 16, "2.1", 16),
        "i2v-a14b": (36, 16, "2.1", 16),
    }
    assert [info.pixel_multiple for info in VARIANTS.values()] == [32, 16, 16]
    assert [info.boundary for info in VARIANTS.values()] == [None, 0.875, 0.9]
    assert [info.has_experts for info in VARIANTS.values()] == [False, True, True]


@pytest.mark.parametrize(("num_frames", "latent_frames"), [(1, 1), (5, 2), (81, 21), (121, 31)])
def test_latent_frames(num_frames, latent_frames):
    assert all(info.latent_frames(num_frames) == latent_frames for info in VARIANTS.values())


@pytest.mark.parametrize(
    ("variant", "expert", "wanted", "given"),
    [
        ("t2v-a14b", "high_noise", (0.0, 1.0), (0.875, 1.0)),
        ("t2v-a14b", "low_noise", (0.0, 1.0), (0.0, 0.875)),
        ("i2v-a14b", "high_noise", (0.0, 0.95), (0.9, 0.95)),
        ("i2v-a14b", "low_noise", (0.2, 0.5), (0.2, 0.5)),
        ("t2v-a14b", "high_noise", (0.875, 1.0), (0.875, 1.0)),
        ("t2v-a14b", "high_noise", (0.9, 1.0), (0.9, 1.0)),
        ("t2v-a14b", "low_noise", (0.0, 0.875), (0.0, 0.875)),
        ("ti2v-5b", None, (0.1, 0.95), (0.1, 0.95)),
    ],
)
def test_an_expert_trains_its_own_noise_levels(variant, expert, wanted, given):
    assert VARIANTS[variant].sigma_range(expert, *wanted) == given


@pytest.mark.parametrize(("expert", "wanted"), [("high_noise", (0.0, 0.5)), ("low_noise", (0.875, 1.0))])
def test_a_range_that_is_the_other_experts_is_refused(expert, wanted):
    with pytest.raises(UserError, match=f"leave nothing to the {expert} expert of t2v-a14b"):
        VARIANTS["t2v-a14b"].sigma_range(expert, *wanted)


@pytest.mark.parametrize(
    ("expert", "wanted", "words"),
    [
        ("high_noise", (0.5, 1.0), "min_t = 0.5 lies below 0.875, where the high_noise expert"),
        ("low_noise", (0.0, 0.95), "max_t = 0.95 lies above 0.875, where the low_noise expert"),
    ],
)
def test_a_bound_on_the_other_experts_side_is_refused(expert, wanted, words):
    with pytest.raises(UserError, match=words):
        VARIANTS["t2v-a14b"].sigma_range(expert, *wanted)


def test_a_pair_has_the_whole_range():
    assert VARIANTS["t2v-a14b"].sigma_range("both", 0.1, 0.95) == (0.1, 0.95)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dim": 512},
            r"patch_embedding\.weight is \[256, 16, 1, 2, 2\] instead of \[512, 16, 1, 2, 2\]",
        ),
        ({"ffn_dim": 100}, r"blocks\.0\.ffn\.0\.weight is \[512, 256\] instead of \[100, 256\]"),
        ({"num_layers": 4}, r"blocks\.3\.modulation is missing"),
        ({"num_layers": 2}, r"blocks\.2\.modulation is not one of its tensors"),
        ({"num_layers": 10**9}, "num_layers = 1000000000 cannot be right"),
        ({"num_heads": 3}, "dim 256 does not split into 3 heads"),
        ({"num_heads": 256}, "dim 256 does not split into 256 heads of even width"),
        ({"num_heads": 0}, "num_heads = 0 cannot be right"),
        ({"dim": "256"}, "dim = '256' cannot be right"),
        ({"dim": True}, "dim = True cannot be right"),
        ({"eps": "small"}, "eps = 'small' cannot be right"),
        ({"in_dim": 48}, r"in_dim/out_dim 48/16 do not fit model_type 't2v', which has 16/16"),
        ({"model_type": "i2v"}, r"in_dim/out_dim 16/16 do not fit model_type 'i2v', which has 36/16"),
        ({"model_type": "vace"}, r"model_type 'vace' is no Wan 2\.2 variant \(known: ti2v, t2v, i2v\)"),
        ({"model_type": ["t2v"]}, "is no Wan 2.2 variant"),
        ({"num_heads": DELETE, "eps": DELETE}, "has no num_heads, eps"),
    ],
)
def test_a_config_that_is_not_that_of_the_weights_is_refused(changes, message, make_arch, write_config):
    arch = make_arch("t2v")
    path = write_config(arch, **changes)
    with pytest.raises(UserError, match=message) as raised:
        load_arch(path, expected_shapes(arch))
    assert str(path.parent) in str(raised.value)


@pytest.mark.parametrize("content", ["{", "[1, 2]", "null", "\x00"])
def test_a_config_that_is_not_one_is_refused(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError, match="config.json"):
        load_arch(path, {})


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(UserError, match="config.json: missing"):
        load_arch(tmp_path / "config.json", {})


@pytest.mark.parametrize("extra", ["blocks.0.cross_attn.k_img.weight", "img_emb.proj.0.weight"])
def test_an_image_model_of_wan_21_is_named_as_such(extra, make_arch, write_config):
    arch = make_arch("i2v")
    shapes = expected_shapes(arch) | {extra: (256, 256)}
    with pytest.raises(UserError, match=r"Wan 2\.1 image-to-video"):
        load_arch(write_config(arch), shapes)


def test_a_missing_tensor_is_named_and_the_rest_counted(make_arch, write_config):
    arch = make_arch("ti2v")
    shapes = {name: shape for name, shape in expected_shapes(arch).items() if ".cross_attn.k." not in name}
    with pytest.raises(UserError, match=r"blocks\.0\.cross_attn\.k\.weight is missing.*\(and 3 more\)"):
        load_arch(write_config(arch), shapes)


def test_a_checkpoint_without_text_embedding_is_refused(make_arch, write_config):
    arch = make_arch("t2v")
    shapes = expected_shapes(arch)
    del shapes["text_embedding.0.weight"]
    with pytest.raises(UserError, match=r"text_embedding\.0\.weight is missing"):
        load_arch(write_config(arch), shapes)
