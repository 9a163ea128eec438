import threading
import weakref

import pytest

from utils.data.prefetch import ReadAhead


class Reader:
    """Remembers what was read, and in which thread."""

    def __init__(self, fails_at: int | None = None):
        self.positions = []
        self.fails_at = fails_at

    def __call__(self, position):
        self.positions.append(position)
        assert threading.current_thread() is not threading.main_thread()
        if position == self.fails_at:
            raise OSError(f"no {position}")
        return {position}


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read ahead")]


def test_the_next_is_read_while_this_one_is_used_and_never_more_than_that():
    is_read, may_go_on = threading.Event(), threading.Event()
    positions = []

    def read(position):
        positions.append(position)
        if position == 1:
            is_read.set()
            assert may_go_on.wait(30)
        return position * 10

    with ReadAhead(read) as ahead:
        assert ahead.take(0) == 0  # nothing was begun: read on the spot
        ahead.begin(1)
        assert is_read.wait(30)  # ... while we are here
        may_go_on.set()
        assert ahead.take(1) == 10
        assert positions == [0, 1]
    assert not threads()


def test_another_position_than_the_one_begun_is_read_anew():
    reader = Reader()
    with ReadAhead(reader) as ahead:
        ahead.begin(3)
        assert ahead.take(7) == {7}
        assert ahead.take(3) == {3}
    assert reader.positions[-1] == 3


def test_an_error_waits_for_its_position_and_ends_nothing_else():
    reader = Reader(fails_at=1)
    with ReadAhead(reader) as ahead:
        assert ahead.take(0) == {0}
        ahead.begin(1)
        with pytest.raises(OSError, match="no 1"):
            ahead.take(1)
        assert ahead.take(2) == {2}


def test_the_thread_ends_with_the_body_also_after_an_error():
    reader = Reader()
    with pytest.raises(ZeroDivisionError), ReadAhead(reader) as ahead:
        ahead.begin(5)
        assert threads()
        raise ZeroDivisionError
    assert not threads()
    assert reader.positions in ([], [5])


def test_what_was_taken_is_kept_by_nobody():
    with ReadAhead(Reader()) as ahead:
        taken = ahead.take(0)
        ahead.begin(1)
        ahead.take(1)
        reference = weakref.ref(taken)
        del taken
        assert reference() is None
