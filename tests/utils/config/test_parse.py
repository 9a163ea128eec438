# ruff: noqa: RUF009 (`option` is a `dataclasses.field`)

from dataclasses import dataclass
from typing import Literal

import pytest

from utils.config.parse import parse_table
from utils.config.schema import DatasetConfig, Problem, TrainConfig, option


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = option("Size.", ge=1)
    ratios: tuple[float, ...] = option("Ratios.", (0.5,), gt=0.0, le=1.0)


@dataclass(frozen=True, kw_only=True)
class Item:
    path: str = option("Path.")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str = option("Name.", alias="title")
    count: int = option("Count.", 3, ge=0)
    factor: float = option("Factor.", 1.0)
    is_on: bool = option("Switch.", True)
    kind: Literal["red", "green"] = option("Colour.", "red")
    weight: float | Literal["auto"] = option("Weight.", "auto", ge=0.0)
    note: str = option("Note.", "")
    folder: str | None = option("Folder.", None)
    grid: tuple[tuple[int, ...], ...] | None = option("Grid.", None)
    inner: Inner = option("Inner.")
    extra: Inner | None = option("Extra.", None)
    item: tuple[Item, ...] = option("Items.", ())


def outer(**changes):
    table = {"name": "shapes", "inner": {"size": 2}}
    return {key: value for key, value in (table | changes).items() if value is not None}


def problems_of(table, **kwargs) -> dict[str, Problem]:
    parsed = parse_table(Outer, table, **kwargs)
    assert parsed.value is None
    assert len({problem.key for problem in parsed.problems}) == len(parsed.problems)
    return {problem.key: problem for problem in parsed.problems}


def test_a_good_table_becomes_the_record_with_defaults_tuples_and_floats() -> None:
    table = outer(
        factor=2,
        grid=[[1, 2], [3]],
        item=[{"path": "a"}, {"path": "b"}],
        inner={"size": 1, "ratios": [1, 0.25]},
    )
    parsed = parse_table(Outer, table)
    assert parsed.problems == () and parsed.invalid == frozenset()
    assert parsed.value == Outer(
        name="shapes",
        factor=2.0,
        grid=((1, 2), (3,)),
        inner=Inner(size=1, ratios=(1.0, 0.25)),
        item=(Item(path="a"), Item(path="b")),
    )
    assert type(parsed.value.factor) is float and type(parsed.value.inner.ratios[0]) is float


def test_an_explicit_zero_false_or_empty_list_stays() -> None:
    value = parse_table(Outer, outer(count=0, factor=0, is_on=False, grid=[], item=[])).value
    assert value is not None
    assert (value.count, value.factor, value.is_on, value.grid, value.item) == (0, 0.0, False, (), ())


@pytest.mark.parametrize(
    ("key", "raw", "reason"),
    [
        ("count", True, "must be an integer, not true"),
        ("count", 2.5, "must be an integer, not 2.5"),
        ("count", "3", 'must be an integer, not "3"'),
        ("count", -1, "must be at least 0, not -1"),
        ("count", 2**63, "is larger than a 64-bit integer"),
        ("factor", False, "must be a number, not false"),
        ("factor", float("nan"), "must be a finite number, not nan"),
        ("factor", float("inf"), "must be a finite number, not inf"),
        ("factor", 10**400, "is larger than a 64-bit integer"),
        ("factor", [1.0], "must be a number, not [1.0]"),
        ("is_on", 1, "must be true or false, not 1"),
        ("kind", "gren", 'must be one of "red", "green", not "gren"'),
        ("weight", "some", 'must be a number, or "auto", not "some"'),
        ("weight", True, 'must be a number, or "auto", not true'),
        ("weight", -1, "must be at least 0, not -1"),
        ("kind", {}, 'must be one of "red", "green", not a table'),
        ("name", 5, "must be a string, not 5"),
        ("name", "  ", "must not be blank"),
        ("folder", "", "must not be blank"),
        ("folder", "a\0b", "holds a NUL character, which no path or caption may"),
        ("grid", [1], "element 1 must be a list of integers, not 1"),
        ("grid", [[1], [2, "x"]], 'element 2 element 2 must be an integer, not "x"'),
        ("grid", "12", 'must be a list of lists of integers, not "12"'),
        ("inner", 5, "must be a table, not 5"),
        ("inner", [{"size": 1}], "must be a table, not a list of tables"),
        ("item", {"path": "a"}, "must be a list of tables, not a table"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_type(key, raw, reason) -> None:
    parsed = parse_table(Outer, outer(**{key: raw}))
    assert [(problem.key, problem.reason) for problem in parsed.problems] == [(key, reason)]
    assert parsed.invalid == {key}


@pytest.mark.parametrize(
    ("key", "raw", "fix"),
    [
        ("is_on", "True", "write true, in lower case and without quotes"),
        ("count", "8", "write 8, without quotes"),
        ("count", 4.0, "write 4"),
        ("weight", "8", "write 8, without quotes"),
        ("kind", "gren", 'did you mean "green"?'),
        ("item", {"path": "a"}, "head each with [[item]]"),
        ("inner", [{"size": 1}], "head it with [inner]"),
    ],
)
def test_slips_that_people_make_come_with_the_way_out(key, raw, fix) -> None:
    assert problems_of(outer(**{key: raw}))[key].fix == fix


def test_a_number_or_a_word_is_either() -> None:
    for raw, expected in (("auto", "auto"), (1, 1.0), (0.5, 0.5)):
        value = parse_table(Outer, outer(weight=raw)).value
        assert value is not None and (value.weight, type(value.weight)) == (expected, type(expected))


def test_bounds_hold_for_each_element() -> None:
    found = problems_of(outer(inner={"size": 1, "ratios": [0.5, 1.5]}))
    assert found["inner.ratios"].reason == "element 2 must be more than 0 and at most 1, not 1.5"


def test_everything_wrong_is_reported_at_once() -> None:
    table = {"nme": "a", "count": True, "inner": {"sise": 1}, "item": [{"path": 1}, {}], "extra": 3, "zzz": 0}
    found = problems_of(table)
    assert set(found) == {"nme", "count", "inner.sise", "item[0].path", "item[1].path", "extra", "zzz"}
    assert found["item[1].path"].reason.startswith("missing")


def test_a_misspelt_required_key_is_one_problem_not_two() -> None:
    parsed = parse_table(Outer, {"nam": "a", "inner": {"size": 1}})
    assert [(problem.key, problem.fix) for problem in parsed.problems] == [("nam", "did you mean name?")]
    assert parsed.invalid == {"name"}


def test_missing_keys_and_sections_say_what_to_add() -> None:
    found = problems_of({})
    assert found["name"].fix == "Name. Add name = ..."
    assert found["inner"].fix == "add a [inner] section with size"
    assert parse_table(Outer, {}).invalid == {"name", "inner"}


def test_the_alias_is_the_key_and_both_are_a_problem() -> None:
    assert parse_table(Outer, outer(name=None, title="shapes")).value == parse_table(Outer, outer()).value
    found = problems_of(outer(title="again"))
    assert found["title"].reason == "name and title are two names of one key"
    assert problems_of(outer(name=None, title=5))["title"].reason == "must be a string, not 5"


def test_a_list_of_tables_holds_tables_only() -> None:
    assert (
        problems_of(outer(item=[{"path": "a"}, 5]))["item"].reason
        == "must be a list of tables, not [a table, 5]"
    )


def test_the_draft_has_defaults_where_values_are_unusable() -> None:
    parsed = parse_table(Outer, {"count": -5, "is_on": False, "inner": {"ratios": [0.5]}})
    assert parsed.draft.count == 3 and parsed.draft.is_on is False
    assert parsed.draft.name is None and parsed.draft.inner.size is None
    assert parsed.invalid == {"count", "name", "inner.size"}


def training_fix(**table) -> str:
    return next(
        p.fix for p in parse_table(TrainConfig, table, others={"the dataset TOML": DatasetConfig}).problems
    )


@pytest.mark.parametrize(
    ("table", "fix"),
    [
        ({"rank": 8}, "rank belongs in [adapter]"),
        ({"text_encoder_path": "x"}, "text_encoder_path belongs in [model]"),
        ({"type": "lora"}, "type belongs in [model] or in [adapter] or in [optimizer]"),
        ({"model": {"epochs": 3}}, "epochs belongs at the top level, above the first [section]"),
        ({"adapter": {"reason": "x"}}, "reason belongs in [adapter.self_attn_approval]"),
        (
            {"frame_buckets": [1]},
            "frame_buckets belongs at the top level of the dataset TOML or in [[directory]] of the dataset TOML",
        ),
        ({"epoch": 3}, "did you mean epochs?"),
        ({"Epochs": 3}, "did you mean epochs?"),
        ({"train_block_range": [1, 2]}, "did you mean train_blocks_range in [adapter]?"),
        ({"adaptor": {"rank": 8}}, "did you mean adapter?"),
    ],
)
def test_a_misplaced_or_misspelt_key_is_shown_its_place(table, fix) -> None:
    assert training_fix(**table) == fix


def test_a_key_like_no_other_is_told_the_keys_of_its_section() -> None:
    assert (
        training_fix(budget={"qqqq": 1})
        == "take it out; the keys here are max_delta_ratio, max_mean_delta_ratio, max_neutral_drift, neutral_prompts, "
        "action, every_n_steps"
    )


def test_problems_carry_the_file() -> None:
    parsed = parse_table(Outer, {}, file="runs/a.toml")
    assert {problem.file for problem in parsed.problems} == {"runs/a.toml"}
    assert str(parsed.problems[0]).startswith("runs/a.toml: name: missing")
