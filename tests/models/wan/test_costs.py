"""FLOPs against torch's own counter, on the meta device: no weight of the published sizes is ever made."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count

from models.wan import costs
from models.wan.component_shapes import Umt5Sizes
from models.wan.text_encoder import build_umt5_block, umt5_config
from models.wan.transformer import WanBlock, WanEmbedding, WanHead

A14B = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "text_dim": 4096}
SIZES = {
    "TI2V-5B": ("ti2v", {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "text_dim": 4096}),
    "T2V-A14B": ("t2v", A14B),
    "I2V-A14B": ("i2v", A14B),
    "narrow": ("t2v", {"dim": 64, "ffn_dim": 96, "num_heads": 2}),
}
# The counter knows the backward of attention on GPUs; that on a CPU has the same products.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *rest, out_shape=None, **named: sdpa_backward_flop_count(
            grad, query, key, value
        )
    )
}
GRID = (3, 4, 5)
NUM_TOKENS = 60


def count(module: torch.nn.Module, *inputs) -> int:
    """FLOPs of one call; attention as two matrix products, which is what the counter knows on every device."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(*inputs)
    return counter.get_total_flops()


@pytest.fixture(params=SIZES.values(), ids=SIZES)
def arch(request, make_arch):
    model_type, sizes = request.param
    return make_arch(model_type, **sizes)


def test_a_dit_block(arch):
    with torch.device("meta"):
        block = WanBlock(arch, torch.float32)
        hidden = torch.empty(1, *GRID, arch.dim)
        text = torch.empty(1, arch.text_len, arch.dim)
        modulation = torch.empty(1, 1, 6, arch.dim)
    assert count(block, hidden, modulation, text) == costs.dit_block_flops(arch, NUM_TOKENS)


@pytest.mark.parametrize("hidden_wants", [False, True])
@pytest.mark.parametrize(
    "path",
    ["", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.o", "ffn.0", "ffn.2"],
)
def test_the_backward_of_a_dit_block(path, hidden_wants, make_arch):
    """Against the counter, with a bias in the place of an adapter: its gradient costs no product."""
    arch = make_arch("t2v", dim=64, ffn_dim=96, num_heads=2)
    block = WanBlock(arch, torch.float32).requires_grad_(False)
    if path:
        block.get_parameter(f"{path}.bias").requires_grad_(True)
    hidden = torch.randn(1, *GRID, arch.dim, requires_grad=hidden_wants)
    text, modulation = torch.randn(1, arch.text_len, arch.dim), torch.randn(1, 1, 6, arch.dim)
    counted = 0
    if path or hidden_wants:
        output = block(hidden, modulation, text)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            output.sum().backward()
        counted = counter.get_total_flops()
    expected = costs.dit_block_backward_flops(
        arch, NUM_TOKENS, [path], hidden_wants_gradient=hidden_wants, text_wants_gradient=False
    )
    assert counted == expected


def test_the_embedding(arch):
    frames, rows, columns = GRID
    with torch.device("meta"):
        embedding = WanEmbedding(arch, torch.float32, torch.float32)
        latents = torch.empty(1, arch.in_dim, frames, 2 * rows, 2 * columns)
        text = torch.empty(1, 20, arch.text_dim)
    embedding.forward = embedding.embed
    for time_rows in (1, frames):
        timesteps = torch.empty(1, time_rows, device="meta")
        expected = costs.dit_input_flops(arch, NUM_TOKENS, time_rows)
        assert count(embedding, latents, timesteps, text) == expected


def test_what_depends_on_the_text_alone(arch):
    with torch.device("meta"):
        embedding, block = WanEmbedding(arch, torch.float32, torch.float32), WanBlock(arch, torch.float32)
        states, text = torch.empty(1, 20, arch.text_dim), torch.empty(1, arch.text_len, arch.dim)
    embedding.forward = embedding.embed_text
    attention = block.cross_attn
    attention.forward = attention.keys_and_values
    counted = count(embedding, states) + arch.num_layers * count(attention, text, None)
    assert counted == costs.dit_text_flops(arch)


def test_the_head(arch):
    with torch.device("meta"):
        head = WanHead(arch)
        hidden = torch.empty(1, *GRID, arch.dim)
        time = torch.empty(1, 1, arch.dim)
    assert count(head, hidden, time) == costs.dit_head_flops(arch, NUM_TOKENS)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "sizes",
    [
        Umt5Sizes(
            vocab_size=256384, d_model=4096, num_heads=64, d_kv=64, d_ff=10240, num_layers=24, num_buckets=32
        ),
        Umt5Sizes(vocab_size=40, d_model=24, num_heads=3, d_kv=16, d_ff=40, num_layers=2, num_buckets=32),
    ],
    ids=["XXL", "narrow"],
)
def test_a_umt5_block(sizes, attention):
    with torch.device("meta"):
        block = build_umt5_block(umt5_config(sizes, attention), 0)
        states = torch.empty(1, 37, sizes.d_model)
        mask = torch.zeros(1, 1, 1, 37)
    assert count(block, states, mask) == costs.umt5_block_flops(sizes, 37)


def test_the_whole_of_ti2v_at_a_usual_size(make_arch):
    """5070 tokens are 49 frames of 480 x 832; the figure for all blocks was computed from the published sizes: 55.0 TFLOP."""
    arch = make_arch("ti2v", dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, text_dim=4096)
    assert 30 * costs.dit_block_flops(arch, 5070) == pytest.approx(55.0e12, rel=0.002)
