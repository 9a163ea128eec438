"""Why items of the cache have to be made anew: what they are made of now against what it was the last time.

Keys are hashes, so two of them say that something differs and not what. This keeps, for each sample and caption, the
parts of its key; captions only as hashes.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import xxhash

from utils.data.cache_keys import LATENTS, TEXT, Parts
from utils.files import atomic_write_text

MEMORY_FILE = "made_of.json"
# Raise where the file means something else: an old one then counts as empty.
_FORMAT = 1
_CAPTIONS_OF = "captions_of"
_WORDS = {
    "content": "file changed",
    "bucket": "bucket changed",
    "fps": "frame rate changed",
    "clip_start_seconds": "clip moved",
    "preprocessing": "preprocessing changed",
    "tokenizer": "tokenizer changed",
    "dtype": "precision changed",
    "settings": "settings changed",
}
_WEIGHTS = {LATENTS: "VAE changed", TEXT: "text encoder changed"}
_LOST = "removed or damaged"


@dataclass(frozen=True)
class Want:
    """An item that training reads.

    Attributes:
        kind: LATENTS or TEXT.
        key: of the cache.
        identity: of the sample or caption, the same whatever it is encoded with; never the caption itself.
        parts: what the key is made of.
        samples: of a caption: the samples that have it.
    """

    kind: str
    key: str
    identity: str
    parts: Parts
    samples: tuple[str, ...] = ()


class MadeOf:
    """What the items of one store were made of when it was last filled."""

    def __init__(self, path: Path) -> None:
        """Read the file, if there is one; a damaged one counts as empty, and then everything is new."""
        self._path = path
        self._known: dict[str, dict[str, object]] = _read(path)

    def reasons(self, wants: Iterable[Want], missing: Set[str]) -> Counter[str]:
        """How many of the missing items have to be made for which reason. Equal keys count once."""
        distinct = {want.key: want for want in wants if want.key in missing}
        return Counter(self._reason(want) for want in distinct.values())

    def known(self, kind: str) -> dict[str, dict[str, object]]:
        """The parts (but a caption's text) of the newest item of each sample or caption, by identity."""
        return {name: parts for name, parts in self._of(kind).items() if isinstance(parts, dict)}

    def remember(self, wants: Iterable[Want]) -> None:
        """Keep what these items are made of, and write it if anything is new.

        Raises:
            UserError: the disk is full or the folder not writable.
        """
        before = json.dumps(self._known, sort_keys=True)
        captions_of: dict[str, list[str]] = {}
        for want in wants:
            self._of(want.kind)[want.identity] = dict(_without_caption(want.parts))
            for sample in want.samples:
                captions_of.setdefault(sample, []).append(want.identity)
        self._of(_CAPTIONS_OF).update(captions_of)
        if json.dumps(self._known, sort_keys=True) != before:
            atomic_write_text(self._path, json.dumps({"format": _FORMAT, **self._known}) + "\n")

    def _reason(self, want: Want) -> str:
        known = self._of(want.kind).get(want.identity)
        if not isinstance(known, dict):
            had_another = any(sample in self._of(_CAPTIONS_OF) for sample in want.samples)
            return "caption changed" if had_another else "new"
        now = json.loads(json.dumps(_without_caption(want.parts)))
        changed = [name for name in now if known.get(name) != now[name]]
        words = [_WEIGHTS[want.kind] if name == "weights" else _WORDS.get(name, name) for name in changed]
        return " and ".join(words) or _LOST

    def _of(self, what: str) -> dict[str, object]:
        return self._known.setdefault(what, {})


def caption_identity(caption: str) -> str:
    """A caption's name in the file: a hash, because captions may be private."""
    return xxhash.xxh3_128_hexdigest(caption.encode())


def describe(reasons: Mapping[str, int]) -> str:
    """Counted reasons in words, most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).most_common() if count)


def _without_caption(parts: Parts) -> Parts:
    return {name: value for name, value in parts.items() if name != "caption"}


def _read(path: Path) -> dict[str, dict[str, object]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(document, dict) or document.pop("format", None) != _FORMAT:
        return {}
    return document if all(isinstance(value, dict) for value in document.values()) else {}
