import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from utils.errors import UserError
from utils.lora_names import (
    AdapterTensor,
    adapter_key,
    kohya_aliases,
    pair_adapter_keys,
    parse_adapter_key,
    read_adapter,
)

MODULES = [
    f"blocks.{block}.{path}"
    for block in (0, 3, 13)
    for path in (
        *(f"{attention}.{projection}" for attention in ("self_attn", "cross_attn") for projection in "qkvo"),
        "ffn.0",
        "ffn.2",
    )
] + ["text_embedding.0", "head.head"]
K = "blocks.3.cross_attn.k"


@pytest.mark.parametrize("module", MODULES)
def test_every_naming_gives_the_official_path(module):
    aliases = kohya_aliases(MODULES)
    flat = module.replace(".", "_")
    for key, part in {
        f"diffusion_model.{module}.lora_A.weight": "A",
        f"diffusion_model.{module}.lora_B.weight": "B",
        f"diffusion_model.{module}.lora_down.weight": "A",
        f"diffusion_model.{module}.lora_up.weight": "B",
        f"diffusion_model.{module}.alpha": "alpha",
        f"model.diffusion_model.{module}.lora_A.weight": "A",
        f"base_model.model.{module}.lora_A.weight": "A",
        f"base_model.model.{module}.lora_B.default.weight": "B",
        f"base_model.model.{module}.lora_A.my_adapter.weight": "A",
        f"transformer.{module}.lora_A.weight": "A",
        f"{module}.lora_A.default.weight": "A",
        f"{module}.lora.down.weight": "A",
        f"{module}.lora.up.weight": "B",
        f"lora_unet_{flat}.lora_down.weight": "A",
        f"lora_unet_{flat}.lora_up.weight": "B",
        f"lora_unet_{flat}.alpha": "alpha",
    }.items():
        assert parse_adapter_key(key, aliases) == AdapterTensor(key, module, part)


@pytest.mark.parametrize("part", ["A", "B", "alpha"])
def test_default_names_are_read_back(part):
    key = adapter_key(K, part)
    assert parse_adapter_key(key) == AdapterTensor(key, K, part)
    assert adapter_key(K, "A") == "diffusion_model.blocks.3.cross_attn.k.lora_A.weight"
    assert adapter_key(K, "alpha") == "diffusion_model.blocks.3.cross_attn.k.alpha"


def test_names_of_another_model_are_translated_by_aliases():
    key = "transformer.blocks.3.attn2.to_k.lora_A.weight"
    assert parse_adapter_key(key, {"blocks.3.attn2.to_k": K}) == AdapterTensor(key, K, "A")
    assert parse_adapter_key(key) == AdapterTensor(key, "blocks.3.attn2.to_k", "A")


def test_modules_that_kohya_cannot_tell_apart_are_an_error():
    with pytest.raises(ValueError, match="one name"):
        kohya_aliases(["a.b_c", "a_b.c"])


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector", "DoRA"),
        ("lora_magnitude_vector.default.weight", "DoRA"),
        ("lokr_w1", "LoKr"),
        ("lokr_w2_a", "LoKr"),
        ("lokr_t2", "LoKr"),
        ("hada_w1_a", "LoHa"),
        ("oft_blocks", "OFT"),
        ("ia3_l.weight", "IA"),
        ("lora_mid.weight", "LoCon"),
        ("lora_B.bias", "bias"),
        ("lora_B.default.bias", "bias"),
        ("lora_embedding_A.default", "embedding"),
        ("diff", "full difference"),
        ("diff_b", "full difference"),
    ],
)
def test_other_kinds_of_adapter_are_refused_by_name(leaf, kind):
    key = f"diffusion_model.{K}.{leaf}"
    with pytest.raises(UserError, match=rf"{kind}.* not supported"):
        parse_adapter_key(key)
    with pytest.raises(UserError, match=rf"^file: .*{kind}"):
        pair_adapter_keys([adapter_key(K, "A"), adapter_key(K, "B"), key], "file")


@pytest.mark.parametrize(
    "key", ["", ".", "alpha", "lora_A.weight", f"{K}.weight", f"{K}.lora_C.weight", f"{K}.lora_A", "\n.alpha"]
)
def test_a_name_that_is_none_of_a_lora(key):
    assert parse_adapter_key(key) is None


def test_pairs_are_sorted_by_module():
    keys = [adapter_key(module, part) for module in MODULES[:2] for part in ("B", "A")] + [
        adapter_key(MODULES[1], "alpha")
    ]
    pairs = pair_adapter_keys(keys, "file")
    assert list(pairs) == MODULES[:2]
    assert pairs[MODULES[0]].alpha is None
    assert (pairs[MODULES[1]].a, pairs[MODULES[1]].b, pairs[MODULES[1]].alpha) == (keys[3], keys[2], keys[4])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "holds no LoRA tensor .it is empty"),
        ([f"{K}.weight", f"{K}.bias"], f"full weights such as {K}"),
        ([adapter_key(K, "A")], f"missing for {K}"),
        ([adapter_key(K, "alpha")], f"missing for {K}"),
        (
            [adapter_key(K, "A"), adapter_key(K, "B"), "spare.weight"],
            "spare.weight are not tensors of a LoRA",
        ),
        (
            [adapter_key(K, "A"), adapter_key(K, "B"), f"base_model.model.{K}.lora_A.weight"],
            f"both the A of {K}",
        ),
    ],
)
def test_a_list_of_names_that_is_no_adapter_is_refused(keys, message):
    with pytest.raises(UserError, match=message) as refused:
        pair_adapter_keys(keys, "file")
    assert str(refused.value).startswith("file: ")


def tensors_of(rank=4, module=K, alpha=None, **changes):
    tensors = {adapter_key(module, "A"): torch.ones(rank, 6), adapter_key(module, "B"): torch.ones(8, rank)}
    if alpha is not None:
        tensors[adapter_key(module, "alpha")] = torch.as_tensor(alpha, dtype=torch.float32)
    return tensors | {adapter_key(module, part): tensor for part, tensor in changes.items()}


def save(directory, tensors, config=None, name="adapter_model.safetensors"):
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / name, metadata={"made_by": "a test"})
    if config is not None:
        (directory / "adapter_config.json").write_text(
            config if isinstance(config, str) else json.dumps(config)
        )
    return directory / name


def test_reading_a_file_or_its_directory(tmp_path):
    path = save(tmp_path / "adapter", tensors_of(rank=4))
    for place in (path, path.parent):
        adapter = read_adapter(place)
        assert (adapter.path, adapter.metadata, list(adapter.modules)) == (path, {"made_by": "a test"}, [K])
        pair = adapter.modules[K]
        assert (pair.down.shape, pair.up.shape, pair.rank) == ((4, 6), (8, 4), 4)
        assert (pair.scale, pair.scale_source) == (1.0, "none")


@pytest.mark.parametrize(
    ("alpha", "config", "scale", "source"),
    [
        (2, None, 0.5, "alpha"),
        (2, {"lora_alpha": 8}, 0.5, "alpha"),
        (None, {"r": 4, "lora_alpha": 8}, 2.0, "adapter_config.json"),
        (None, {"r": 16, "lora_alpha": 4}, 1.0, "adapter_config.json"),
        (None, {"lora_alpha": 8, "use_rslora": True}, 4.0, "adapter_config.json"),
        (None, {"lora_alpha": 8, "alpha_pattern": {"cross_attn.k": 2}}, 0.5, "adapter_config.json"),
        (None, {"lora_alpha": 8, "alpha_pattern": {"attn.k": 2}}, 2.0, "adapter_config.json"),
        (None, {"peft_type": "LORA"}, 1.0, "none"),
    ],
)
def test_where_the_scale_comes_from(tmp_path, alpha, config, scale, source):
    pair = read_adapter(save(tmp_path, tensors_of(rank=4, alpha=alpha), config)).modules[K]
    assert (pair.scale, pair.scale_source) == (scale, source)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_peft_saves_is_read_as_peft_means_it(tmp_path, use_rslora):
    """Against peft's own difference of weights, not against names and scales of our own making."""
    from peft import LoraConfig, get_peft_model

    block = torch.nn.ModuleDict(
        {"cross_attn": torch.nn.ModuleDict({name: torch.nn.Linear(6, 8) for name in "qkvo"})}
    )
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([block])
    config = LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=["cross_attn.k", "cross_attn.v", "cross_attn.o"],
        rank_pattern={"cross_attn.o": 2},
        alpha_pattern={"cross_attn.v": 16},
        use_rslora=use_rslora,
    )
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert sorted(adapter.modules) == [f"blocks.0.cross_attn.{name}" for name in "kov"]
    for module, pair in adapter.modules.items():
        expected = wrapped.base_model.model.get_submodule(module).get_delta_weight("default")
        assert torch.allclose(pair.scale * pair.up @ pair.down, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not readable as JSON"),
        ([], "not a PEFT"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_alpha": "strong"}, "lora_alpha"),
        ({"lora_alpha": [1]}, "lora_alpha"),
        ({"lora_alpha": 1, "alpha_pattern": {"(": 2}}, "alpha_pattern"),
        ({"lora_alpha": 1, "alpha_pattern": 3}, "alpha_pattern"),
        ('{"lora_alpha": NaN}', "finite"),
    ],
)
def test_a_config_beside_the_adapter_that_cannot_be_used_is_refused(tmp_path, config, message):
    with pytest.raises(UserError, match=rf"adapter_config\.json: .*{message}"):
        read_adapter(save(tmp_path, tensors_of(), config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"B": torch.ones(8, 3)}, r"A is \[4, 6\] and B is \[8, 3\]"),
        ({"A": torch.ones(4), "B": torch.ones(8)}, r"should be \[rank, in\]"),
        ({"A": torch.ones(0, 6), "B": torch.ones(8, 0)}, r"should be \[rank, in\]"),
        ({"A": torch.tensor([[float("nan")] * 6] * 4)}, "NaN"),
        ({"B": torch.tensor([[float("inf")] * 4] * 8)}, "infinite"),
        ({"A": torch.ones(4, 6, dtype=torch.int8)}, "int8"),
        ({"alpha": torch.ones(2)}, "single number"),
        ({"alpha": torch.tensor(float("nan"))}, "NaN"),
    ],
)
def test_tensors_that_cannot_be_an_adapter_are_refused(tmp_path, changes, message):
    path = save(tmp_path, tensors_of(**changes))
    with pytest.raises(UserError, match=message) as refused:
        read_adapter(path)
    assert str(path) in str(refused.value) and K in str(refused.value)


def test_damaged_files_are_refused_in_words(tmp_path):
    path = save(tmp_path, tensors_of())
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for content in (
        b"",
        whole[:4],
        whole[: 8 + length // 2],
        whole[:-1],
        struct.pack("<Q", 2**60) + whole[8:],
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
            read_adapter(path)


def test_only_safetensors_are_read(tmp_path):
    path = tmp_path / "adapter.bin"
    path.touch()
    with pytest.raises(UserError, match=r"\.safetensors files only"):
        read_adapter(path)


def test_names_are_parsed_without_torch():
    """So that what only looks at headers starts at once."""
    code = "import sys, utils.lora_names; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0
