"""Files of prompts: what is read, and that no message repeats what is in them. The shipped files are read too."""

import traceback

import pytest

from utils.config.keywords import read_keywords
from utils.errors import UserError
from utils.prompt_files import MAX_CHARACTERS, MAX_ENTRIES, NEUTRAL_PROMPTS, read_prompt_file


def test_one_prompt_per_line(tmp_path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(
        "\ufeff# a comment\r\na red  circle\r\n\n  a blue square \n#another\na red circle\n".encode()
    )
    assert read_prompt_file(path) == ("a red circle", "a blue square")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"", "holds no prompt"),
        (b"# only a circle in a comment\n\n", "holds no prompt"),
        (b"circle\xff\n", "not UTF-8 text (byte 6)"),
        (b"circle\0square\n", "no text file"),
        (b"circle\n" + b"x" * (MAX_CHARACTERS + 1), "line 2: has 20,001 characters"),
        ("".join(f"circle {n}\n" for n in range(MAX_ENTRIES + 1)).encode(), "holds 10,001 prompts"),
        (b"\n" * 20_000_001, "larger than"),
    ],
)
def test_an_unusable_file_is_named_and_not_shown(tmp_path, content, words) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_prompt_file(path)
    assert words in str(raised.value) and str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "circle" not in "".join(traceback.format_exception(raised.value)).replace(str(path), "")


def test_a_directory_is_no_file(tmp_path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_prompt_file(tmp_path)


def test_the_shipped_files() -> None:
    neutral = read_prompt_file(NEUTRAL_PROMPTS)
    domain = read_prompt_file(NEUTRAL_PROMPTS.with_name("domain_example.txt"))
    keywords = read_keywords(NEUTRAL_PROMPTS.with_name("keywords_example.txt"))
    assert len(neutral) >= 36
    assert not set(neutral) & set(domain)
    # A neutral prompt with a keyword in it would be meant to move.
    assert not [prompt for prompt in neutral for keyword in keywords if keyword in prompt]
    assert all(any(keyword in prompt for prompt in domain) for keyword in keywords)
