"""Files of prompts: UTF-8 text, one prompt per line."""

from pathlib import Path

from utils.errors import UserError

_ROOT = Path(__file__).resolve().parents[1]
NEUTRAL_PROMPTS_FILE = _ROOT / "configs" / "prompts" / "neutral.txt"
MAX_PROMPTS = 10_000


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a file, each once, in order. Blank lines and lines that begin with `#` do not count.

    Raises:
        UserError: the file is missing, not readable, not UTF-8, without a prompt, or has too many. Says where, never what.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give a UTF-8 text file with one prompt per line"
        ) from None
    except UnicodeDecodeError as error:
        # `from None`: the error itself holds the bytes of the file.
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    if "\0" in text:
        raise UserError(f"{path}: holds a NUL character, so it is no text file; give one prompt per line")
    lines = (line.strip() for line in text.splitlines())
    prompts = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write one per line")
    if len(prompts) > MAX_PROMPTS:
        raise UserError(
            f"{path}: holds {len(prompts)} prompts, at most {MAX_PROMPTS} are read; choose some of them"
        )
    return prompts
