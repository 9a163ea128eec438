import pytest

from utils.config.targets import expand_braces, matches, select, split_block
from utils.errors import UserError

PATHS = [f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"] + [
    "ffn.0",
    "ffn.2",
]


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("ffn.0", ("ffn.0",)),
        ("cross_attn.{k,v}", ("cross_attn.k", "cross_attn.v")),
        ("{a,b}.{c,d}", ("a.c", "a.d", "b.c", "b.d")),
        ("{a.{x,y},b}", ("a.x", "a.y", "b")),
        ("{{a,b},c}z", ("az", "bz", "cz")),
        ("{k}", ("k",)),
        ("{a,a}", ("a",)),
    ],
)
def test_braces_expand_from_left_to_right(pattern, expanded) -> None:
    assert expand_braces(pattern) == expanded


@pytest.mark.parametrize("pattern", ["{a", "a}", "a}{b", "{a,}", "{}", "{a,{b}", "x{a,b}}"])
def test_a_brace_without_partner_or_an_empty_choice_is_refused(pattern) -> None:
    with pytest.raises(UserError, match="write groups as"):
        expand_braces(pattern)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("cross_attn.{k,v}", "cross_attn.k", True),
        ("cross_attn.{k,v}", "cross_attn.q", False),
        ("cross_attn.[kv]", "cross_attn.v", True),
        ("cross_attn.?", "cross_attn.o", True),
        ("*.q", "self_attn.q", True),
        ("*", "self_attn.q", True),
        ("attn.k", "cross_attn.k", False),
        ("cross_attn", "cross_attn.k", False),
        ("CROSS_ATTN.K", "cross_attn.k", False),
    ],
)
def test_a_pattern_matches_the_whole_path(pattern, path, expected) -> None:
    assert matches(pattern, path) is expected


def test_select_keeps_the_order_of_the_paths_and_exclude_wins() -> None:
    assert select(PATHS, ["cross_attn.{v,k}"]) == ["cross_attn.k", "cross_attn.v"]
    assert select(PATHS, ["ffn.*", "cross_attn.*"], ["*.{q,o}"]) == [
        "cross_attn.k",
        "cross_attn.v",
        "ffn.0",
        "ffn.2",
    ]


@pytest.mark.parametrize(
    ("include", "exclude", "words"),
    [
        (["cross_attn.kk"], [], 'adapter.include: pattern "cross_attn.kk" matches no module'),
        (["cross_attn.{k,w}"], [], 'pattern "cross_attn.{k,w}" ("cross_attn.w") matches no module'),
        (["ffn.0"], ["fnn.*"], 'adapter.exclude: pattern "fnn.*" matches no module'),
        (["ffn.0"], ["ffn.*"], "leave no module to adapt"),
        ([], [], "leave no module to adapt"),
    ],
)
def test_a_pattern_without_a_match_and_an_empty_selection_are_errors(include, exclude, words) -> None:
    with pytest.raises(UserError) as error:
        select(PATHS, include, exclude)
    assert words in str(error.value)


def test_the_block_is_split_off() -> None:
    assert split_block("blocks.12.self_attn.q") == (12, "self_attn.q")
    assert split_block("self_attn.q") == (None, "self_attn.q")
    assert split_block("blocks.x.self_attn.q") == (None, "blocks.x.self_attn.q")
    assert split_block("blocks.3") == (None, "blocks.3")
