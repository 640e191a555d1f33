"""Times of a device, in turns: events around calls that were all queued before the first of them began."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from ..measure import Timing

__all__ = ["device_times"]

_HEAD_START = 20_000_000  # cycles, about 10 milliseconds, in which the host queues the calls: then none of its time is in between
_QUEUEING = 0.005  # seconds that the host may take for that
_TURN = 0.004  # seconds on the device


def device_times(
    calls: Mapping[str, Callable[[], object]], device: str, *, rounds: int = 7, budget: float = 6.0, least: float = _TURN
) -> dict[str, Timing]:
    """Seconds of one call on the device, A B A B ... as `interleave` takes turns; on a CPU by the clock.

    A call that waits for the device has no head start, and its waiting counts. Rounds end with the budget, but not before three.
    """
    measure = _by_events if device == "cuda" else _by_clock
    repeats = {}
    for name, call in calls.items():
        measure(call, 2)
        wanted = least / max(measure(call, 1), 1e-7)
        repeats[name] = max(1, min(20, round(wanted), int(_QUEUEING / _queued(call)) if device == "cuda" else 20))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            taken[name].append(measure(calls[name], repeats[name]))
        if number >= 2 and time.perf_counter() - began > budget:
            break
    return {name: Timing(tuple(seconds)) for name, seconds in taken.items()}


def _by_events(call: Callable[[], object], repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_HEAD_START)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / repeats


def _queued(call: Callable[[], object]) -> float:
    """Seconds of the host for one call, which nothing waits for."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    return max(time.perf_counter() - began, 1e-7)


def _by_clock(call: Callable[[], object], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats
