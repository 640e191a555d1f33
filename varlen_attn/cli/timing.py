"""Interleaved timing: what `python -m varlen_attn bench` and the project's own benchmarks share."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

PATIENCE = 4.0  # a contestant that takes so many times longer than the baseline is timed once
QUIET = 0.03  # share of the machine taken by others, up to which a round counts as quiet


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, one number for each round.

    Attributes:
        rounds: in the order of the contest; a single one for a contestant that was too slow to take part.
        foreign: the largest share of the machine's time that other processes took in a round.
    """

    rounds: tuple[float, ...]
    foreign: float = 0.0

    @property
    def seconds(self) -> float:
        return median(self.rounds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        ordered = sorted(self.rounds)
        quarter = len(ordered) // 4
        return (ordered[-1 - quarter] - ordered[quarter]) / 2 / self.seconds


def interleave(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int = 7, least: float = 0.02, warm_up: int = 2, budget: float = 25.0,
    fewest: int = 5, patience: float = float("inf"), device: str = "cpu",
) -> dict[str, Timing]:  # fmt: skip
    """Time contestants in turns, A B A B ..., so that a slower or busier minute meets all of them.

    Many small parallel regions collapse when another process takes a core. So rounds in which others took more than
    `QUIET` of the machine are run again while the budget lasts; what counts is that share, and never the times.

    Args:
        contestants: what to call, by name.
        rounds: quiet turns wanted; the order is reversed every other time.
        least: seconds of one turn: short calls are repeated. With 0 none is, and no call is spent on finding out.
        warm_up: untimed calls before.
        budget, fewest: stop after so many seconds, but not before so many rounds (or ``rounds``, if that is fewer).
        patience: a contestant that takes so many times longer than the first is timed once, outside of the turns. Needs ``least``.
        device: "cuda" is waited for before a clock is read.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None  # a CPU is never waited for
    # One thread: its own CPU time, which other processes hardly touch. More threads wait for each other: wall time.
    by_cpu_time = torch.get_num_threads() == 1 and device == "cpu"
    clock = time.process_time if by_cpu_time else time.perf_counter
    repeats: dict[str, int] = {}
    once: dict[str, Timing] = {}
    first = 0.0
    for name, call in contestants.items():
        taken_alone = [_seconds(call, wait) for _ in range(warm_up + bool(least))]
        first = first or (taken_alone[-1] if taken_alone else 0.0)
        if least and taken_alone[-1] > patience * first:
            once[name] = Timing((taken_alone[-1],))
        else:
            repeats[name] = max(1, round(least / taken_alone[-1])) if least else 1
    taken: list[tuple[float, dict[str, float]]] = []
    began = time.perf_counter()
    fewest = min(fewest, rounds)
    while True:
        foreign = _ForeignLoad()
        row = {}
        for name in list(repeats)[:: 1 if len(taken) % 2 == 0 else -1]:
            wait()
            start = clock()
            for _ in range(repeats[name]):
                contestants[name]()
            wait()
            row[name] = (clock() - start) / repeats[name]
        taken.append((0.0 if by_cpu_time else foreign.share(), row))
        quiet = sum(share <= QUIET for share, _ in taken)
        if quiet >= rounds or (len(taken) >= fewest and time.perf_counter() - began > budget):
            break
    kept = sorted(taken, key=lambda entry: entry[0])[: max(fewest, min(quiet, rounds))]
    return {name: once.get(name) or Timing(tuple(row[name] for _, row in kept), kept[-1][0]) for name in contestants}


def _seconds(call: Callable[[], object], wait: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    wait()
    return max(time.perf_counter() - start, 1e-7)


class _ForeignLoad:
    """How much of the machine other processes take, from now on. Where there is no /proc/stat: nothing."""

    def __init__(self) -> None:
        self.began = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: busy on all cores (stolen time included), of this process, of all cores."""
        try:
            user, nice, system, idle, wait, *rest = (int(x) / os.sysconf("SC_CLK_TCK") for x in Path("/proc/stat").read_text().split()[1:9])
        except (OSError, ValueError):
            return 0.0, 0.0, 1.0
        busy = user + nice + system + sum(rest)
        return busy, time.process_time(), busy + idle + wait

    def share(self) -> float:
        busy, own, everything = (now - then for now, then in zip(self._now(), self.began, strict=True))
        return max(0.0, busy - own) / everything if everything > 0 else 0.0


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times faster ``fast`` is: the median over the rounds, so that a disturbed round counts once.

    Of medians, where one of the two was timed once.
    """
    if len(slow.rounds) != len(fast.rounds):
        return slow.seconds / fast.seconds
    return median(a / b for a, b in zip(slow.rounds, fast.rounds, strict=True))


def facts(timings: Mapping[str, Timing], base: str) -> dict[str, Any]:
    """What every row says about its contest; ratios are times of ``base`` / times of the others."""
    rounds = len(timings[base].rounds)
    return {
        "threads": torch.get_num_threads(),
        "milliseconds": {name: round(t.seconds * 1e3, 3) for name, t in timings.items()},
        "spread": {name: round(t.spread, 3) for name, t in timings.items()},
        "ratio": {name: round(ratio(timings[base], t), 3) for name, t in timings.items() if name != base},
        "once": [name for name, t in timings.items() if len(t.rounds) < rounds],
        "rounds": rounds,
        "foreign": round(timings[base].foreign, 3),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
