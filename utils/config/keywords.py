"""Domain keywords: reading a private file of them, and finding them in a text. No message repeats what is in it."""

import re
from collections.abc import Iterable
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


def keyword_pattern(keywords: Iterable[str], *, case_insensitive: bool) -> re.Pattern[str]:
    """Finds any of the keywords as whole words, whatever the space between them; of those that begin at one place the longest.

    Args:
        keywords: at least one.
        case_insensitive: find a keyword also where its case differs.
    """
    # Longest first, because a regular expression takes the first alternative that fits.
    ordered = sorted({" ".join(keyword.split()) for keyword in keywords}, key=lambda word: (-len(word), word))
    any_keyword = "|".join(r"\s+".join(map(re.escape, keyword.split(" "))) for keyword in ordered)
    flags = re.IGNORECASE if case_insensitive else re.NOFLAG
    return re.compile(rf"(?<!\w)(?:{any_keyword})(?!\w)", flags)
