"""Files of prompts: what counts, and one line that says what is wrong."""

import pytest

from models.wan.prompts import NEGATIVE_PROMPT, with_wan_prompts
from utils.errors import UserError
from utils.prompt_files import MAX_PROMPTS, NEUTRAL_PROMPTS_FILE, read_prompts


def test_lines_count_once_and_comments_do_not(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# title\n a red cube \n\nein grüner Würfel\r\na red cube\n".encode())
    assert read_prompts(path) == ("a red cube", "ein grüner Würfel")


def test_the_shipped_file_is_there_and_neutral_prompts_have_wan_s_own():
    prompts = read_prompts(NEUTRAL_PROMPTS_FILE)
    assert len(prompts) >= 20
    assert with_wan_prompts(prompts)[:2] == ("", NEGATIVE_PROMPT)
    assert with_wan_prompts(["", "x", "x"]) == ("", NEGATIVE_PROMPT, "x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"", "holds no prompt"),
        (b"# only a comment\n\n", "holds no prompt"),
        (b"caf\xe9", "not UTF-8"),
        (b"a\0b", "NUL"),
        ("\n".join(map(str, range(MAX_PROMPTS + 1))).encode(), "at most"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, content, words):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as raised:
        read_prompts(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
