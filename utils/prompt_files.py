"""Reading files of prompts or keywords. They may be private: no message repeats what is in them.

One entry per line, UTF-8; white space around and inside it is made one space; blank lines and repeats do not count, and
in files of prompts neither do lines that begin with `#`.
"""

from pathlib import Path

from utils.errors import UserError

NEUTRAL_PROMPTS = Path(__file__).resolve().parents[1] / "configs" / "prompts" / "neutral.txt"
MAX_ENTRIES = 10_000
MAX_CHARACTERS = 20_000
_MAX_BYTES = 20_000_000


def read_prompt_file(path: str | Path, what: str = "prompt") -> tuple[str, ...]:
    """The entries of a file, in order, each once.

    Args:
        path: the file.
        what: what messages call an entry.

    Raises:
        UserError: the file is missing, not readable, not UTF-8 text, without an entry, or has more or longer entries
            than any prompt list. Says where, never what.
    """
    entries: dict[str, None] = {}
    for number, entry in read_private_lines(path):
        if entry.startswith("#"):
            continue
        if len(entry) > MAX_CHARACTERS:
            raise UserError(
                f'"{path}" line {number}: has {len(entry):,} characters, and a {what} may have {MAX_CHARACTERS:,}; write '
                "one per line"
            )
        entries[entry] = None
    if not entries:
        raise UserError(
            f'"{path}" holds no {what}; write one per line (lines that begin with # do not count)'
        )
    if len(entries) > MAX_ENTRIES:
        raise UserError(f'"{path}" holds {len(entries):,} {what}s, and at most {MAX_ENTRIES:,} are read')
    return tuple(entries)


def read_private_lines(path: str | Path) -> list[tuple[int, str]]:
    """Line numbers, from 1, and lines of a UTF-8 text file that are not blank, white space made one space.

    Raises:
        UserError: the file is missing, not readable, not UTF-8 text, or far too large. Says where, never what.
    """
    try:
        if Path(path).stat().st_size > _MAX_BYTES:
            raise UserError(
                f'"{path}" is larger than {_MAX_BYTES:,} bytes, so it is no list; check that it is the right file'
            )
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
    lines = ((number, " ".join(line.split())) for number, line in enumerate(text.splitlines(), start=1))
    return [(number, line) for number, line in lines if line]
