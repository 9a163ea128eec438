import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from utils.config.schema import AdapterConfig, BudgetConfig
from utils.errors import UserError
from utils.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapters_off,
    add_lora,
    load_initial_adapter,
    parameter_names,
    save_adapter,
    scale_of,
)

NUM_BLOCKS, DIM = 6, 8
PATHS = [f"{attention}.{one}" for attention in ("self_attn", "cross_attn") for one in "qkvo"]
PATHS += ["ffn.0", "ffn.2"]
LINEARS = [f"blocks.{index}.{path}" for index in range(NUM_BLOCKS) for path in PATHS]
BUDGET = BudgetConfig()
KV = ["cross_attn.k", "cross_attn.v"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, states):
        return self.o(torch.tanh(self.q(states)) * self.k(states) + self.v(states))


class Block(nn.Module):
    """Named like a block of the DiT."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.self_attn, self.cross_attn = Attention(), Attention()
        self.ffn = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))

    def forward(self, states):
        return self.ffn(self.cross_attn(self.self_attn(states)))


def adapter_of(**values) -> AdapterConfig:
    return AdapterConfig(**({"rank": 4} | values))


def adapted_block(paths=KV, seed: int = 0, dtype=torch.float32, index: int = 0, **values) -> Block:
    block = Block()
    add_lora(block, index, paths, adapter_of(**values), dtype, seed)
    return block


# Putting adapters in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_nothing_bit_for_bit(dtype):
    states = torch.randn(5, DIM).to(dtype)
    plain = Block().to(dtype)
    adapted = Block().to(dtype)
    add_lora(adapted, 0, [*KV, "ffn.0"], adapter_of(alpha=13.0), torch.float32, seed=0)
    assert torch.equal(adapted(states), plain(states))


def test_a_step_changes_the_output_and_only_the_adapters():
    block = adapted_block()
    trained = {name for name, parameter in block.named_parameters() if parameter.requires_grad}
    assert trained == {name for path in KV for name in parameter_names(path)}
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    states = torch.randn(5, DIM)
    first = block(states)
    optimizer = torch.optim.AdamW([p for p in block.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # at the first step A has no gradient, because B is zero
        optimizer.zero_grad()
        block(states).square().sum().backward()
        optimizer.step()
    changed = {
        name for name, parameter in block.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert changed == trained
    assert not torch.equal(block(states), first)


def test_only_the_named_layers_are_wrapped():
    block = adapted_block(["cross_attn.k"])
    wrapped = {name for name, module in block.named_modules() if hasattr(module, "base_layer")}
    assert wrapped == {"cross_attn.k"}


def test_the_adapter_adds_alpha_over_rank_times_up_times_down():
    block, plain = adapted_block(["ffn.2"], alpha=6.0), Block()
    adapter = block.ffn[2]
    up = torch.randn(DIM, 4)
    adapter.lora_B["default"].weight.data = up
    down = adapter.lora_A["default"].weight.detach()
    states = torch.randn(5, DIM)
    expected = plain.ffn[2](states) + 1.5 * states @ down.T @ up.T
    torch.testing.assert_close(adapter(states), expected)


@pytest.mark.parametrize(("values", "scale"), [({}, 1.0), ({"alpha": 4.0}, 1.0), ({"alpha": 1.0}, 0.25)])
def test_scale(values, scale):
    assert scale_of(adapter_of(**values)) == scale


def down_of(block: Block, path: str) -> torch.Tensor:
    return block.get_parameter(parameter_names(path)[0]).detach()


def test_the_start_is_a_function_of_seed_and_name_alone():
    reference = down_of(adapted_block(KV), "cross_attn.v")
    # Whatever was drawn before, whichever other layers there are, in whatever order: as on another stage.
    torch.manual_seed(1234)
    block = Block(seed=7)
    add_lora(block, 0, ["ffn.0", "cross_attn.v"], adapter_of(), torch.float32, seed=0)
    assert torch.equal(down_of(block, "cross_attn.v"), reference)
    assert torch.equal(down_of(adapted_block(dtype=torch.bfloat16), "cross_attn.v"), reference.bfloat16())
    assert not torch.equal(down_of(adapted_block(seed=1), "cross_attn.v"), reference)
    assert not torch.equal(down_of(adapted_block(index=1), "cross_attn.v"), reference)
    assert not torch.equal(down_of(adapted_block(), "cross_attn.k"), reference)


def test_the_start_has_the_spread_of_a_linear_layers_start():
    down = down_of(adapted_block(rank=512), "cross_attn.k")
    bound = DIM**-0.5
    assert down.abs().max() <= bound
    assert down.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


# Files


def trained_values(targets, rank: int = 4, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for target in targets
        for name, shape in zip(parameter_names(target), ((rank, DIM), (DIM, rank)), strict=True)
    }


TARGETS = ["blocks.1.cross_attn.k", "blocks.1.cross_attn.v", "blocks.4.cross_attn.k"]


def test_a_saved_adapter_has_the_names_that_loaders_know_and_scale_one(tmp_path):
    trained = trained_values(TARGETS)
    paths = save_adapter(trained, TARGETS, adapter_of(alpha=10.0), tmp_path, {"variant": "ti2v-5b"})
    assert paths == [tmp_path / ADAPTER_WEIGHTS, tmp_path / ADAPTER_CONFIG]
    tensors = load_file(paths[0])
    assert set(tensors) == {
        f"diffusion_model.{target}.lora_{part}.weight" for target in TARGETS for part in "AB"
    }
    down_name, up_name = parameter_names(TARGETS[0])
    assert torch.equal(tensors[f"diffusion_model.{TARGETS[0]}.lora_A.weight"], trained[down_name])
    assert torch.equal(tensors[f"diffusion_model.{TARGETS[0]}.lora_B.weight"], trained[up_name] * 2.5)
    config = json.loads(paths[1].read_text())
    assert config["r"] == config["lora_alpha"] == 4
    assert config["target_modules"] == TARGETS
    assert config["peft_type"] == "LORA"
    with safe_open(paths[0], framework="pt") as file:
        assert file.metadata() == {"variant": "ti2v-5b"}


@pytest.mark.parametrize(
    ("saved_alpha", "alpha"), [(None, None), (8.0, 8.0), (8.0, None), (None, 2.0), (3.0, 7.0)]
)
def test_training_goes_on_from_a_saved_adapter_whatever_the_scales(saved_alpha, alpha, tmp_path):
    trained = trained_values(TARGETS)
    old, new = adapter_of(alpha=saved_alpha), adapter_of(alpha=alpha)
    save_adapter(trained, TARGETS, old, tmp_path, {})
    for path in (tmp_path, tmp_path / ADAPTER_WEIGHTS):
        initial = load_initial_adapter(path, TARGETS, new)
        assert initial.keys() == trained.keys()
        for target in TARGETS:
            down, up = parameter_names(target)
            assert torch.equal(initial[down], trained[down])
            before = scale_of(old) * trained[up] @ trained[down]
            torch.testing.assert_close(scale_of(new) * initial[up] @ initial[down], before)


def test_another_trainers_alpha_is_folded_in(tmp_path):
    down, up = torch.randn(4, DIM), torch.randn(DIM, 4)
    prefix = f"diffusion_model.{TARGETS[0]}"
    path = tmp_path / "adapter.safetensors"
    save_file(
        {
            f"{prefix}.lora_down.weight": down,
            f"{prefix}.lora_up.weight": up,
            f"{prefix}.alpha": torch.tensor(2.0),
        },
        path,
    )
    initial = load_initial_adapter(path, TARGETS[:1], adapter_of())
    assert torch.equal(initial[parameter_names(TARGETS[0])[1]], up * 0.5)


def test_an_adapter_in_bfloat16_is_taken_up_in_float32(tmp_path):
    save_adapter(trained_values(TARGETS, dtype=torch.bfloat16), TARGETS, adapter_of(), tmp_path, {})
    initial = load_initial_adapter(tmp_path, TARGETS, adapter_of())
    assert {tensor.dtype for tensor in initial.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("targets", "values", "message"),
    [
        (TARGETS[:2], {}, r"only there: \['blocks\.4\.cross_attn\.k'\]"),
        ([*TARGETS, "blocks.5.cross_attn.k"], {}, r"missing there: \['blocks\.5\.cross_attn\.k'\]"),
        (TARGETS, {"rank": 8}, r"has rank 4, adapter\.rank is 8"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(targets, values, message, tmp_path):
    save_adapter(trained_values(TARGETS), TARGETS, adapter_of(), tmp_path, {})
    with pytest.raises(UserError, match=message) as raised:
        load_initial_adapter(tmp_path, targets, adapter_of(**values))
    assert str(tmp_path) in str(raised.value)


def test_adapters_off_is_the_base_bit_for_bit_and_leaves_no_trace() -> None:
    states = torch.randn(3, DIM, generator=torch.Generator().manual_seed(5))
    base, block = Block(), adapted_block(dropout=0.5).train()
    for name, parameter in block.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    wanting = {name: parameter.requires_grad for name, parameter in block.named_parameters()}
    assert not torch.equal(block.eval()(states), base(states))
    with pytest.raises(KeyError), adapters_off(nn.Sequential(block)):
        assert torch.equal(block(states), base(states))
        raise KeyError
    assert {name: parameter.requires_grad for name, parameter in block.named_parameters()} == wanting
    assert sum(wanting.values()) == 4 and not torch.equal(block(states), base(states))
