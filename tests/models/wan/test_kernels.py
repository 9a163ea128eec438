"""Which attention is used where, and what is refused. No GPU is needed: what it would say is said for it."""

import sys
from types import SimpleNamespace

import pytest
import torch

from models.wan import kernels
from models.wan.attention import WanAttention, attend_by_torch
from models.wan.kernels import attend_of, attention_in_use, check_device
from utils.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """`machine((9, 0), "flash_attn", ...)`: a GPU of this compute capability, and which packages are installed."""

    def make(capability, *packages):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(
            "models.wan.kernels._imported", lambda name: object() if name in packages else None
        )

    return make


@pytest.mark.parametrize(
    ("capability", "packages", "expected"),
    [
        ((9, 0), ("flash_attn_interface", "flash_attn"), "flash_attn_3"),
        ((9, 0), ("flash_attn",), "flash_attn_2"),
        ((9, 0), (), "torch"),
        ((8, 0), ("flash_attn_interface", "flash_attn"), "flash_attn_2"),
        ((10, 0), ("flash_attn_interface",), "torch"),
        ((7, 5), ("flash_attn_interface", "flash_attn"), "torch"),
    ],
)
def test_auto_is_the_fastest_that_is_there_and_made_for_the_gpu(
    machine, make_config, capability, packages, expected
):
    def used(device=GPU, compile=False, **model):
        config = make_config("dit_lora", model={"dtype": "bfloat16"} | model, compile=compile)
        return attention_in_use(config, device)

    machine(capability, *packages)
    assert used() == expected
    assert used(dtype="float32") == used(CPU) == used(attention="torch") == used(compile=True) == "torch"
    assert used(attention="flash_attn_2", compile=True) == "flash_attn_2"


@pytest.mark.parametrize(
    ("capability", "packages", "device", "reason"),
    [
        ((9, 0), ("flash_attn_interface",), CPU, "is for GPUs, and this run has none"),
        ((8, 0), ("flash_attn_interface",), GPU, "is not made for Some GPU"),
        ((9, 0), ("flash_attn",), GPU, "cannot be used: flash_attn_interface is not installed, or"),
    ],
)
def test_a_kernel_that_cannot_be_used_is_refused_by_name(
    machine, make_config, capability, packages, device, reason
):
    machine(capability, *packages)
    config = make_config("dit_lora", model={"dtype": "bfloat16", "attention": "flash_attn_3"})
    with pytest.raises(UserError, match=rf'model\.attention: is "flash_attn_3", which {reason}.*"auto"'):
        check_device(config, device)


def test_products_in_8_bits_need_a_gpu_that_has_them(machine, make_config):
    model = {"dtype": "bfloat16", "transformer_dtype": "float8", "transformer_compute": "float8"}
    config = make_config("dit_lora", model=model)
    machine((8, 0))
    with pytest.raises(
        UserError, match=r"model\.transformer_compute: .*Some GPU \(compute capability 8\.0\)"
    ):
        check_device(config, GPU)
    machine((8, 9))
    check_device(config, GPU)
    check_device(config, CPU)


def test_compiling_asks_for_a_compiler(make_config, monkeypatch, tmp_path):
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    check_device(make_config("dit_lora"), CPU)
    with pytest.raises(UserError, match="compile: is true"):
        check_device(make_config("dit_lora", compile=True), CPU)


@pytest.mark.parametrize("with_sums", [False, True])
def test_flash_attention_gets_what_torch_gets(make_config, monkeypatch, with_sums):
    """By a stand-in that has the arguments of `flash_attn_func` and computes by the formula."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernels._imported.cache_clear()
    calls = []

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        calls.append(q.shape)
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        weights = (torch.einsum("bsnk,blnk->bnsl", q, k) * scale).softmax(-1)
        mixed = torch.einsum("bnsl,blnk->bsnk", weights, v)
        return (mixed, weights.sum(-1)) if with_sums else mixed

    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=flash_attn_func))
    torch.manual_seed(0)
    attention = WanAttention(64, 4, 1e-6, torch.float32)
    states, text = torch.randn(2, 10, 64), torch.randn(2, 7, 64)
    expected = attention(states, text, None)
    attention.attend = attend_of(make_config("dit_lora", model={"dtype": "bfloat16"}), GPU)
    torch.testing.assert_close(attention(states, text, None), expected, rtol=1e-5, atol=1e-6)
    assert calls == [(2, 10, 4, 16)]
    kernels._imported.cache_clear()


@pytest.mark.parametrize("error", [ImportError("undefined symbol"), OSError("libcudart.so: cannot open")])
def test_a_package_that_was_built_for_another_torch_is_passed_over(make_config, monkeypatch, error):
    def broken(name):
        raise error

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels.importlib, "import_module", broken)
    kernels._imported.cache_clear()
    config = make_config("dit_lora", model={"dtype": "bfloat16"})
    assert attention_in_use(config, GPU) == "torch" and attend_of(config, GPU) is attend_by_torch
    named = make_config("dit_lora", model={"dtype": "bfloat16", "attention": "flash_attn_2"})
    with pytest.raises(UserError, match=r"flash_attn is not installed, or does not fit this torch"):
        check_device(named, GPU)
    kernels._imported.cache_clear()


def test_torch_is_the_reference(make_config, build_layers, open_tiny, tiny_ti2v):
    for name in ("auto", "torch"):
        _, layers = build_layers(make_config("dit_lora", model={"attention": name}), open_tiny(tiny_ti2v), [])
        attentions = [module for module in layers.modules() if isinstance(module, WanAttention)]
        assert len(attentions) == 8 and all(one.attend is attend_by_torch for one in attentions)
