"""Stages in processes of their own: one that aborts, hangs or spoils its device costs itself, and not those after it.

The parent never touches CUDA, so that its children can be forked: they have every module loaded, and a device of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from varlen_attn import BACKENDS

from ..measure import Absent
from .findings import Findings, OutOfTime, Setting, Stage, one_line, time_limit

__all__ = [
    "ABSENT", "CRASHED", "CUT", "FAILED", "HUNG", "NEEDS_GPU", "PASSED", "POISONED", "RUNNING", "SKIPPED", "Group", "Worker", "ask",
    "of_stage", "watch",
]  # fmt: skip

PASSED, FAILED, CUT, SKIPPED, NEEDS_GPU, RUNNING = "passed", "failed", "cut: budget", "skipped: budget", "needs a GPU", "running"
CRASHED, HUNG, POISONED, ABSENT = "crashed", "hung", "poisoned the device", "not here"
APART = ("flex", "flash4")  # they compile kernels for each kind of call: stages of their own ask them
WITH_ALL = ("sdpa_padded", "reference")  # what a stage about one backend leaves in
_SHOWN = 1500  # characters of output that stand in the JSON, from its begin and from its end
_ROOT = str(Path(__file__).parent.parent.parent)
_fork = multiprocessing.get_context("fork")

Row = dict[str, Any]


# -------------------------------------------------------------------- inside of a child


def of_stage(stage: Stage, setting: Setting, listener: Callable[[Findings], None] | None = None, seconds: float = math.inf) -> Row:
    """Run it here: whatever it raises is its failure, and not the end of the others."""
    findings, began = Findings(listener=listener), time.monotonic()
    row = {"says": stage.says, "required": stage.required, "status": _status(stage, setting, findings, seconds)}
    return {**row, "seconds": round(time.monotonic() - began, 1), **findings.as_dict()}


def _status(stage: Stage, setting: Setting, findings: Findings, seconds: float) -> str:
    try:
        with time_limit(seconds):
            stage.run(setting, findings)
    except OutOfTime:
        return CUT
    except Absent as reason:
        findings.facts["reason"] = str(reason)
        return FAILED if findings.failed else ABSENT
    except Exception as error:
        traceback.print_exc()
        findings.check("the stage itself", False, one_line(error, 2000))
    if not findings.checks:
        findings.check("something was checked", False)
    return FAILED if findings.failed else PASSED


def _leave_out(setting: Setting, only: str) -> None:
    """Backends say that they are missing, so that neither an order nor the automatic choice runs them."""
    for backend in BACKENDS:
        apart = backend.name not in (only, *WITH_ALL) if only else backend.name in APART
        if apart or backend.name in setting.without:
            type(backend).missing = lambda self, problem: "is left out of this stage"  # type: ignore[method-assign]


def _health(device: str) -> str:
    """Empty where the device still computes."""
    try:
        if device == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return "" if float(torch.ones(1, device=device).sum()) == 1 else "1 is not 1"
    except Exception as error:
        return one_line(error)


def _begin(log: Path | None) -> None:
    """A group of processes that can be ended as one, that does not outlive its parent, and that writes to a file."""
    os.setsid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    if log is not None:
        sys.stdout = sys.stderr = log.open("a", buffering=1)
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        faulthandler.enable(sys.stdout)


def _serve(
    stages: Sequence[Stage], setting: Setting, only: str, shared: bool, parent: Connection, connection: Connection, log: Path
) -> None:  # fmt: skip
    parent.close()
    _begin(log)
    if shared:  # it may be stopped for a while: then it must hold no lock of a common cache, and compile in no other process
        os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(log.with_name("cache"))}
    elif setting.device == "cuda":
        torch.set_num_threads(max(1, min(8, (os.cpu_count() or 2) // 2)))
    _leave_out(setting, only)
    with contextlib.suppress(EOFError):
        while True:
            number, setting, seconds = connection.recv()
            row = of_stage(stages[number], setting, lambda findings: _send(connection, partial=findings.as_dict()), seconds)
            _send(connection, row=row, health=_health(setting.device))
    os._exit(0)


def _send(connection: Connection, **message: Any) -> None:
    connection.send_bytes(json.dumps(message, default=str).replace(_ROOT, ".").encode())


# -------------------------------------------------------------------- in the parent


def ask(question: Callable[[], Any], seconds: float = 120.0) -> Any:
    """The answer of a child, which may use the device; None if it dies or takes too long."""
    receiver, sender = _fork.Pipe(duplex=False)

    def answer() -> None:
        _begin(None)
        sender.send(question())
        os._exit(0)

    process = _started(answer)
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else None
    except EOFError:
        return None
    finally:
        _kill(process)


def _started(target: Callable[..., None], *arguments: Any) -> Any:
    process = _fork.Process(target=target, args=arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: those of numpy and torch compute, and hold no lock
        process.start()
    return process


def _kill(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(10)


class Worker:
    """A process that runs the stages it is told to, one by one. The next stage after it ended has a new one.

    Attributes:
        row: what is known of the stage it was told last.
        busy: that stage has not ended.
        shared: others compile beside it.
    """

    def __init__(self, stages: Sequence[Stage], only: str = "", log: Path | None = None, shared: bool = False) -> None:
        self.stages, self.only, self.log, self.shared = stages, only, log, shared
        self.process: Any = None
        self.row: Row = {}
        self.busy = False

    def begin(self, number: int, setting: Setting, *, cut: bool = True) -> None:
        """``cut``: the stage is interrupted in time, so that it can say what it had."""
        if self.process is None:
            self._start(setting)
        stage = self.stages[number]
        self.stage, self.began, self.grace = stage, time.monotonic(), setting.grace
        seconds = stage.limit(setting)
        self.until = self.began + seconds + setting.grace
        self.row = {"says": stage.says, "required": stage.required, "status": RUNNING}
        self.busy = True
        with contextlib.suppress(OSError):  # a process that has ended meanwhile is found when it is looked at
            self.connection.send((number, setting, seconds if cut else math.inf))

    def _start(self, setting: Setting) -> None:
        self.connection, theirs = _fork.Pipe()
        self.output, self.read = Path(tempfile.mkdtemp(prefix="varlen_attn-")) / "log", 0
        self.process = _started(_serve, self.stages, setting, self.only, self.shared, self.connection, theirs, self.output)
        theirs.close()

    def look(self) -> bool:
        """Read what came; whether something changed."""
        changed = False
        try:
            while self.busy and self.connection.poll():
                changed = True
                self._understand(json.loads(self.connection.recv_bytes()))
        except (EOFError, OSError):
            self.process.join(10)
            self._end(CRASHED, f"exit status {self.process.exitcode}")
            return True
        if self.busy and time.monotonic() > self.until:
            self._end(HUNG, f"did not end after {time.monotonic() - self.began:.0f} s")
            return True
        return changed

    def _understand(self, message: dict[str, Any]) -> None:
        if "partial" in message:
            self.row |= message["partial"]
            return
        self.row = message["row"]
        if message["health"]:
            self._end(POISONED, message["health"])
        else:
            self._ended()

    def _end(self, status: str, why: str) -> None:
        """The process with the stage: what it had found stays, and the next stage has another process."""
        self.row["status"], self.row["seconds"] = status, round(time.monotonic() - self.began, 1)
        self.row.setdefault("facts", {})
        self.row["checks"] = [*self.row.get("checks", []), _wrong("the process", f"{status}: {why}")]
        self._ended()
        self.stop()

    def _ended(self) -> None:
        self.busy = False
        text = self.output.read_text(errors="replace")[self.read :] if self.output.exists() else ""
        self.read += len(text)
        if self.row["status"] not in (PASSED, ABSENT) and text.strip():
            shown = text if len(text) < 2 * _SHOWN else f"{text[:_SHOWN]}\n...\n{text[-_SHOWN:]}"
            self.row["output"] = shown.replace(_ROOT, ".")
        if self.log is not None and text.strip():
            with self.log.open("a") as log:
                log.write(f"\n===== {self.stage.name}: {self.row['status']}, {self.row['seconds']} s\n{text}")

    def signal(self, number: int) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)

    def stop(self) -> None:
        if self.process is not None:
            if self.busy:  # the whole run ends
                self.row |= {"status": CUT, "seconds": round(time.monotonic() - self.began, 1)}
                self._ended()
            self.connection.close()
            _kill(self.process)
            shutil.rmtree(self.output.parent, ignore_errors=True)
            self.process = None


def _wrong(name: str, detail: str) -> dict[str, Any]:
    return {"name": name, "holds": False, "required": True, "detail": detail}


class Group:
    """The parts of a stage, in several processes beside each other."""

    def __init__(self, stage: Stage, setting: Setting, log: Path | None) -> None:
        assert stage.parts is not None
        self.stage, self.setting, self.began = stage, setting, time.monotonic()
        self.parts = stage.parts(setting)
        self.rows: dict[int, Row] = {}
        self.paused: float | None = None
        self.waiting = list(range(len(self.parts)))
        self.workers = [Worker(self.parts, stage.only, log, shared=stage.early) for _ in range(min(stage.processes, len(self.parts)))]
        self.running: dict[Worker, int] = {}

    @property
    def done(self) -> bool:
        return not self.waiting and not self.running

    def advance(self) -> None:
        """Give the next parts to those who have none. One that nobody needs any more ends, and frees its device."""
        for worker, number in list(self.running.items()):
            self.rows[number] = worker.row
            if not worker.busy:
                del self.running[worker]
                if not self.waiting:
                    worker.stop()
        for worker in self.workers:
            if self.waiting and worker not in self.running and self.paused is None:
                self.running[worker] = number = self.waiting.pop(0)
                worker.begin(number, self.setting, cut=False)

    def pause(self) -> None:
        self.paused = time.monotonic()
        for worker in self.running:
            worker.signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self.paused is not None:
            for worker in self.running:
                worker.until += time.monotonic() - self.paused
                worker.signal(signal.SIGCONT)
            self.paused = None

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()
        self.rows |= {number: worker.row for worker, number in self.running.items()}
        self.running.clear()

    def row(self) -> Row:
        """All parts as one stage."""
        found: Row = {"says": self.stage.says, "required": self.stage.required}
        rows = [(self.parts[number], row) for number, row in sorted(self.rows.items())]
        checks = [{**check, "name": _named(part.name, check["name"])} for part, row in rows for check in row.get("checks", [])]
        facts = {part.name: {"status": row["status"], "seconds": row.get("seconds"), **row.get("facts", {})} for part, row in rows}
        outputs = [f"{part.name}: {row['output']}" for part, row in rows if row.get("output")]
        states = {row["status"] for _, row in rows}
        unfinished = self.waiting or states & {RUNNING, CUT}
        worst = next((s for s in (POISONED, CRASHED, HUNG, FAILED) if s in states), None)
        status = worst or (CUT if unfinished else PASSED if PASSED in states else ABSENT)
        found |= {"status": status, "seconds": round(time.monotonic() - self.began, 1), "checks": checks, "facts": facts}
        if self.waiting:
            found["facts"]["left out for time"] = [self.parts[number].name for number in self.waiting]
        return found | ({"output": "\n".join(outputs)} if outputs else {})


def _named(part: str, check: str) -> str:
    return check if check.startswith(part) else f"{part}: {check}"


def watch(workers: Sequence[Worker], seconds: float = 0.5) -> bool:
    """Wait for news of any of them; whether there is some."""
    busy = [worker for worker in workers if worker.busy]
    wait([worker.connection for worker in busy], seconds)
    news = [worker.look() for worker in busy]
    return any(news)
