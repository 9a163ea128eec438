"""LoRA files of other programs: round trips are the identity, and diffusers and PEFT themselves read what is written."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from models.wan import lora_convert
from models.wan.lora_convert import convert_lora, read_wan_adapter
from models.wan.lora_dialects import DIALECTS, folded, to_dialect
from scripts import convert_lora as script
from utils.errors import UserError
from utils.lora_names import AdapterPair

WHOLE = [
    f"blocks.{block}.{path}"
    for block in range(2)
    for path in (
        *(f"{attention}.{projection}" for attention in ("self_attn", "cross_attn") for projection in "qkvo"),
        "ffn.0",
        "ffn.2",
    )
]
BAND = [f"blocks.{block}.cross_attn.{projection}" for block in (20, 21) for projection in "kv"]
WIDTH, HIDDEN = 24, 40


def sizes(module):
    if module.endswith("ffn.0"):
        return HIDDEN, WIDTH
    return (WIDTH, HIDDEN) if module.endswith("ffn.2") else (WIDTH, WIDTH)


def pairs(modules, rank=4, scale=1.0, dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    made = {}
    for module in modules:
        outs, ins = sizes(module)
        down = torch.randn(rank, ins, generator=random).to(dtype)
        up = torch.randn(outs, rank, generator=random).to(dtype)
        made[module] = AdapterPair(down, up, scale, "alpha")
    return made


def write(path, modules, dialect, metadata=None):
    made = to_dialect(modules, dialect)
    if made.peft_config is None:
        path = path.with_suffix(".safetensors")
        save_file(made.tensors, path, metadata)
    else:
        path.mkdir()
        save_file(made.tensors, path / "adapter_model.safetensors", metadata)
        (path / "adapter_config.json").write_text(made.peft_config)
    return path


def place(root, name, dialect):
    return root / name if dialect == "peft" else root / f"{name}.safetensors"


@settings(max_examples=25)
@given(
    way=st.lists(st.sampled_from(DIALECTS), min_size=1, max_size=4),
    modules=st.just(WHOLE) | st.lists(st.sampled_from(WHOLE), min_size=1, max_size=6, unique=True),
    rank=st.sampled_from([1, 3, 4, 32]),
    scale=st.sampled_from([1.0, 0.25, 2.0, 0.75, 1 / 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 100),
)
def test_round_trips_are_the_identity(tmp_path_factory, way, modules, rank, scale, dtype, seed):
    root = tmp_path_factory.mktemp("trip")
    original = pairs(modules, rank, scale, dtype, seed)
    at = write(root / "start", original, "comfyui", {"variant": "ti2v-5b"})
    first = load_file(at)
    for number, dialect in enumerate(way):
        target = place(root, str(number), dialect)
        if dialect == "kohya" and len(modules) < len(WHOLE):
            with pytest.raises(UserError, match="is not adapted"):  # diffusers could not read a part of them
                convert_lora(at, dialect, target)
            continue
        convert_lora(at, dialect, target)
        at = target
    convert_lora(at, "comfyui", root / "end.safetensors")
    last = load_file(root / "end.safetensors")
    assert last.keys() == first.keys() and all(torch.equal(first[key], last[key]) for key in first)
    assert read_wan_adapter(root / "end.safetensors").metadata == {"variant": "ti2v-5b"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_is_folded_exactly_where_it_is_a_power_of_two_and_else_in_float32(dtype):
    (pair,) = pairs(BAND[:1], scale=0.25, dtype=dtype).values()
    down, up = folded(pair)
    assert (
        up.dtype == dtype
        and torch.equal(up.double(), pair.up.double() * 0.25)
        and torch.equal(down, pair.down)
    )
    (pair,) = pairs(BAND[:1], scale=0.3, dtype=dtype).values()
    _, up = folded(pair)
    assert up.dtype == torch.float32
    assert torch.allclose(up.double(), pair.up.double() * 0.3, rtol=1e-7, atol=0)
    tiny = AdapterPair(torch.ones(1, 2), torch.full((2, 1), 6e-8, dtype=torch.float16), 0.25, "alpha")
    assert folded(tiny)[1].dtype == torch.float32  # float16 has no such small numbers


def test_kohya_is_refused_where_diffusers_could_not_read_it(tmp_path):
    for modules, words in (
        (BAND, "blocks.0.self_attn.q is not adapted"),
        (WHOLE[:-1], "blocks.1.ffn.2 is not adapted"),
        ([*WHOLE, "head.head"], "head.head has no place there"),
    ):
        path = write(tmp_path / words.split()[0], pairs(modules), "comfyui")
        with pytest.raises(UserError, match=words) as raised:
            convert_lora(path, "kohya", tmp_path / "kohya.safetensors")
        assert "--to comfyui" in str(raised.value) and not (tmp_path / "kohya.safetensors").exists()


def diffusers_reads(path):
    """What diffusers itself makes of a file: {its key: tensor}, without its prefix."""
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    state = WanLoraLoaderMixin.lora_state_dict(str(path.parent), weight_name=path.name)
    return {key.removeprefix("transformer."): value for key, value in state.items()}


@pytest.mark.parametrize(
    ("dialect", "modules"), [("comfyui", BAND), ("diffusers", BAND), ("kohya", WHOLE), ("comfyui", WHOLE)]
)
def test_diffusers_reads_what_is_written(tmp_path, dialect, modules):
    from models.wan.names import dit_to_diffusers

    made = pairs(modules, rank=4, scale=0.5)
    path = write(tmp_path / "adapter", made, dialect)
    state = diffusers_reads(path)
    assert len(state) == 2 * len(modules)
    for module, pair in made.items():
        down, up = (state[f"{dit_to_diffusers(module)}.lora_{part}.weight"] for part in "AB")
        # Its scale is what alpha / rank says, and ours is folded: the products are equal to the last bits.
        assert torch.allclose(
            up.double() @ down.double(), 0.5 * pair.up.double() @ pair.down.double(), rtol=1e-6
        )


def test_peft_reads_what_is_written(tmp_path):
    from peft import PeftModel
    from torch import nn

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Module() for _ in range(2))
    for block in model.blocks:
        block.cross_attn = Attention()
    made = {
        **pairs(
            ["blocks.0.cross_attn.k", "blocks.0.cross_attn.v", "blocks.1.cross_attn.k"], rank=4, scale=0.5
        ),
        **pairs(["blocks.1.cross_attn.v"], rank=2, scale=3.0),
    }
    inputs = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    before = {name: model.get_submodule(name)(inputs) for name in made}
    adapted = PeftModel.from_pretrained(model, write(tmp_path / "peft", made, "peft")).base_model.model
    for name, pair in made.items():
        added = adapted.get_submodule(name)(inputs) - before[name]
        assert torch.allclose(added, pair.scale * inputs @ pair.down.T @ pair.up.T, atol=1e-5)


def test_the_command(tmp_path, capsys):
    path = write(tmp_path / "adapter", pairs(BAND, scale=0.5), "comfyui")
    tensors = load_file(path)
    save_file({**tensors, **{f"diffusion_model.{module}.alpha": torch.tensor(2.0) for module in BAND}}, path)
    assert script.main([str(path), "--to", "diffusers", "--out", str(tmp_path / "d.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "4 modules, rank 4, as diffusers names them" in said and "scale 0.5 is folded into B" in said
    assert script.main([str(path), "--to", "diffusers", "--out", str(tmp_path / "d.safetensors")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert script.main([str(path), "--to", "diffusers", "--out", str(tmp_path / "d.bin")]) == 2
    assert script.main([str(path), "--to", "peft", "--out", str(tmp_path / "peft")]) == 0
    (tmp_path / "run").mkdir()
    for name in ("config.toml", "metrics.jsonl"):
        (tmp_path / "run" / name).touch()
    assert script.main([str(path), "--to", "peft", "--out", str(tmp_path / "run" / "peft")]) == 2
    assert "lies in the training run" in capsys.readouterr().err
    assert script.main([str(path), "--to", "peft", "--out", "/proc/peft"]) == 2
    assert capsys.readouterr().err.startswith("error: /proc/")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 4
    foreign = {
        "blocks.0.cross_attn.k_img.lora_A.weight": torch.ones(2, 4),
        "blocks.0.cross_attn.k_img.lora_B.weight": torch.ones(4, 2),
    }
    save_file(foreign, tmp_path / "foreign.safetensors")
    assert (
        script.main(
            [
                str(tmp_path / "foreign.safetensors"),
                "--to",
                "comfyui",
                "--out",
                str(tmp_path / "x.safetensors"),
            ]
        )
        == 2
    )
    assert "k_img is no linear layer of Wan 2.2" in capsys.readouterr().err


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_was_written_wrongly_gets_no_name(tmp_path, monkeypatch, dialect):
    """A fault of the writer: the file is read again and compared before it has its name."""
    path = write(tmp_path / "adapter", pairs(WHOLE), "comfyui")
    written = lora_convert._write

    def with_a_fault(directory, made, metadata):
        name = next(name for name in made.tensors if "lora_B" in name or "lora_up" in name)
        made.tensors[name] = made.tensors[name] + 1e-3
        written(directory, made, metadata)

    monkeypatch.setattr(lora_convert, "_write", with_a_fault)
    with pytest.raises(RuntimeError, match="differs from"):
        convert_lora(path, dialect, place(tmp_path, "out", dialect))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["adapter.safetensors"]
