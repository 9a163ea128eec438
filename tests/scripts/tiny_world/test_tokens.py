import random

import pytest
import sentencepiece

from scripts.tiny_world.dit_training import UMT5
from scripts.tiny_world.tokens import Tokens, pieces, write_tokenizer_files


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "umt5-xxl"
    write_tokenizer_files(path)
    return path


def test_words_of_the_grammar_are_one_piece_and_new_ones_their_letters(directory):
    spiece = sentencepiece.SentencePieceProcessor(model_file=str(directory / "spiece.model"))
    assert spiece.encode("a red circle, moving left", out_type=str) == [
        "▁a",
        "▁red",
        "▁circle",
        ",",
        "▁moving",
        "▁left",
    ]
    assert spiece.encode("zorp", out_type=str) == ["▁", "z", "o", "r", "p"]
    for text in ("a red circle", "one vume korb, seen Here!", "", "something zorp on a dark background"):
        assert Tokens(directory)(text) == [*spiece.encode(text), 1]


def test_the_table_has_a_row_for_each_piece():
    names = [name for name, _ in pieces()]
    assert len(set(names)) == len(names) <= UMT5.vocab_size


def test_spelling_replaces_words_by_their_letters(directory):
    tokens = Tokens(directory)
    names = [name for name, _ in pieces()]
    assert list(tokens.spelled("a red circle", random.Random(0), 0.0)) == tokens("a red circle")
    spelled = [names[token] for token in tokens.spelled("a red circle", random.Random(0), 1.0)]
    assert spelled == ["▁a", "▁", *"red", "▁", *"circle", "</s>"]
    generator = random.Random(1)
    count = sum(len(tokens.spelled("red", generator, 0.1)) > 2 for _ in range(2000))
    assert 150 < count < 250


def test_reruns_write_the_same_bytes(directory, tmp_path):
    write_tokenizer_files(tmp_path / "again")
    for path in directory.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
