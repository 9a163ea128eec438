"""Reading a private file of domain keywords. No message repeats what is in it."""

from pathlib import Path

from utils.errors import UserError


def read_keywords(path: str | Path) -> tuple[str, ...]:
    """The keywords of a UTF-8 text file, one per line, each once; blank lines and space around them do not count.

    Raises:
        UserError: the file is missing, not readable, not UTF-8 or without a keyword. Says where, never what.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f'"{path}" does not exist') from None
    except OSError as error:
        raise UserError(f'"{path}" cannot be read ({error.strerror})') from None
    except UnicodeDecodeError as error:
        # `from None`: the error itself holds the bytes of the file.
        raise UserError(f'"{path}" is not UTF-8 text (byte {error.start})') from None
    if "\0" in text:
        raise UserError(f'"{path}" holds a NUL character, so it is no text file')
    keywords = tuple(dict.fromkeys(" ".join(line.split()) for line in text.splitlines() if line.strip()))
    if not keywords:
        raise UserError(f'"{path}" holds no keyword')
    return keywords
