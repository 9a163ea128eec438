"""A private file of keywords: what is read, and that no message repeats what is in it."""

import traceback

import pytest

from utils.config.keywords import read_keywords
from utils.errors import UserError


def test_one_keyword_per_line(tmp_path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeffcircle\r\n\n  blue   square \ncircle\n#5\n".encode())
    assert read_keywords(path) == ("circle", "blue square", "#5")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"", "holds no keyword"),
        (b" \n\t\n", "holds no keyword"),
        (b"circle\xff\n", "not UTF-8 text (byte 6)"),
        (b"circle\0square\n", "no text file"),
    ],
)
def test_an_unusable_file_is_named_and_not_shown(tmp_path, content, words) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_keywords(path)
    assert words in str(raised.value) and str(path) in str(raised.value)
    assert "circle" not in "".join(traceback.format_exception(raised.value)).replace(str(path), "")


def test_a_directory_is_no_file(tmp_path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_keywords(tmp_path)
