"""What a stage is given, what it says, and how long it may take."""

from __future__ import annotations

import math
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from varlen_attn import BackendRefused

__all__ = ["Findings", "OutOfTime", "Setting", "Stage", "Tally", "half", "one_line", "time_limit"]

_SHOWN = 4  # failures of one kind that are told in full


def half(device: str) -> torch.dtype:
    """The half precision that has kernels there: GPUs before sm80 have none for bfloat16."""
    return torch.float16 if device == "cuda" and torch.cuda.get_device_capability() < (8, 0) else torch.bfloat16


@dataclass(frozen=True)
class Setting:
    """Where a run takes place.

    Attributes:
        device: "cuda" or "cpu". On a CPU shapes are small: that is a rehearsal of the stages, and says nothing about a GPU.
        deadline: when the time for everything is over, by `time.monotonic`.
        without: backends that are left out of every stage.
        patient: a stage may take any time that is left. Otherwise it is cut at twice its estimate.
        grace: seconds after which a stage that should have been cut is taken to hang.
        fa3_library, cudart: a library of flash-attention 3 that is not installed, and the CUDA runtime that it was linked to.
    """

    device: str
    deadline: float = math.inf
    without: tuple[str, ...] = ()
    patient: bool = False
    grace: float = 30.0
    fa3_library: Path | None = None
    cudart: Path | None = None

    @property
    def small(self) -> bool:
        return self.device == "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """Of the stages that compute in one."""
        return torch.float32 if self.small else half(self.device)

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Check:
    """One statement about the library: whether it holds, whether acceptance depends on it, and what was seen."""

    name: str
    holds: bool
    required: bool
    detail: str


@dataclass
class Findings:
    """What a stage says: statements that hold or do not, and facts that nobody judges."""

    checks: list[Check] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    listener: Callable[[Findings], None] | None = None

    def check(self, name: str, holds: bool, detail: object = "", *, required: bool = True) -> None:
        self.checks.append(Check(name, bool(holds), required, str(detail)))
        self.publish()

    def publish(self) -> None:
        """Report what is known so far. It is kept if the process dies before the stage ends."""
        if self.listener is not None:
            self.listener(self)

    @contextmanager
    def trying(self, name: str, *, required: bool = True) -> Iterator[None]:
        """An exception inside is a failed check of this name, and not the end of the stage; nothing is said where there is none."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.check(name, False, one_line(error), required=required)

    @property
    def failed(self) -> list[Check]:
        return [c for c in self.checks if c.required and not c.holds]

    def as_dict(self) -> dict[str, Any]:
        return {"checks": [vars(c) for c in self.checks], "facts": self.facts}


def one_line(error: BaseException, length: int = 300) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:length]


class Tally:
    """Many cases for one backend, told as one check."""

    def __init__(self, name: str, seconds: float = math.inf) -> None:
        self.name, self.seconds = name, seconds
        self.ran, self.left_out, self.spent = 0, 0, 0.0
        self.refused: dict[str, str] = {}
        self.failures: list[str] = []

    def attempt(self, label: str, call: Callable[[], object]) -> None:
        """Run a case: it may refuse, and must not raise anything else. Cases beyond the tally's seconds are left out, and counted."""
        if self.spent > self.seconds:
            self.left_out += 1
            return
        began = time.perf_counter()
        try:
            call()
            self.ran += 1
        except BackendRefused as refusal:
            self.refused[label] = _first_reason(refusal)
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{label}: {one_line(error)}")
        self.spent += time.perf_counter() - began

    def write(self, findings: Findings, *, may_refuse: bool = True, may_leave_out: bool = True) -> None:
        """One check: something ran, nothing failed, and nothing was refused or left out for time that may not be."""
        failures = self.failures + ([] if may_refuse else [f"{label} refused: {why}" for label, why in self.refused.items()])
        shown = "; ".join(failures[:_SHOWN]) + (f"; and {len(failures) - _SHOWN} more" if len(failures) > _SHOWN else "")
        counts = f"{self.ran} ran, {len(self.refused)} refused"
        counts += f", {self.left_out} left out for time" if self.left_out else ""
        complete = may_leave_out or not self.left_out
        findings.check(self.name, not failures and self.ran > 0 and complete, f"{counts}; {shown}" if shown else counts)
        findings.facts[self.name] = {
            "ran": self.ran, "refused": dict(Counter(self.refused.values())), "left_out": self.left_out, "failed": failures,
        }  # fmt: skip


def _first_reason(refusal: BackendRefused) -> str:
    lines = str(refusal).splitlines()
    return lines[1].strip(" -") if len(lines) > 1 else lines[0]


@dataclass(frozen=True)
class Stage:
    """One part of a run.

    Attributes:
        name: for ``--only``.
        says: what holds where it passed.
        run: does it.
        seconds: what it takes on a GPU, by estimate; it is not begun with less left.
        needs_gpu: there is nothing of it to do on a CPU.
        required: acceptance waits for it. What fails in a stage that is not counts all the same, only lack of time does not.
        quiet: it measures time. Nothing else runs beside it.
        only: the backend that it is about; all others but `sdpa_padded` and `reference` are left out.
        parts: what it consists of, in place of ``run``: stages, each of which may end its process.
        processes: how many of its parts run at once.
        early: its parts begin before the first stage that has none, and run beside the others.
    """

    name: str
    says: str
    run: Callable[[Setting, Findings], object]
    seconds: float
    needs_gpu: bool = False
    required: bool = True
    quiet: bool = False
    only: str = ""
    parts: Callable[[Setting], tuple[Stage, ...]] | None = None
    processes: int = 1
    early: bool = False

    def limit(self, setting: Setting) -> float:
        """Seconds after which it is cut."""
        left = max(setting.left(), 0.0)
        return left if setting.patient else min(left, 2 * self.seconds + 15)


class OutOfTime(BaseException):
    """The budget ended inside a stage. No `Exception`: what runs there catches those."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` inside after so many seconds, where the system has such a clock; calls into C++ end first."""
    if math.isinf(seconds) or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
