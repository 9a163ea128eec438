"""Files of prompts: what counts, and one line that says what is wrong."""

import pytest

from models.wan.prompts import NEGATIVE_PROMPT, neutral_prompts
from utils.errors import UserError
from utils.prompt_files import MAX_ENTRIES, NEUTRAL_PROMPTS, read_prompt_file


def test_lines_count_once_and_comments_do_not(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# title\n a red cube \n\nein grüner Würfel\r\na red cube\n".encode())
    assert read_prompt_file(path) == ("a red cube", "ein grüner Würfel")


def test_the_shipped_file_is_there_and_neutral_prompts_have_wan_s_own(tmp_path):
    prompts = read_prompt_file(NEUTRAL_PROMPTS)
    assert len(prompts) >= 20
    assert neutral_prompts() == ("", NEGATIVE_PROMPT, *prompts)
    (tmp_path / "own.txt").write_text(f"x\n{NEGATIVE_PROMPT}\nx\n")
    assert neutral_prompts(tmp_path / "own.txt") == ("", NEGATIVE_PROMPT, "x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"", "holds no prompt"),
        (b"# only a comment\n\n", "holds no prompt"),
        (b"caf\xe9", "not UTF-8"),
        (b"a\0b", "NUL"),
        ("\n".join(map(str, range(MAX_ENTRIES + 1))).encode(), "at most"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, content, words):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as raised:
        read_prompt_file(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
