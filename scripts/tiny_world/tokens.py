"""The tiny world's tokenizer: one piece for each word of the grammar, one for each character.

A word that the grammar does not have falls apart into characters, which training has met: it spells some of the words
it knows. The files are those of the published tokenizer's format.
"""

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2

from models.wan.text_encoder import WanTokenizer
from scripts.make_tiny_wan import train_spiece, write_tokenizer
from scripts.tiny_world.captions import words

_SPACE = "▁"
_SPECIAL = ("<pad>", "</s>", "<unk>")
_WORD_SCORE, _CHARACTER_SCORE = -2.0, -10.0


def pieces() -> list[tuple[str, float]]:
    """Pieces with their scores (log probabilities): special ones, the space, the grammar's words, characters."""
    listed = [(name, 0.0) for name in _SPECIAL] + [(_SPACE, _CHARACTER_SCORE)]
    listed += [(_SPACE + word, _WORD_SCORE) for word in words()]
    return listed + [(chr(code), _CHARACTER_SCORE) for code in range(ord("!"), ord("~") + 1)]


def write_tokenizer_files(directory: Path) -> None:
    """Write the tokenizer's files to a new directory."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(train_spiece())  # type: ignore[attr-defined]
    special = {name: proto.pieces[index].type for index, name in enumerate(_SPECIAL)}
    normal = proto.pieces[len(_SPECIAL)].type
    proto.ClearField("pieces")
    for name, score in pieces():
        proto.pieces.add(piece=name, score=score, type=special.get(name, normal))
    proto.trainer_spec.vocab_size = len(proto.pieces)
    write_tokenizer(directory, proto.SerializeToString())


class Tokens:
    """Token ids of captions, with words spelled at random for training."""

    def __init__(self, directory: Path) -> None:
        """Load the tokenizer written to `directory`."""
        self._tokenizer = cache(WanTokenizer(directory))
        names = [name for name, _ in pieces()]
        ids = {name: index for index, name in enumerate(names)}
        self._letters = {
            ids[name]: [ids[_SPACE], *(ids[letter] for letter in name[1:])]
            for name in names
            if name.startswith(_SPACE) and len(name) > 2
        }

    def __call__(self, caption: str) -> list[int]:
        """Ids of one caption, as Wan's text encoder gets them."""
        return list(self._tokenizer(caption))

    def spelled(self, caption: str, generator: random.Random, share: float) -> Sequence[int]:
        """The same with `share` of the words that have more than one letter in characters."""
        ids: list[int] = []
        for token in self._tokenizer(caption):
            letters = self._letters.get(token)
            ids += letters if letters is not None and generator.random() < share else [token]
        return ids
