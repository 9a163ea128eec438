"""What `expert = "both"` and `[adapter.<expert>]` resolve to, and what is refused of them."""

import pytest

from utils.config.dump import dump_config
from utils.config.experts import (
    EXPERTS,
    alternates,
    expert_of_turn,
    first_side,
    is_pair,
    settled,
    side_config,
    sides_of,
)
from utils.config.guardrails import RULES
from utils.config.load import load_config
from utils.config.parse import parse_table
from utils.config.rules import run_rules
from utils.config.schema import AdapterConfig, ExpertAdapterConfig, Problem, TrainConfig


def table(expert="both", adapter=None, model=None, **top):
    own = {} if expert is None else {"expert": expert}
    return {
        "output_dir": "output/x",
        "dataset": "configs/dataset.toml",
        "model": {
            "type": "wan",
            "ckpt_path": "ckpt",
            "cache_text_embeddings": True,
            "train_text_encoder": False,
            "freeze_transformer": True,
            **own,
            **(model or {}),
        },
        "adapter": adapter or {},
        "optimizer": {"lr": 1e-4},
    } | top


def config(*args, **values) -> TrainConfig:
    parsed = parse_table(TrainConfig, table(*args, **values))
    assert not parsed.problems
    return parsed.draft


def found_in(document) -> list[Problem]:
    parsed = parse_table(TrainConfig, document)
    return [*parsed.problems, *run_rules(RULES, parsed.draft, parsed.invalid)]


def adapters(adapter) -> list[AdapterConfig]:
    pair = config(adapter=adapter)
    found = [side_config(pair, expert).adapter for expert in EXPERTS]
    assert all(one is not None and one.high_noise is None and one.low_noise is None for one in found)
    return [one for one in found if one is not None]


def test_each_expert_has_its_own_values_and_else_the_common_ones():
    high, low = adapters(
        {
            "rank": 16,
            "exclude": ["cross_attn.v"],
            "high_noise": {"train_blocks_range": [0, 19], "exclude": []},
            "low_noise": {"rank": 8, "alpha": 4.0},
        }
    )
    assert (high.rank, high.alpha, high.train_blocks_range, high.exclude) == (16, None, (0, 19), ())
    assert (low.rank, low.alpha, low.train_blocks_range, low.exclude) == (8, 4.0, None, ("cross_attn.v",))


def test_exact_modules_and_filters_put_each_other_out_of_force():
    high, low = adapters(
        {
            "include": ["cross_attn.k"],
            "train_blocks_range": [2, 3],
            "high_noise": {"include_file": "list.txt"},
            "low_noise": {"rank": 8},
        }
    )
    assert (high.include_file, high.include, high.train_blocks_range) == (
        "list.txt",
        ("cross_attn.{k,v}",),
        None,
    )
    assert (low.include_file, low.include, low.train_blocks_range) == (None, ("cross_attn.k",), (2, 3))
    high, low = adapters({"include_file": "list.txt", "high_noise": {"train_blocks_range": [0, 1]}})
    assert (high.include_file, high.train_blocks_range) == (None, (0, 1))
    assert low.include_file == "list.txt"


def test_a_pairs_bounds_go_to_the_expert_on_whose_side_they_lie():
    pair = config(model={"min_t": 0.1, "max_t": 0.95})
    high, low = (side_config(pair, expert).model for expert in EXPERTS)
    assert (high.expert, high.min_t, high.max_t) == ("high_noise", 0.0, 0.95)
    assert (low.expert, low.min_t, low.max_t) == ("low_noise", 0.1, 1.0)
    alone = side_config(config("low_noise", model={"max_t": 0.5}), "low_noise").model
    assert alone.max_t == 0.5


def test_what_is_trained():
    assert sides_of(config("both")) == ("high_noise", "low_noise")
    assert sides_of(config("low_noise")) == ("low_noise",)
    assert sides_of(config(None)) == ()
    assert first_side(config("both").model).expert == "high_noise"
    assert first_side(config("low_noise").model).expert == "low_noise"


def test_one_experts_configuration_is_settled_when_loaded_and_a_pairs_is_not(tmp_path):
    for expert, rank in (("low_noise", 8), ("both", 16)):
        wanted = {"rank": 16, "low_noise": {"rank": 8}}
        path = tmp_path / f"{expert}.toml"
        path.write_text(dump_config(config(expert, adapter=wanted)), encoding="utf-8")
        loaded = load_config(path).train
        assert loaded.adapter is not None and loaded.adapter.rank == rank
        assert (loaded.adapter.low_noise is None) == (expert != "both")
        again = tmp_path / "again.toml"
        again.write_text(dump_config(loaded), encoding="utf-8")
        assert load_config(again).train == loaded
    assert settled(config(None)) == config(None)


def test_a_value_of_one_expert_can_be_set_on_the_command_line(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(dump_config(config("both")), encoding="utf-8")
    loaded = load_config(path, ["adapter.high_noise.rank=3"]).train
    assert loaded.adapter is not None and loaded.adapter.high_noise == ExpertAdapterConfig(rank=3)


@pytest.mark.parametrize(
    ("document", "key", "words"),
    [
        (
            table(None, {"high_noise": {"rank": 8}}),
            "adapter.high_noise",
            "model.expert is not set",
        ),
        (
            table("high_noise", {"low_noise": {"rank": 8}}),
            "adapter.low_noise",
            'model.expert is "high_noise"',
        ),
        (table("both", {"low_noise": {}}), "adapter.low_noise", "is empty"),
        (
            table("both", {"low_noise": {"include": ["self_attn.q"]}}, budget={"max_delta_ratio": 0.05}),
            "adapter.low_noise.include",
            "reaches self_attn",
        ),
        (
            table("both", {"high_noise": {"include": ["ffn.0"]}}),
            "adapter.high_noise.include",
            "reaches more than cross_attn",
        ),
        (
            table("low_noise", {"low_noise": {"train_blocks_range": [5, 2]}}),
            "adapter.low_noise.train_blocks_range",
            "first <= last",
        ),
        (
            table(
                "both",
                {
                    "include": ["self_attn.q"],
                    "rank": 8,
                    "self_attn_approval": {"reason": "shapes lose their outline", "blocks": [1]},
                    "low_noise": {"rank": 16},
                },
                budget={"max_delta_ratio": 0.05},
            ),
            "adapter.low_noise.rank",
            "may be at most 8",
        ),
        (
            table(
                "both",
                {"low_noise": {"include_file": "list.txt", "exclude": ["cross_attn.v"]}},
            ),
            "adapter.low_noise.exclude",
            "would be ignored",
        ),
        (table("both", {"rank": 8, "include": ["{"]}), "adapter.include", "without"),
    ],
)
def test_what_an_experts_table_may_not_say(document, key, words):
    (problem,) = found_in(document)
    assert problem.key == key and words in problem.reason
    assert problem.fix


@pytest.mark.parametrize(
    "document",
    [
        table("both", {"high_noise": {"rank": 8}, "low_noise": {"include": ["cross_attn.k"]}}),
        table("low_noise", {"low_noise": {"rank": 8}}),
        table(
            "both",
            {"low_noise": {"include": ["cross_attn.{k,v}", "ffn.0"]}},
            budget={"max_delta_ratio": 0.05},
        ),
        # What [adapter] itself would not be allowed is no harm where no expert has it.
        table(
            "both",
            {
                "include": ["self_attn.q"],
                "high_noise": {"include": ["cross_attn.k"]},
                "low_noise": {"include": ["cross_attn.v"]},
            },
        ),
    ],
)
def test_what_an_experts_table_may_say(document):
    assert found_in(document) == []


def test_one_encoder_is_trained_through_both_in_turn():
    document = table("both")
    del document["adapter"]
    document["model"] |= {"cache_text_embeddings": False, "train_text_encoder": True}
    assert found_in(document) == []
    encoder = parse_table(TrainConfig, document).draft
    assert alternates(encoder) and not is_pair(encoder)
    assert is_pair(config("both")) and not alternates(config("both"))
    assert [expert_of_turn(4, turn) for turn in range(3)] == ["high_noise", "low_noise", "high_noise"]
    assert [expert_of_turn(5, turn) for turn in range(3)] == ["low_noise", "high_noise", "low_noise"]
