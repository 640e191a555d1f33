"""Interleaved timing, and the facts about a machine that a number needs beside it."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import varlen_attn

__all__ = ["RESULTS", "Timing", "environment", "interleave", "peak_extra", "ratio", "save"]

RESULTS = Path(__file__).parent / "results"
QUIET = 0.03


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, one number for each round.

    Attributes:
        rounds: in the order of the contest.
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
    contestants: Mapping[str, Callable[[], object]], *, rounds: int = 7, least: float = 0.02, warm_up: int = 2, budget: float = 25.0
) -> dict[str, Timing]:
    """Time contestants in turns, A B A B ..., so that a slower or busier minute meets all of them.

    Many small parallel regions collapse when another process takes a core. So rounds in which others took more than
    `QUIET` of the machine are run again while the budget lasts; what counts is that share, and never the times.

    Args:
        contestants: what to call, by name.
        rounds: quiet turns wanted; the order is reversed every other time.
        least: seconds of one turn: short calls are repeated. With 0 none is, and no call is spent on finding out.
        warm_up: untimed calls before.
        budget: stop after so many seconds, but not before 5 rounds.
    """
    # One thread: its own CPU time, which other processes hardly touch. More threads wait for each other: wall time.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    repeats = {}
    for name, call in contestants.items():
        for _ in range(warm_up):
            call()
        repeats[name] = max(1, round(least / _seconds(call))) if least else 1
    taken: list[tuple[float, dict[str, float]]] = []
    began = time.perf_counter()
    while True:
        foreign = _ForeignLoad()
        row = {}
        for name in list(contestants)[:: 1 if len(taken) % 2 == 0 else -1]:
            start = clock()
            for _ in range(repeats[name]):
                contestants[name]()
            row[name] = (clock() - start) / repeats[name]
        taken.append((0.0 if clock is time.process_time else foreign.share(), row))
        quiet = sum(share <= QUIET for share, _ in taken)
        if quiet >= rounds or (len(taken) >= 5 and time.perf_counter() - began > budget):
            break
    kept = sorted(taken, key=lambda entry: entry[0])[: max(5, min(quiet, rounds))]
    return {name: Timing(tuple(row[name] for _, row in kept), kept[-1][0]) for name in contestants}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
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
    """How many times faster ``fast`` is: the median over the rounds, so that a disturbed round counts once."""
    return median(a / b for a, b in zip(slow.rounds, fast.rounds, strict=True))


def peak_extra(call: Callable[[], object]) -> int:
    """Bytes of resident memory that ``call`` takes at most, beyond what stood before. Linux only.

    In a fresh process only: memory that was freed before, but not given back, would be used again without being seen.
    """
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def environment() -> dict[str, Any]:
    """What a number depends on; no names of machines."""
    return {
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "varlen_attn": varlen_attn.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def save(name: str, rows: list[dict[str, Any]], keys: tuple[str, ...]) -> Path:
    """Write rows to ``results/name.json``. Rows of an earlier run that this one did not measure again stay."""
    path = RESULTS / f"{name}.json"
    fresh = {tuple(row[k] for k in keys) for row in rows}
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in earlier if tuple(row[k] for k in keys) not in fresh]
    merged = sorted(kept + rows, key=lambda row: tuple(str(row[k]) for k in keys))
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "rows": merged}, indent=1) + "\n")
    return path
