import hashlib
import re

from utils.redact import Redactor


def test_equal_texts_have_equal_hashes_within_a_report_only() -> None:
    one, other = Redactor(), Redactor()
    assert one.name("keyword", 3, "circle") == one.name("keyword", 3, "circle")
    assert one.name("keyword", 3, "circle") != one.name("keyword", 3, "square")
    assert one.name("keyword", 3, "circle") != other.name("keyword", 3, "circle")


def test_the_name_is_an_index_and_a_hash_that_a_dictionary_does_not_give_away() -> None:
    name = Redactor().name("domain", 12, "circle")
    found = re.fullmatch(r"domain 12 \(([0-9a-f]{8})\)", name)
    assert found is not None
    assert hashlib.sha256(b"circle").hexdigest()[:8] != found[1]


def test_the_key_decides() -> None:
    assert Redactor(b"k").name("a", 1, "x") == Redactor(b"k").name("a", 1, "x")
    assert Redactor(b"k").name("a", 1, "x") != Redactor(b"l").name("a", 1, "x")
