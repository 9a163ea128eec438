"""Reading ahead: what the next step needs is made in a thread while the current step runs."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Calls `read(position)` ahead of who takes the result: one position at most, in one thread.

    What `read` returns must follow from the position alone, so that it makes no difference who asked for it, and when.
    An error is raised where the position is taken, and not before. As a context manager it ends the thread, waiting for
    the read that is under way.
    """

    def __init__(self, read: Callable[[int], T]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read ahead")
        self._ahead: tuple[int, Future[T]] | None = None

    def begin(self, position: int) -> None:
        """Start reading a position, to be taken next. What was begun before and not taken is dropped."""
        if self._ahead is not None:
            self._ahead[1].cancel()
        self._ahead = position, self._thread.submit(self._read, position)

    def take(self, position: int) -> T:
        """What stands at a position: waited for if it was begun, else read now.

        Raises:
            Exception: whatever `read` raised for this position.
        """
        if self._ahead is None or self._ahead[0] != position:
            self.begin(position)
        assert self._ahead is not None
        future = self._ahead[1]
        # Let go before waiting: the result must not live on here while the step uses it up.
        self._ahead = None
        return future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead = None
