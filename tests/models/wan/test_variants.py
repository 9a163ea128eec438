"""Which variant a checkpoint is, by its headers and config.json; and every wrong pair refused with the reason it is wrong.

The files have the published names, shapes and sizes, and no data.
"""

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from models.wan.arch import PUBLISHED, VARIANTS, expected_shapes, load_arch, variant_of_shapes
from models.wan.checkpoint import TOKENIZER_DIR, check_checkpoint, open_transformer, read_variant
from models.wan.component_shapes import Umt5Sizes, expected_umt5_shapes
from models.wan.layouts import locate
from models.wan.plan import make_plan_document
from tests.helpers import weight_files
from tests.helpers.workspace import ROOT, check_refused, make_workspace
from utils.config.load import load_config
from utils.config.schema import ModelConfig
from utils.errors import UserError
from utils.sparse_weights import write_sparse_safetensors

PAIRS = list(permutations(VARIANTS, 2))
EXPERTS = {"high_noise": "high_noise_model", "low_noise": "low_noise_model"}
CHOOSE = 'write expert = "high_noise", "low_noise" or "both"'
CHANNELS = {"ti2v-5b": (48, 48), "t2v-a14b": (16, 16), "i2v-a14b": (36, 16)}
VAE_OF = {"ti2v-5b": "2.2", "t2v-a14b": "2.1", "i2v-a14b": "2.1"}
OTHER_VAE = {"2.1": "2.2", "2.2": "2.1"}


def config_json(variant: str, **changes: Any) -> str:
    return json.dumps(PUBLISHED[variant].to_config_json() | changes)


def write_dit(root: Path, variant: str, config: str | None) -> Path:
    """The DiT, or both, in the official layout, in shards, with this `config.json` beside each."""
    folders = [root] if variant == "ti2v-5b" else [root / name for name in EXPERTS.values()]
    for folder in folders:
        weight_files.write_sharded(folder, weight_files.dit(variant), weight_files.NUM_SHARDS[variant])
        if config is not None:
            (folder / "config.json").write_text(config, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_ti2v) -> dict[str, Path]:
    """Checkpoints by variant, both VAEs, encoders of the right and of half the width, and a tokenizer."""
    root = tmp_path_factory.mktemp("parts")
    found = {variant: write_dit(root / variant, variant, config_json(variant)) for variant in VARIANTS}
    for kind in OTHER_VAE:
        found[kind] = root / f"vae_{kind}.safetensors"
        shapes = weight_files.published(f"wan{kind.replace('.', '')}_vae_keys", "official_key")
        write_sparse_safetensors(found[kind], shapes)
    found["t5"], found["narrow"] = root / "t5.safetensors", root / "narrow.safetensors"
    write_sparse_safetensors(found["t5"], weight_files.published("umt5_xxl_keys", "official_key"))
    write_sparse_safetensors(
        found["narrow"], expected_umt5_shapes(Umt5Sizes(256384, 2048, 32, 64, 5120, 24, 32))
    )
    return found | {"tokenizer": tiny_ti2v / TOKENIZER_DIR}


@pytest.fixture
def section(parts):
    """`section(variant, **changes)`: `[model]` for a whole checkpoint of this variant, `variant` itself not given."""

    def make(variant: str, /, **changes: Any) -> ModelConfig:
        values = {
            "ckpt_path": str(parts[variant]),
            "llm_path": str(parts["t5"]),
            "vae_path": str(parts[VAE_OF[variant]]),
            "tokenizer_path": str(parts["tokenizer"]),
            "expert": None if variant == "ti2v-5b" else "low_noise",
        }
        switches = {"cache_text_embeddings": True, "train_text_encoder": False, "freeze_transformer": True}
        return ModelConfig(type="wan", **(values | switches | changes))

    return make


def dit_dir(root: Path, variant: str, expert: str = "low_noise") -> Path:
    return root if variant == "ti2v-5b" else root / EXPERTS[expert]


def said(model: ModelConfig) -> list[str]:
    """All problems, word for word."""
    return [str(problem) for problem in check_checkpoint(model)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_published_model_is_recognised(variant, section, parts):
    for expert in [None] if variant == "ti2v-5b" else list(EXPERTS):
        for given in (None, variant):
            model = section(variant, expert=expert, variant=given)
            assert said(model) == []
            assert read_variant(model) is VARIANTS[variant]
        paths, _ = locate(model)
        assert (
            load_arch(paths.config_json, open_transformer(paths.transformer_dir).shapes) == PUBLISHED[variant]
        )
    shapes = weight_files.dit(variant)
    assert variant_of_shapes(shapes) is VARIANTS[variant]
    assert shapes == expected_shapes(PUBLISHED[variant])


@pytest.mark.parametrize(("variant", "name"), PAIRS)
def test_the_name_of_a_folder_or_file_says_nothing(variant, name, section, tmp_path):
    """A checkpoint in a folder that is named after another variant, and a single file without config.json so named."""
    root = write_dit(tmp_path / f"Wan2.2-{name.upper()}", variant, config_json(variant))
    model = section(variant, ckpt_path=str(root))
    assert said(model) == [] and read_variant(model) is VARIANTS[variant]
    file = tmp_path / "single" / f"wan2.2_{name}_fp16.safetensors"
    file.parent.mkdir()
    write_sparse_safetensors(file, weight_files.dit(variant), "F16")
    model = section(variant, ckpt_path=str(file.parent), transformer_path=str(file))
    assert said(model) == [] and read_variant(model) is VARIANTS[variant]


@pytest.mark.parametrize(("variant", "wrong"), PAIRS)
def test_another_variant_in_the_configuration(variant, wrong, section, parts):
    """Among them an I2V checkpoint with the configuration of T2V."""
    assert said(section(variant, variant=wrong)) == [
        f"model.variant: is '{wrong}', but {dit_dir(parts[variant], variant)}/config.json and the weights are those of "
        f"'{variant}' -> write variant = \"{variant}\", leave it out, or give another ckpt_path"
    ]


@pytest.mark.parametrize(("variant", "wrong"), PAIRS)
def test_the_config_json_of_another_variant(variant, wrong, section, tmp_path):
    """Nothing is concluded from it: the one thing that is said is that it is not that of the weights."""
    root = write_dit(tmp_path / "mixed", variant, config_json(wrong))
    takes, gives = CHANNELS[variant]
    not_takes, not_gives = CHANNELS[wrong]
    reason = (
        f"{dit_dir(root, variant)}/config.json: is that of {wrong}, but the weights are those of {variant} (they take {takes} "
        f"channels and give {gives}, not {not_takes} and {not_gives}); give the config.json that was published with the "
        "weights, or other weights"
    )
    for given in (None, variant, wrong):
        assert said(section(variant, ckpt_path=str(root), variant=given)) == [f"model.ckpt_path: {reason}"]


@pytest.mark.parametrize(("variant", "other"), PAIRS)
def test_the_dit_of_another_variant(variant, other, section, parts):
    """A DiT is what it is: what does not fit it is said of the rest, and of its own configuration."""
    place = dit_dir(parts[other], other)
    expected = []
    if other == "ti2v-5b":
        expected.append("model.expert: is 'low_noise', but ti2v-5b has no experts -> leave it out")
    elif variant == "ti2v-5b":
        expected.append(
            f"model.expert: is missing, but {place} is an A14B model, which has two experts -> {CHOOSE}"
        )
    expected.append(
        f"model.variant: is '{variant}', but {place}/config.json and the weights are those of '{other}' -> write variant = "
        f'"{other}", leave it out, or give another ckpt_path'
    )
    if VAE_OF[variant] != VAE_OF[other]:
        expected.append(wrong_vae(parts, other))
    assert said(section(variant, variant=variant, transformer_path=str(place))) == expected


def wrong_vae(parts, variant: str) -> str:
    right = VAE_OF[variant]
    wrong = OTHER_VAE[right]
    return (
        f"model.vae_path: {parts[wrong]} is the VAE of Wan {wrong}, but {variant} works with that of Wan {right} -> give "
        f"Wan{right}_VAE.pth"
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_other_kind_of_vae(variant, section, parts):
    assert said(section(variant, vae_path=str(parts[OTHER_VAE[VAE_OF[variant]]]))) == [
        wrong_vae(parts, variant)
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_encoder_of_another_width(variant, section, parts):
    assert said(section(variant, llm_path=str(parts["narrow"]))) == [
        f"model.llm_path: {parts['narrow']} gives text states of width 2048, the DiT takes 4096 -> use the encoder and the "
        "DiT of one checkpoint"
    ]


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_experts_where_there_are_none_or_another_one(variant, expert, section, parts):
    if variant == "ti2v-5b":
        assert said(section(variant, expert=expert)) == [
            f"model.expert: is '{expert}', but ti2v-5b has no experts -> leave it out"
        ]
        return
    assert said(section(variant, expert=None)) == [
        f"model.expert: is missing, but {parts[variant]} is an A14B model, which has two experts -> {CHOOSE}"
    ]
    other = next(name for name in EXPERTS if name != expert)
    place = dit_dir(parts[variant], variant, other)
    assert said(section(variant, expert=expert, transformer_path=str(place))) == [
        f"model.expert: is '{expert}', but the weights are in {place} -> choose the expert whose weights these are"
    ]


def test_everything_of_the_5b_on_a_checkpoint_of_a14b(section, parts):
    """A configuration written for TI2V-5B, pointed at A14B: each thing that does not fit is named once."""
    model = section("ti2v-5b", variant="ti2v-5b", ckpt_path=str(parts["t2v-a14b"]))
    assert said(model) == [
        f"model.expert: is missing, but {parts['t2v-a14b']} is an A14B model, which has two experts -> {CHOOSE}"
    ]
    found = said(section("ti2v-5b", variant="ti2v-5b", expert="high_noise", ckpt_path=str(parts["t2v-a14b"])))
    assert [line.partition(":")[0] for line in found] == ["model.variant", "model.vae_path"]


SIZES = [
    ("dim", 3072 * 2, "patch_embedding.weight is [3072, 48, 1, 2, 2] instead of [6144, 48, 1, 2, 2]"),
    ("ffn_dim", 13824, "blocks.0.ffn.0.weight is [14336, 3072] instead of [13824, 3072]"),
    ("freq_dim", 128, "time_embedding.0.weight is [3072, 256] instead of [3072, 128]"),
    ("num_layers", 40, "blocks.30.modulation is missing"),
    ("num_layers", 29, "blocks.29.modulation is not one of its tensors"),
    ("in_dim", 36, "in_dim/out_dim 36/48 do not fit model_type 'ti2v', which has 48/48"),
    ("out_dim", 16, "in_dim/out_dim 48/16 do not fit model_type 'ti2v', which has 48/48"),
    ("num_heads", 40, "dim 3072 does not split into 40 heads of even width"),
    (
        "num_heads",
        48,
        "num_heads = 48, but ti2v-5b, whose weights these are by their sizes, has 24; download the file",
    ),
    (
        "text_len",
        226,
        "text_len = 226, but ti2v-5b, whose weights these are by their sizes, has 512; download",
    ),
    (
        "eps",
        1e-5,
        "eps = 1e-05, but ti2v-5b, whose weights these are by their sizes, has 1e-06; download the file",
    ),
]


@pytest.mark.parametrize(("key", "value", "reason"), SIZES)
def test_sizes_that_disagree_with_config_json(key, value, reason, section, tmp_path):
    """Also those that no header shows, where the weights are published ones."""
    root = write_dit(tmp_path / "sizes", "ti2v-5b", config_json("ti2v-5b", **{key: value}))
    (problem,) = said(section("ti2v-5b", ckpt_path=str(root)))
    assert problem.startswith(f"model.ckpt_path: {root}") and reason in problem


def wan_21(kind: str) -> weight_files.Shapes:
    """Names and shapes of Wan 2.1: the image-to-video model of 14 B with its image branch, or the small one."""
    arch = PUBLISHED["i2v-a14b"]
    if kind == "small":
        small = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
        return expected_shapes(replace(PUBLISHED["t2v-a14b"], **small))
    shapes = dict(expected_shapes(arch))
    for index in range(arch.num_layers):
        for name in ("k_img", "v_img"):
            shapes[f"blocks.{index}.cross_attn.{name}.weight"] = (arch.dim, arch.dim)
            shapes[f"blocks.{index}.cross_attn.{name}.bias"] = (arch.dim,)
        shapes[f"blocks.{index}.cross_attn.norm_k_img.weight"] = (arch.dim,)
    shapes |= {"img_emb.proj.1.weight": (1280, 1280), "img_emb.proj.3.weight": (arch.dim, 1280)}
    return shapes


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("expert", [None, "low_noise"])
@pytest.mark.parametrize(
    ("kind", "name"), [("image", "a Wan 2.1 image-to-video model"), ("small", "Wan 2.1 T2V-1.3B")]
)
def test_wan_21_is_refused_by_name(kind, name, expert, with_config, section, tmp_path):
    """And nothing is said of experts, which its config.json would suggest: it has the form of Wan 2.2's."""
    write_sparse_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", wan_21(kind))
    sizes = {} if kind == "image" else {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
    if with_config:
        variant = "i2v-a14b" if kind == "image" else "t2v-a14b"
        (tmp_path / "config.json").write_text(config_json(variant, **sizes))
    (problem,) = said(section("i2v-a14b", ckpt_path=str(tmp_path), expert=expert))
    assert problem.startswith(f"model.ckpt_path: {tmp_path}: ") and name in problem and "Wan 2.2" in problem


@pytest.mark.parametrize("prefix", ["net.", "student.dit."])
def test_names_under_an_unknown_prefix(prefix, section, tmp_path):
    shapes = weight_files.renamed(weight_files.dit("ti2v-5b"), lambda name: prefix + name)
    write_sparse_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", shapes)
    (tmp_path / "config.json").write_text(config_json("ti2v-5b"))
    (problem,) = said(section("ti2v-5b", ckpt_path=str(tmp_path)))
    assert (
        f"before the names of a DiT stands '{prefix}', a prefix that is not known (known: none, " in problem
    )
    assert "model.diffusion_model." in problem


def test_a_tensor_under_a_strange_name_is_named(section, tmp_path):
    shapes = {
        name.replace("blocks.3.cross_attn.k.", "blocks.3.cross_attn.key."): shape
        for name, shape in weight_files.dit("ti2v-5b").items()
    }
    write_sparse_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", shapes)
    (tmp_path / "config.json").write_text(config_json("ti2v-5b"))
    (problem,) = said(section("ti2v-5b", ckpt_path=str(tmp_path)))
    assert "blocks.3.cross_attn.k.weight is missing" in problem
    assert "blocks.3.cross_attn.key.weight is not one of its tensors" in problem


def test_a_plan_says_the_same_of_a_mixed_checkpoint(tmp_path):
    """The reason is the config.json, and neither the expert nor the variant that it suggests."""
    root = write_dit(tmp_path / "mixed", "ti2v-5b", config_json("i2v-a14b"))
    reason = "is that of i2v-a14b, but the weights are those of ti2v-5b"
    dataset = tmp_path / "dataset.toml"
    dataset.write_text('resolutions = [512]\n[[directory]]\npath = "clips"\n')
    values = [f"model.ckpt_path={root}", f"dataset={dataset}"]
    loaded = load_config(str(ROOT / "configs" / "wan22_dit_lora_translator.toml"), values)
    with pytest.raises(UserError, match=reason) as raised:
        make_plan_document(loaded, None, 400.0)
    assert "expert" not in str(raised.value)


@pytest.mark.parametrize(
    ("checkpoint", "size", "multiple"), [("tiny_ti2v", 48, 32), ("tiny_t2v", 40, 16), ("tiny_i2v", 40, 16)]
)
def test_sizes_of_clips_that_the_variant_cannot_take(
    checkpoint, size, multiple, request, tmp_path, tiny_dataset, capsys
):
    """16 px are enough for A14B and not for the 5B."""
    workspace = make_workspace(tmp_path, request.getfixturevalue(checkpoint), tiny_dataset)
    expert = [] if checkpoint == "tiny_ti2v" else ["model.expert=low_noise"]
    text = f'size_buckets = [[64, {size}, 5]]\n[[directory]]\npath = "{workspace.media}"\n'
    (workspace.root / "dataset.toml").write_text(text)
    code = workspace.train("dit_lora", "max_steps=1", *expert)
    expected = f"size_buckets: height {size} of [64, {size}, 5] is not a positive multiple of {multiple}"
    check_refused(code, capsys.readouterr().err, expected)
