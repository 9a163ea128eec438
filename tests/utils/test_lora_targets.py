import pytest

from utils.config.schema import AdapterConfig, BudgetConfig, SelfAttnApproval
from utils.errors import UserError
from utils.lora_targets import describe_targets, resolve_targets, split_block_path

NUM_BLOCKS = 6
PATHS = [f"{attention}.{one}" for attention in ("self_attn", "cross_attn") for one in "qkvo"]
PATHS += ["ffn.0", "ffn.2"]
LINEARS = [f"blocks.{index}.{path}" for index in range(NUM_BLOCKS) for path in PATHS]
BUDGET = BudgetConfig()
KV = ["cross_attn.k", "cross_attn.v"]


def adapter_of(**values) -> AdapterConfig:
    return AdapterConfig(**({"rank": 4} | values))


def test_cross_attention_keys_and_values_are_the_default():
    targets = resolve_targets(LINEARS, adapter_of(), None)
    assert targets == [f"blocks.{index}.{path}" for index in range(NUM_BLOCKS) for path in KV]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"include": ("cross_attn.k",)}, {(index, "cross_attn.k") for index in range(6)}),
        ({"train_blocks_range": (2, 3)}, {(index, path) for index in (2, 3) for path in KV}),
        ({"train_blocks_range": (5, 5)}, {(5, path) for path in KV}),
        (
            {"include": ("cross_attn.*",), "exclude": ("cross_attn.{q,o}",)},
            {(i, p) for i in range(6) for p in KV},
        ),
        ({"include": ("ffn.?",), "train_blocks_range": (0, 0)}, {(0, "ffn.0"), (0, "ffn.2")}),
        (
            {"include": ("*",), "exclude": ("self_attn.*", "ffn.*"), "train_blocks_range": (1, 1)},
            {(1, f"cross_attn.{one}") for one in "qkvo"},
        ),
    ],
)
def test_filters_choose_the_targets_in_model_order(values, expected):
    targets = resolve_targets(LINEARS, adapter_of(**values), BUDGET)
    assert set(map(split_block_path, targets)) == expected
    assert targets == sorted(targets, key=LINEARS.index)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"include": ("cross_attn.x",)}, r'"cross_attn\.x" matches no module'),
        ({"include": ("cross_attn.{k,w}",)}, r'"cross_attn\.w"\) matches no module'),
        ({"exclude": ("ff.*",)}, r'exclude: pattern "ff\.\*" matches no module'),
        ({"exclude": ("cross_attn.*",)}, "leave no module to adapt"),
        ({"train_blocks_range": (4, 6)}, r"\[4, 6\]: the checkpoint's blocks are 0 \.\. 5"),
        ({"include": ("self_attn.k",)}, "self_attn_approval"),
    ],
)
def test_filters_that_cannot_be_meant_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        resolve_targets(LINEARS, adapter_of(**values), BUDGET)


def test_other_targets_than_keys_and_values_need_a_budget():
    adapter = adapter_of(include=("cross_attn.{k,v}", "ffn.0"))
    with pytest.raises(UserError, match="delta budget"):
        resolve_targets(LINEARS, adapter, None)
    assert len(resolve_targets(LINEARS, adapter, BUDGET)) == 3 * NUM_BLOCKS


def test_self_attention_is_adapted_in_approved_blocks_only():
    approval = SelfAttnApproval(reason="the shapes drift apart", blocks=(1, 4))
    adapter = adapter_of(include=("cross_attn.k", "self_attn.v"), self_attn_approval=approval)
    targets = resolve_targets(LINEARS, adapter, BUDGET)
    assert {name for name in targets if "self_attn" in name} == {
        f"blocks.{index}.self_attn.v" for index in (1, 4)
    }
    assert sum("cross_attn" in name for name in targets) == NUM_BLOCKS


def test_an_approval_of_a_block_that_does_not_exist_is_refused():
    approval = SelfAttnApproval(reason="the shapes drift apart", blocks=(1, 40))
    adapter = adapter_of(include=("self_attn.v",), self_attn_approval=approval)
    with pytest.raises(UserError, match="names block 40"):
        resolve_targets(LINEARS, adapter, BUDGET)


def write_lines(tmp_path, *lines) -> str:
    path = tmp_path / "targets.txt"
    path.write_text("\n".join(lines))
    return str(path)


def test_a_file_names_exact_modules(tmp_path):
    lines = ["# chosen by hand", "", "blocks.4.cross_attn.v.weight", "  blocks.0.cross_attn.k  "]
    adapter = adapter_of(include_file=write_lines(tmp_path, *lines))
    assert resolve_targets(LINEARS, adapter, None) == ["blocks.0.cross_attn.k", "blocks.4.cross_attn.v"]


def test_a_line_that_names_no_module_is_refused_by_name(tmp_path):
    adapter = adapter_of(
        include_file=write_lines(tmp_path, "blocks.0.cross_attn.k", "blocks.77.cross_attn.k")
    )
    with pytest.raises(UserError, match=r"1 of 2 lines.*blocks\.77\.cross_attn\.k"):
        resolve_targets(LINEARS, adapter, None)


def test_guardrails_hold_for_a_file_too(tmp_path):
    path = write_lines(tmp_path, "blocks.2.self_attn.k")
    with pytest.raises(UserError, match="self_attn"):
        resolve_targets(LINEARS, adapter_of(include_file=path), BUDGET)
    approval = SelfAttnApproval(reason="the shapes drift apart", blocks=(3,))
    with pytest.raises(UserError, match=r"approved only for blocks \[3\]"):
        resolve_targets(LINEARS, adapter_of(include_file=path, self_attn_approval=approval), BUDGET)


def test_an_empty_list_is_refused(tmp_path):
    with pytest.raises(UserError, match="no module is left"):
        resolve_targets(LINEARS, adapter_of(include_file=write_lines(tmp_path, "# nothing")), None)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_list_that_cannot_be_read_is_named(content, tmp_path):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"list\.txt.*cannot be read"):
        resolve_targets(LINEARS, adapter_of(include_file=str(path)), None)


@pytest.mark.parametrize("module", ["text_embedding.0", "blocks.x.ffn.0", "blocks.3"])
def test_a_module_outside_the_blocks_is_refused(module):
    with pytest.raises(UserError, match="inside blocks"):
        split_block_path(module)


def test_targets_are_described_by_path_with_their_blocks():
    targets = [f"blocks.{index}.cross_attn.k" for index in (0, 1, 2, 5)] + ["blocks.3.ffn.0"]
    assert describe_targets(targets) == ["cross_attn.k in blocks 0-2, 5", "ffn.0 in blocks 3"]
