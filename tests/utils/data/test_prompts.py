import json

import pytest

from utils.data.prompts import Prompt, read_prompts
from utils.errors import UserError


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_line_that_begins_with_a_hash_is_a_comment(tmp_path):
    path = write(tmp_path / "p.txt", "# shapes\na red circle\n  # more\na # blue square")
    assert [prompt.text for prompt in read_prompts(path)] == ["a red circle", "a # blue square"]


def test_lines_of_a_text_file(tmp_path):
    path = write(tmp_path / "p.txt", "\ufeff  a red circle\r\n\n \t\na blue square\na red circle")
    assert read_prompts(path) == (
        Prompt("a red circle", "line 1"),
        Prompt("a blue square", "line 4"),
        Prompt("a red circle", "line 5"),
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.json", '{"a.mp4": "one", "b.png": ["two", "three"]}'),
        ("list.json", '["one", {"prompt": "two"}, {"file": "c.png", "caption": "three", "seed": 3}]'),
        ("row.json", '{"prompts": ["one", "two", "three"], "name": "shapes"}'),
        (
            "captions.jsonl",
            '{"file": "a.mp4", "caption": "one"}\n{"file_name": "b", "captions": ["two", "three"]}\n',
        ),
        ("bare.jsonl", '"one"\n\n{"caption": " two "}\n{"prompt": "three", "negative": null}'),
        ("LOUD.JSONL", '{"prompts": ["one", "two"]}\r\n{"prompt": "three"}\r\n'),
    ],
)
def test_tables_with_and_without_file_names(tmp_path, name, content):
    assert [prompt.text for prompt in read_prompts(write(tmp_path / name, content))] == [
        "one",
        "two",
        "three",
    ]


def test_places_are_those_of_the_file(tmp_path):
    path = write(tmp_path / "captions.json", '{"a secret name": "one", "b": ["two", "three"]}')
    assert [prompt.place for prompt in read_prompts(path)] == [
        "entry 1",
        "entry 2, text 1",
        "entry 2, text 2",
    ]
    path = write(tmp_path / "p.jsonl", '\n"one"\n{"prompt": ["two", "three"]}')
    assert [prompt.place for prompt in read_prompts(path)] == ["line 2", "line 3, text 1", "line 3, text 2"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"a circle\ncaf\xe9\n", "line 2: not UTF-8 (byte 3)"),
        ("p.txt", " \n\n", "holds no prompt"),
        ("p.json", "{}", "holds no prompt"),
        ("p.json", "{", "not JSON"),
        ("p.json", "3", "the document: neither a text nor an object"),
        ("p.json", '{"a": "x", "a": "y"}', "'a' stands there twice"),
        ("p.json", '{"a": 3}', "entry 1: neither a text nor a list of texts"),
        ("p.json", '{"a": []}', "entry 1: an empty list"),
        ("p.json", '{"a": ["x", " "]}', "entry 1, text 2: blank"),
        ("p.json", '["x", ["y"]]', "item 2: neither a text nor an object"),
        ("p.jsonl", '{"prompt": "x", "caption": "y"}', "it has caption and prompt"),
        ("p.jsonl", '"x"\n{"file": "a.mp4"}', "line 2: one of the keys"),
        ("p.jsonl", '{"file": 3, "prompt": "x"}', "line 1: its file is no text"),
        ("p.jsonl", '{"prompt": "\\ud800"}', "line 1: neither a text"),
        ("p.jsonl", "a red circle", "line 1: not JSON"),
        ("p.csv", "a red circle", "one of these endings"),
    ],
)
def test_what_is_not_right_is_named_by_its_place(tmp_path, name, content, words):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value)


def test_all_problems_are_told_but_no_prompt(tmp_path):
    rows = [{"prompt": "secret words"}, *({"prompt": ["secret words", 3]} for _ in range(12))]
    path = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    said = str(caught.value)
    assert "12 of its prompts cannot be used" in said and "and 2 more" in said
    assert [f"line {number}, text 2" in said for number in (1, 2, 11, 12)] == [False, True, True, False]
    assert "secret" not in said


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    for name, words in {"gone.txt": "No such file", "folder.txt": "Is a directory"}.items():
        with pytest.raises(UserError, match=rf"{name}: prompts cannot be read \({words}"):
            read_prompts(tmp_path / name)
