"""Variants take turns, and the ratio is taken turn by turn."""

from utils.timing import Timing, ratios, take_turns


def test_variants_take_turns_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    now = 0.0

    def run(name: str, seconds: float) -> None:
        nonlocal now
        calls.append(name)
        now += seconds

    variants = {"a": lambda: run("a", 1.0), "b": lambda: run("b", 5.0)}
    found = take_turns(variants, 3, warmup=2, wait=lambda: calls.append("."), clock=lambda: now)
    assert "".join(calls) == ".a..b..b..a." * 2 + ".a..b."
    assert found == {"a": Timing((1.0,) * 3), "b": Timing((5.0,) * 3)}


def test_the_ratio_is_taken_turn_by_turn() -> None:
    slow, fast = Timing((2.0, 30.0, 6.0)), Timing((1.0, 10.0, 2.0))
    ratio = ratios(slow, fast)
    assert ratio == Timing((2.0, 3.0, 3.0))
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 2.0, 3.0)


def test_another_way_to_measure_takes_the_place_of_the_clock() -> None:
    found = take_turns({"a": lambda: 2.0, "b": lambda: 3.0}, 2, measure=lambda work: work())
    assert found == {"a": Timing((2.0, 2.0)), "b": Timing((3.0, 3.0))}
