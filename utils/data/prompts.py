"""Prompts without media: lists of captions for tools that need nothing but text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.data.captions import BYTE_ORDER_MARK, NAME_KEYS, MalformedError, is_text, parse_json
from utils.errors import UserError

PROMPT_SUFFIXES = (".txt", ".json", ".jsonl")
_TEXT_KEYS = ("caption", "captions", "prompt", "prompts")
_MAX_PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class Prompt:
    """One prompt, stripped and not blank, and where in its file it stands (`line 3`, `entry 7, text 2`)."""

    text: str
    place: str


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """All prompts of a file, in its order; one that stands there twice comes twice.

    The form goes by the ending:

    - `.txt`: one on each line; blank lines and lines that begin with `#` are passed over.
    - `.json`: what a `captions.json` is, {name: text or list of texts}, where the names need not be files; or a list
      of rows; or one row.
    - `.jsonl`: a row on each line, as in a `captions.jsonl`.

    A row is a text, or an object with one of the keys `caption`, `captions`, `prompt`, `prompts` (a text or a list of
    texts). A file name may stand beside it and is not looked at, and neither are other keys.

    Raises:
        UserError: it cannot be read, has another form, holds no prompt, or some of it is not right: the message
            names every place, and no prompt.
    """
    if path.suffix.lower() not in PROMPT_SUFFIXES:
        raise UserError(
            f"{path}: prompts are read from {', '.join(PROMPT_SUFFIXES)}; give it one of these endings"
        )
    try:
        content = path.read_bytes().removeprefix(BYTE_ORDER_MARK)
    except OSError as error:
        raise UserError(f"{path}: prompts cannot be read ({error.strerror}); check the path") from error
    read = {".txt": _read_lines, ".json": _read_json, ".jsonl": _read_jsonl}[path.suffix.lower()]
    prompts: list[Prompt] = []
    problems: list[str] = []
    for item in read(content):
        prompts.append(item) if isinstance(item, Prompt) else problems.append(item)
    if problems:
        shown = "".join(f"\n  - {problem}" for problem in problems[:_MAX_PROBLEMS_SHOWN])
        more = len(problems) - _MAX_PROBLEMS_SHOWN
        raise UserError(
            f"{path}: {len(problems)} of its prompts cannot be used; mend or remove them:{shown}"
            + (f"\n  ... and {more} more" if more > 0 else "")
        )
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write at least one")
    return tuple(prompts)


def _read_lines(content: bytes) -> Iterator[Prompt | str]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            yield f"line {number}: not UTF-8 (byte {error.start}); save it as UTF-8"
            continue
        if text and not text.startswith("#"):  # as in every file of prompts (utils/prompt_files.py)
            yield Prompt(text, f"line {number}")


def _read_jsonl(content: bytes) -> Iterator[Prompt | str]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except MalformedError as error:
            yield f"line {number}: {error}"
        else:
            yield from _read_row(row, f"line {number}")


def _read_json(content: bytes) -> Iterator[Prompt | str]:
    try:
        document = parse_json(content)
    except MalformedError as error:
        yield str(error)
        return
    if isinstance(document, list):
        for number, row in enumerate(document, start=1):
            yield from _read_row(row, f"item {number}")
    elif isinstance(document, dict) and not document.keys() & {*_TEXT_KEYS}:
        for number, value in enumerate(document.values(), start=1):
            yield from _read_texts(value, f"entry {number}")
    else:
        yield from _read_row(document, "the document")


def _read_row(row: Any, place: str) -> Iterator[Prompt | str]:
    if isinstance(row, str):
        yield from _read_texts(row, place)
        return
    if not isinstance(row, dict):
        yield f'{place}: neither a text nor an object like {{"prompt": text}}'
        return
    present = [key for key in _TEXT_KEYS if key in row]
    if len(present) != 1:
        found = " and ".join(present) if present else "none"
        yield f"{place}: one of the keys {', '.join(_TEXT_KEYS)} is wanted, and it has {found}"
        return
    for key in NAME_KEYS:
        if key in row and not is_text(row[key]):
            yield f"{place}: its {key} is no text"
            return
    yield from _read_texts(row[present[0]], place)


def _read_texts(value: Any, place: str) -> Iterator[Prompt | str]:
    texts = value if isinstance(value, list) else [value]
    if not texts:
        yield f"{place}: an empty list"
    for number, text in enumerate(texts, start=1):
        where = f"{place}, text {number}" if len(texts) > 1 else place
        if not is_text(text):
            yield f"{where}: neither a text nor a list of texts"
        elif not text.strip():
            yield f"{where}: blank"
        else:
            yield Prompt(text.strip(), where)
