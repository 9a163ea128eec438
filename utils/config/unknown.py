"""What an unknown key was probably meant to be: a key of another section, or a misspelt one."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from utils.config.introspect import Key, Section, dotted, keys_of, sections_of


@dataclass(frozen=True)
class Place:
    """Somewhere a key may stand: in words, and as a dotted key where it is in the document being read."""

    words: str
    key: str | None


@dataclass(frozen=True)
class Diagnosis:
    """What to tell about an unknown key, and the keys of this document that were probably meant."""

    fix: str
    meant: tuple[str, ...]


class KeyIndex:
    """Every key of a document and its companions, by name and alias, with the places where it may stand."""

    def __init__(self, record: type, others: Mapping[str, type]) -> None:
        """Index `record`; `others` are the companion documents, by the name they have in messages."""
        self._places: dict[str, list[Place]] = {}
        self._add_document(record, None)
        for document, other in others.items():
            self._add_document(other, document)

    def diagnose(self, name: str, record: type, section: str) -> Diagnosis:
        """Explain key `name`, found in the table `section` that `record` describes and that does not know it."""
        own = _names(keys_of(record))
        if name in self._places:
            return self._point_at(name, f"{name} belongs ")
        close = get_close_matches(name.lower(), own, n=1)
        if close:
            return Diagnosis(f"did you mean {close[0]}?", (dotted(section, own[close[0]]),))
        close = get_close_matches(name.lower(), self._places, n=1, cutoff=0.75)
        if close:
            return self._point_at(close[0], f"did you mean {close[0]} ")
        return Diagnosis(f"take it out; the keys here are {', '.join(keys_of(record))}", ())

    def _point_at(self, name: str, start: str) -> Diagnosis:
        places = self._places[name]
        words = " or ".join(dict.fromkeys(place.words for place in places))
        end = "" if start.endswith("belongs ") else "?"
        # With several candidates none of them can be taken as meant.
        meant = tuple(place.key for place in places if place.key is not None) if len(places) == 1 else ()
        return Diagnosis(f"{start}{words}{end}", meant)

    def _add_document(self, record: type, document: str | None) -> None:
        """The places of a document. A table inside another that repeats its keys is no place to send somebody to."""
        sections: list[Section] = []
        for section in sections_of(record):
            if all(section.record is not other.record for other in sections):
                sections.append(section)
        known = {section.path: _names(keys_of(section.record)) for section in sections if section.path}
        for section in sections:
            where = f"in {section.title}" if section.path else "at the top level"
            if document is not None:
                where += f" of {document}"
            elif not section.path:
                where += ", above the first [section]"
            parent = section.path.rpartition(".")[0]
            for name, canonical in _names(keys_of(section.record)).items():
                if name in known.get(parent, {}):
                    continue
                key = dotted(section.path, canonical) if document is None else None
                self._places.setdefault(name, []).append(Place(where, key))


def _names(keys: Mapping[str, Key]) -> dict[str, str]:
    """Every way to write each key, with its own name."""
    names = {name: name for name in keys}
    return names | {key.alias: key.name for key in keys.values() if key.alias}
