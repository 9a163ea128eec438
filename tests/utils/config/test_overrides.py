import datetime

import pytest

from utils.config.overrides import apply_overrides, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("0", 0),
        ("2e-5", 2e-5),
        ("true", True),
        ("[20, 29]", [20, 29]),
        ('"8"', "8"),
        ("{rank = 8}", {"rank": 8}),
        ("2024-01-01", datetime.date(2024, 1, 1)),
        ("output/te/text_encoder.safetensors", "output/te/text_encoder.safetensors"),
        ("bfloat16", "bfloat16"),
        ("True", "True"),
        ("[1, 2", "[1, 2"),
        ("", ""),
        ("a=b", "a=b"),
        ("1\nseed = 5", "1\nseed = 5"),
        ("8 # eight", 8),
        ("[" * 5000, "[" * 5000),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_a_value_is_toml_or_else_a_plain_string(text, value) -> None:
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_values_are_set_tables_are_made_and_the_last_one_wins() -> None:
    table = {"epochs": 1, "adapter": {"rank": 16}}
    done = apply_overrides(
        table, ["adapter.rank=8", " adapter.dropout = 0.1", "budget.action=stop", "epochs=2", "epochs=3"]
    )
    assert done.problems == ()
    assert done.table == {"epochs": 3, "adapter": {"rank": 8, "dropout": 0.1}, "budget": {"action": "stop"}}
    assert done.keys == {"adapter.rank", "adapter.dropout", "budget.action", "epochs"}
    assert table == {"epochs": 1, "adapter": {"rank": 16}}


def test_a_value_may_hold_equals_signs() -> None:
    assert apply_overrides({}, ["model.ckpt_path=a=b"]).table == {"model": {"ckpt_path": "a=b"}}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("epochs", "write key=value"),
        ("=3", "write key=value"),
        ("", "write key=value"),
        ("a..b=3", "is no dotted key"),
        ("a b=3", "is no dotted key"),
        ("'a'.b=3", "is no dotted key"),
        ("directory[0].path=x", "inside a list"),
        ("directory.path=x", "inside a list"),
        ("dataset.resolutions=[256]", "--set dataset=FILE"),
        ("epochs.x=3", "epochs is a value, not a table"),
        ("epochs.x.y=3", "epochs is a value, not a table"),
    ],
)
def test_what_cannot_be_set_is_a_problem_and_changes_nothing(override, words) -> None:
    table = {"epochs": 1, "dataset": "configs/dataset.toml", "directory": [{"path": "a"}]}
    done = apply_overrides(table, [override, "epochs=7"])
    assert done.table == table | {"epochs": 7} and done.keys == {"epochs"}
    (problem,) = done.problems
    assert problem.file == "--set" and words in str(problem)
