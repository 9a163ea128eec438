"""Variants take turns, and the ratio is taken turn by turn."""

from utils import timing
from utils.timing import Timing, ratios, take_turns


def test_variants_take_turns_and_warm_up_is_not_counted(monkeypatch) -> None:
    calls: list[str] = []
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    found = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert found == {"a": Timing((1.0,) * 3), "b": Timing((1.0,) * 3)}


def test_the_ratio_is_taken_turn_by_turn() -> None:
    slow, fast = Timing((2.0, 30.0, 6.0)), Timing((1.0, 10.0, 2.0))
    ratio = ratios(slow, fast)
    assert ratio == Timing((2.0, 3.0, 3.0))
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 2.0, 3.0)
