"""Reading a private file of domain keywords. No message repeats what is in it."""

from pathlib import Path

from utils.errors import UserError
from utils.prompt_files import read_private_lines


def read_keywords(path: str | Path) -> tuple[str, ...]:
    """The keywords of a UTF-8 text file, one per line, each once; blank lines and space around them do not count.

    A line that begins with `#` is a keyword too: there are such.

    Raises:
        UserError: the file is missing, not readable, not UTF-8 or without a keyword. Says where, never what.
    """
    keywords = tuple(dict.fromkeys(entry for _, entry in read_private_lines(path)))
    if not keywords:
        raise UserError(f'"{path}" holds no keyword')
    return keywords
