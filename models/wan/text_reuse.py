"""What a DiT's layers make of a text and nothing else, made once for many passes: its embedding, each block's keys and values.

    reuse = TextReuse()                      # one for the layers of a process; each layer has it as `reuse`
    with reuse.keeping([text, negative]):    # passes under these two texts, by weights that stay as they are
        ...

A pass says by number which text it is under, because between stages a text travels and arrives as another tensor.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

Made = TypeVar("Made")
# The number of a text that nothing is kept of.
NOT_KEPT = 0


class TextReuse:
    """What was made of the texts of now. All processes of a pipeline keep the same texts, each what its own layers made."""

    def __init__(self) -> None:
        self._texts: tuple[Tensor, ...] = ()
        self._made: dict[tuple[int, tuple[nn.Module, ...]], Any] = {}
        self._read: tuple[Tensor, int] | None = None

    @contextmanager
    def keeping(self, texts: Sequence[Tensor]) -> Iterator[None]:
        """For the body keep what is made of these texts, and of no others; behind it nothing is kept.

        Args:
            texts: the tensors themselves: another one with the same values is another text. In the body neither they nor any
                weight may change: an adapter is put on or taken off outside of it.
        """
        self._start(texts)
        try:
            yield
        finally:
            self._start(())

    def number_of(self, text: Tensor) -> int:
        """What a pass under this text carries: 1 and up, or `NOT_KEPT`."""
        # The texts are held, so none of them can be a new tensor in the place of one that is gone.
        return next((number for number, kept in enumerate(self._texts, start=1) if kept is text), NOT_KEPT)

    def made(self, number: Tensor, makers: tuple[nn.Module, ...], make: Callable[[], Made]) -> Made | None:
        """What `makers` make of the text of this number: kept, or made now. None where nothing is kept of the text.

        Args:
            number: int64 [1], of the pass.
            makers: every module that `make` runs.
            make: makes it.
        """
        text = self._value_of(number)
        if not NOT_KEPT < text <= len(self._texts):
            return None
        # Modules are equal to themselves alone, and those in the dictionary live as long as it does. So layers do not mix, and
        # what modules made is not taken for what others make that have been put in their place.
        key = (text, makers)
        if key not in self._made:
            self._made[key] = make()
        found: Made = self._made[key]
        return found

    def _start(self, texts: Sequence[Tensor]) -> None:
        self._texts = tuple(texts)
        self._made.clear()
        self._read = None

    def _value_of(self, number: Tensor) -> int:
        # All layers of a pass see one tensor. It is read once, for reading waits for a GPU.
        if self._read is None or self._read[0] is not number:
            self._read = (number, int(number.item()))
        return self._read[1]
