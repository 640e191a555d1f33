"""Interleaved timing: what `compare`, the command line and the project's own benchmarks share."""

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
BUSY = 0.1  # and above which times are called unsure


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
    fewest: int = 5, patience: float = float("inf"), device: str = "cpu", prepare: Callable[[str], object] = lambda name: None,
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
        prepare: called before each turn, untimed, with the name of the contestant.
    """
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None

    def turn(name: str, *options: Any) -> float:
        prepare(name)
        return _seconds(contestants[name], wait, *options)

    # One thread: its own CPU time, which other processes hardly touch. More threads wait for each other: wall time.
    by_cpu_time = torch.get_num_threads() == 1 and device == "cpu"
    clock = time.process_time if by_cpu_time else time.perf_counter
    alone = {name: [turn(name) for _ in range(warm_up + bool(least))] for name in contestants}
    last = {name: taken_alone[-1] for name, taken_alone in alone.items() if least}
    once = {name: Timing((seconds,)) for name, seconds in last.items() if seconds > patience * next(iter(last.values()))}
    repeats = {name: max(1, round(least / last[name])) if least else 1 for name in contestants if name not in once}
    taken: list[tuple[float, dict[str, float]]] = []
    began = time.perf_counter()
    fewest = min(fewest, rounds)
    while True:
        before = _load()
        names = list(repeats)[:: 1 if len(taken) % 2 == 0 else -1]
        row = {name: turn(name, clock, repeats[name]) for name in names}
        taken.append((0.0 if by_cpu_time else _foreign_share(before), row))
        quiet = sum(share <= QUIET for share, _ in taken)
        if quiet >= rounds or (len(taken) >= fewest and time.perf_counter() - began > budget):
            break
    kept = sorted(taken, key=lambda entry: entry[0])[: max(fewest, min(quiet, rounds))]
    return {name: once.get(name) or Timing(tuple(row[name] for _, row in kept), kept[-1][0]) for name in contestants}


def _seconds(
    call: Callable[[], object], wait: Callable[[], object], clock: Callable[[], float] = time.perf_counter, repeats: int = 1
) -> float:
    wait()
    start = clock()
    for _ in range(repeats):
        call()
    wait()
    return max(clock() - start, 1e-7) / repeats


def _load() -> tuple[float, float, float]:
    """Seconds so far: busy on all cores (stolen time included), of this process, of all cores. Without /proc/stat nothing is busy."""
    try:
        user, nice, system, idle, wait, *rest = (int(x) / os.sysconf("SC_CLK_TCK") for x in Path("/proc/stat").read_text().split()[1:9])
    except (OSError, ValueError):
        return 0.0, 0.0, 1.0
    busy = user + nice + system + sum(rest)
    return busy, time.process_time(), busy + idle + wait


def _foreign_share(before: tuple[float, float, float]) -> float:
    """How much of the machine other processes have taken since then."""
    busy, own, everything = (now - then for now, then in zip(_load(), before, strict=True))
    return max(0.0, busy - own) / everything if everything > 0 else 0.0


def unsure(foreign: float) -> str:
    """What to say of times where other processes took this share of the machine."""
    says = (
        f"Other processes took up to {foreign:.0%} of the machine, and they disturb threads that wait for each other: the times are unsure."
    )
    return says if foreign > BUSY else ""


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times faster ``fast`` is: the median over the rounds, so that a disturbed round counts once.

    Of medians, where one of the two was timed once.
    """
    if len(slow.rounds) != len(fast.rounds):
        return slow.seconds / fast.seconds
    return median(a / b for a, b in zip(slow.rounds, fast.rounds, strict=True))


def facts(timings: Mapping[str, Timing], base: str, parts: int = 1) -> dict[str, Any]:
    """What every row says about its contest; ratios are times of ``base`` / times of the others. A call had so many equal parts."""
    rounds = len(timings[base].rounds)
    return {
        "threads": torch.get_num_threads(),
        "milliseconds": {name: round(t.seconds * 1e3 / parts, 3) for name, t in timings.items()},
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
