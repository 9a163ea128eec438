import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.captions import CaptionError, NoCaptionError, read_caption_tables, read_captions

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def captions_of(folder: Path, name: str) -> tuple[str, ...]:
    return read_captions(folder / name, read_caption_tables(folder))


def refusal(folder: Path, name: str) -> CaptionError:
    with pytest.raises(CaptionError) as caught:
        captions_of(folder, name)
    return caught.value


@settings(max_examples=40)
@given(
    entries=st.dictionaries(TEXTS, st.lists(TEXTS, min_size=1, max_size=3), max_size=4), ascii=st.booleans()
)
def test_both_tables_give_back_what_was_written(entries, ascii):
    lines = [
        json.dumps({"file": name, "caption": caption}, ensure_ascii=ascii)
        for name, captions in entries.items()
        for caption in captions
    ]
    written = {
        "captions.json": json.dumps(entries, ensure_ascii=ascii),
        "captions.jsonl": "\n".join(lines),
    }
    for table, text in written.items():
        with TemporaryDirectory() as folder:
            (Path(folder) / table).write_bytes(text.encode())
            tables = read_caption_tables(Path(folder))
        assert tables.damages == ()
        assert {name: list(entry.captions) for name, entry in tables.entries.items()} == entries


@settings(max_examples=60)
@given(
    content=st.binary(max_size=80)
    | st.recursive(
        st.none() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a.png", "file", "caption", "captions"]), inner, max_size=3),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode())
)
def test_whatever_a_table_holds_is_an_entry_or_reported(content):
    is_nothing = {
        "captions.json": re.fullmatch(rb"(\xef\xbb\xbf)?[ \t\r\n]*\{[ \t\r\n]*\}[ \t\r\n]*", content)
        is not None,
        "captions.jsonl": not content.removeprefix(b"\xef\xbb\xbf").strip(),
    }
    for table, may_be_empty in is_nothing.items():
        with TemporaryDirectory() as folder:
            (Path(folder) / table).write_bytes(content)
            tables = read_caption_tables(Path(folder))
        assert all((entry.problem is None) == bool(entry.captions) for entry in tables.entries.values())
        assert bool(tables.entries or tables.damages) != may_be_empty


def test_lines_of_one_file_add_up_in_both_spellings(tmp_path):
    (tmp_path / "captions.jsonl").write_text(
        '\ufeff{"file": "a.png", "caption": "a circle", "width": 64}\r\n\n'
        '{"file_name": "b.png", "captions": ["a square", " a box "]}\n'
        '{"file_name": "a.png", "caption": "a disc"}\n',
        encoding="utf-8",
    )
    assert captions_of(tmp_path, "a.png") == ("a circle", "a disc")
    assert captions_of(tmp_path, "b.png") == ("a square", "a box")


def test_a_text_file_is_one_caption(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeff a circle\nand a square \n", encoding="utf-8")
    assert captions_of(tmp_path, "a.png") == ("a circle\nand a square",)


def test_two_places_contradict_each_other(tmp_path):
    (tmp_path / "captions.json").write_text('{"a.png": "a circle", "b.png": "a square"}')
    (tmp_path / "captions.jsonl").write_text('{"file": "b.png", "caption": "a square"}')
    (tmp_path / "a.txt").write_text("")
    first, second = refusal(tmp_path, "a.png"), refusal(tmp_path, "b.png")
    assert "both a caption file a.txt and an entry in captions.json" in first.reason
    assert "entries in both captions.json and captions.jsonl" in second.reason
    assert first.code == second.code == "caption_conflict"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (3, "neither a text nor a list of texts"),
        ([], "neither a text nor a list of texts"),
        (["a circle", None], "neither a text nor a list of texts"),
        ({"text": "a circle"}, "neither a text nor a list of texts"),
        ("\ud800", "neither a text nor a list of texts"),
        (["a circle", " "], "caption 2 of its entry in captions.json is blank"),
    ],
)
def test_an_entry_that_is_wrong_is_a_problem_of_its_file_alone(value, reason, tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": value, "b.png": "a square"}))
    assert reason in refusal(tmp_path, "a.png").reason
    assert captions_of(tmp_path, "b.png") == ("a square",)
    assert read_caption_tables(tmp_path).damages == ()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "line 2: not JSON"),
        (b"[1]", "line 2: not an object like"),
        (b'{"caption": "a circle"}', "line 2: it has neither of the keys file and file_name"),
        (b'{"file": "b", "file_name": "b", "caption": "c"}', "line 2: it has both of the keys file and file_name"),
        (b'{"file": 3, "caption": "a circle"}', "line 2: the file's name is 3"),
        (b'{"file": "b", "file": "c", "caption": "a"}', "line 2: 'file' stands there twice"),
        (b'{"file": "b.png", "caption": "\xff"}', "line 2: not UTF-8 (byte 30)"),
        (b"[" * 100_000, "line 2: not JSON"),
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_line_is_reported_and_the_others_are_used(line, reason, tmp_path):
    first = b'{"file": "a.png", "caption": "a circle"}\n'
    (tmp_path / "captions.jsonl").write_bytes(first + line + b"\n" + first.replace(b"a.png", b"c.png"))
    (damage,) = read_caption_tables(tmp_path).damages
    assert damage.path == tmp_path / "captions.jsonl"
    assert reason in damage.reason
    assert captions_of(tmp_path, "a.png") == captions_of(tmp_path, "c.png") == ("a circle",)
    # A file without a caption may be the one of the damaged line.
    assert "captions.jsonl is damaged" in refusal(tmp_path, "b.png").reason


def test_a_line_of_a_known_file_without_a_caption_is_a_problem_of_that_file(tmp_path):
    (tmp_path / "captions.jsonl").write_text(
        '{"file": "a.png", "caption": "a circle"}\n{"file": "a.png", "captoin": "a disc"}\n'
    )
    reason = refusal(tmp_path, "a.png").reason
    assert reason == "line 2 of captions.jsonl: it has neither of the keys caption and captions"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"words", "not JSON"),
        (b"", "not JSON"),
        (b'["a.png"]', "not an object of file names"),
        (b'{"a.png": "caf\xe9"}', "not UTF-8 (byte 14)"),
        (b'{"a.png": "a circle", "a.png": "a disc"}', "'a.png' stands there twice"),
    ],
)
def test_a_damaged_json_is_reported_whole(content, reason, tmp_path):
    (tmp_path / "captions.json").write_bytes(content)
    (damage,) = read_caption_tables(tmp_path).damages
    assert reason in damage.reason
    assert "captions.json is damaged" in refusal(tmp_path, "a.png").reason


def test_a_table_that_is_no_file_is_reported(tmp_path):
    (tmp_path / "captions.json").mkdir()
    (tmp_path / "captions.jsonl").symlink_to(tmp_path / "nowhere")
    assert [(damage.path.name, damage.reason) for damage in read_caption_tables(tmp_path).damages] == [
        ("captions.json", "not readable (Is a directory)"),
        ("captions.jsonl", "not readable (No such file or directory)"),
    ]


def test_none_and_blank_are_no_caption(tmp_path):
    (tmp_path / "captions.json").write_text('{"b.png": " ", "c.png": ["", " "]}')
    (tmp_path / "d.txt").write_text(" \n")
    for name, lack in {
        "a.png": "it has no caption file a.txt and no entry in captions.json",
        "b.png": "its entry in captions.json is blank",
        "c.png": "its entry in captions.json is blank",
        "d.png": "its caption file d.txt is blank",
    }.items():
        with pytest.raises(NoCaptionError) as caught:
            captions_of(tmp_path, name)
        assert str(caught.value) == lack
