"""The interleaved timing, with calls that take no time worth naming: what is counted, never how long."""

from __future__ import annotations

import pytest

from varlen_attn.convert import timing as _timing
from varlen_attn.convert.timing import Timing, facts, interleave, ratio, unsure

pytestmark = pytest.mark.alone


def test_contestants_take_turns() -> None:
    """A B B A A B ...: a disturbance meets all of them."""
    order: list[str] = []
    timings = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=5, least=0, warm_up=0, budget=0)
    assert "".join(order[:8]) == "abbaabba"
    assert len(order) >= 10
    assert len(timings["a"].rounds) == len(timings["b"].rounds) == 5


def test_short_calls_are_repeated_and_warmed_up() -> None:
    calls: list[int] = []
    interleave({"a": lambda: calls.append(1)}, rounds=1, least=0.001, warm_up=3, budget=0)
    assert len(calls) > 10


def test_a_slow_contestant_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    seconds = {"fast": 1.0, "slow": 9.0, "near": 3.9}
    monkeypatch.setattr(_timing, "_seconds", lambda call, *_: seconds[call()])
    monkeypatch.setattr(_timing.time, "perf_counter", lambda: float(next(clock)))
    calls = {name: (lambda name=name: name) for name in seconds}
    timings = interleave(calls, rounds=5, warm_up=1, budget=0, patience=4.0)
    assert timings["slow"].rounds == (9.0,)
    assert len(timings["fast"].rounds) == len(timings["near"].rounds) == 5
    found = facts(timings, "fast")
    assert found["once"] == ["slow"]
    assert found["ratio"]["slow"] == pytest.approx(timings["fast"].seconds / 9.0, abs=1e-3)


def test_a_ratio_is_the_median_over_rounds() -> None:
    """One disturbed round of three changes nothing."""
    assert ratio(Timing((2.0, 2.0, 90.0)), Timing((1.0, 1.0, 1.0))) == 2.0
    assert ratio(Timing((2.0, 2.0, 2.0)), Timing((4.0,))) == 0.5
    assert Timing((1.0, 1.0, 1.0, 1.0)).spread == 0
    assert Timing((0.9, 0.95, 1.0, 1.05, 1.1)).spread == pytest.approx(0.05)


def test_foreign_load_is_a_share() -> None:
    assert 0 <= _timing._foreign_share(_timing._load()) <= 1
    assert "took up to 50% of the machine" in unsure(0.5)
    assert unsure(0.05) == ""


def test_a_call_of_several_parts() -> None:
    """Milliseconds are those of one part, ratios of the whole."""
    found = facts({"a": Timing((0.008,)), "b": Timing((0.004,))}, "a", parts=2)
    assert found["milliseconds"] == {"a": 4.0, "b": 2.0}
    assert found["ratio"] == {"b": 2.0}
