"""Reading files of prompts or keywords. They may be private: no message repeats what is in them.

One entry per line, UTF-8; white space around and inside it is made one space; blank lines, lines that begin with `#`,
and repeats do not count.
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
        what: what messages call an entry, such as "keyword".

    Raises:
        UserError: the file is missing, not readable, not UTF-8 text, without an entry, or has more or longer entries
            than any prompt list. Says where, never what.
    """
    path = Path(path)
    entries: dict[str, None] = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        entry = " ".join(line.split())
        if not entry or entry.startswith("#"):
            continue
        if len(entry) > MAX_CHARACTERS:
            raise UserError(
                f'"{path}" line {number}: has {len(entry):,} characters, and a {what} may have {MAX_CHARACTERS:,}; write '
                "one per line"
            )
        entries[entry] = None
    if not entries:
        raise UserError(f'"{path}" holds no {what}; write one per line (lines that begin with # do not count)')
    if len(entries) > MAX_ENTRIES:
        raise UserError(f'"{path}" holds {len(entries):,} {what}s, and at most {MAX_ENTRIES:,} are read')
    return tuple(entries)


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f'"{path}" is larger than {_MAX_BYTES:,} bytes, so it is no list of prompts')
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f'"{path}" does not exist') from None
    except OSError as error:
        raise UserError(f'"{path}" cannot be read ({error.strerror})') from None
    except UnicodeDecodeError as error:
        # `from None`: the error itself holds the bytes of the file.
        raise UserError(f'"{path}" is not UTF-8 text (byte {error.start})') from None
    if "\0" in text:
        raise UserError(f'"{path}" holds a NUL character, so it is no text file')
    return text
