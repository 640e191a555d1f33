"""Accept this library on a GPU: what is claimed of it is shown there, stage by stage, in under 9 minutes.

``python -m benchmarks.gpu_acceptance`` writes ``benchmarks/results/<GPU>/acceptance.json`` after every stage, so that a run that is cut
still tells what it had, and all output to ``acceptance.log`` beside it. It prints a summary, and ends with status 0 only if everything
required holds, and with 3 where there is no GPU. Stages run in processes of their own: one that crashes, hangs or spoils the device is
recorded as that, and the next one has a new process. A stage that the budget has no time for is not passed. On a CPU the same stages run
with small shapes, where they have anything to do: a rehearsal, which says nothing about a GPU and writes no file unless one is named.

It needs torch, einops and a clone of this repository; flash-attn, transformers and others take part where they are installed. What is
asked is the public interface: `varlen_attention`, `padded_attention`, `varlen_mha`, `SeqLayout`, `enable`, `record`, `explain`. A bare
kernel is called only to have something to compare with.

A library of flash-attention 3 that is not installed takes part with ``--fa3-library fa3.so.xz``, and ``--cudart`` where it was linked to
another CUDA runtime than torch's: a ``libcudart.so.12``, or the wheel that holds one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from varlen_attn import BACKENDS

from .acceptance import environment, processes
from .acceptance.findings import Setting, Stage
from .acceptance.processes import ABSENT, CRASHED, CUT, HUNG, NEEDS_GPU, PASSED, POISONED, RUNNING, SKIPPED, Group, Worker
from .acceptance.stages import STAGES
from .measure import RESULTS
from .what_ran import times

__all__ = ["accepted", "main", "run", "summary"]

NAME, PARTIAL = "acceptance.json", "partial.json"  # a part of the stages does not replace what all of them have shown
BUDGET = 500.0
NO_GPU = 3  # exit status

Result = dict[str, Any]


class _Run:
    """One run of stages: the process that runs them in turn, and groups of processes beside it."""

    def __init__(self, stages: Sequence[Stage], setting: Setting, head: Result, out: Path | None) -> None:
        self.stages, self.setting, self.out = stages, setting, out
        self.log = None if out is None else out.with_suffix(".log")
        self.result: Result = {
            "environment": head,
            "accepted": False,
            "stages": {stage.name: {"status": "has not run"} for stage in stages},
        }
        self.workers = {only: Worker(stages, only, self.log) for only in dict.fromkeys(stage.only for stage in stages)}
        self.groups: dict[str, Group] = {}

    def all(self) -> Result:
        try:
            for number, stage in enumerate(self.stages):
                row = self._one(number, stage)
                self._tell(stage, row)
            self.result["accepted"] = accepted(self.result)
        finally:
            for group in self.groups.values():
                group.stop()
            for worker in self.workers.values():
                worker.stop()
            _write(self.result, self.out)
        return self.result

    def _why_not(self, stage: Stage) -> str | None:
        if stage.needs_gpu and self.setting.device == "cpu":
            return NEEDS_GPU
        return SKIPPED if self.setting.left() < (1 if self.setting.small else stage.seconds) else None

    def _one(self, number: int, stage: Stage) -> Result:
        group = self.groups.get(stage.name)
        if group is None and (reason := self._why_not(stage)):
            return {"says": stage.says, "required": stage.required, "status": reason, "seconds": 0.0}
        return self._together(stage, group) if stage.parts else self._alone(number, stage)

    def _alone(self, number: int, stage: Stage) -> Result:
        for early in self.stages:
            if early.early and early.name not in self.groups and not self._why_not(early):
                self.groups[early.name] = Group(early, self.setting, self.log)
        worker = self.workers[stage.only]
        for group in self.groups.values() if stage.quiet else ():
            group.pause()
        worker.begin(number, self.setting)
        while worker.busy:
            self._watch(worker, stage)
        for group in self.groups.values():
            group.resume()
        if stage.only != "" or all(later.only != stage.only for later in self.stages[number + 1 :]):
            worker.stop()  # its memory is for others
        return worker.row

    def _together(self, stage: Stage, group: Group | None) -> Result:
        if group is None:
            group = self.groups[stage.name] = Group(stage, self.setting, self.log)
        until = time.monotonic() + stage.limit(self.setting)
        while not group.done and time.monotonic() < until:
            self._watch(None, stage)
        group.stop()
        row = group.row()
        dead = [
            name for name, part in row["facts"].items() if isinstance(part, dict) and part.get("status") in (CRASHED, HUNG, POISONED, CUT)
        ]
        named = tuple(backend.name for backend in BACKENDS if backend.name in dead)
        if named:  # a backend that ends its process for a small batch would do so in every stage
            row["facts"]["left out of later stages"] = list(named)
            self.setting = replace(self.setting, without=(*self.setting.without, *named))
        return row

    def _watch(self, worker: Worker | None, stage: Stage) -> None:
        for group in self.groups.values():
            group.advance()
        running = [other for group in self.groups.values() if group.paused is None for other in group.running]
        if processes.watch([*([worker] if worker else []), *running]):
            for name, group in self.groups.items():
                group.advance()
                if not self._told(name):
                    self.result["stages"][name] = group.row() | {"status": RUNNING}
            if worker is not None:
                self.result["stages"][stage.name] = worker.row
            _write(self.result, self.out)

    def _told(self, name: str) -> bool:
        return self.result["stages"][name]["status"] not in ("has not run", RUNNING)

    def _tell(self, stage: Stage, row: Result) -> None:
        self.result["stages"][stage.name] = row
        _write(self.result, self.out)
        _say(f"{stage.name:12} {row['status']:16} {row['seconds']:6.1f} s, {self.setting.left():5.0f} s left", self.log)


def run(stages: Sequence[Stage], setting: Setting, head: Result, out: Path | None) -> Result:
    """All stages that fit, each in a process that it cannot outlive; what is known stands in ``out`` at any time."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    return _Run(stages, setting, head, out).all()


def _write(result: Result, out: Path | None) -> None:
    """In one step, so that a run that is cut while it writes leaves the file of before."""
    if out is None:
        return
    draft = out.with_suffix(".part")
    draft.write_text(json.dumps(result, indent=1, default=str) + "\n")
    os.replace(draft, out)


def _say(text: str, log: Path | None) -> None:
    print(text, flush=True)
    if log is not None:
        with log.open("a") as file:
            file.write(text + "\n")


def accepted(result: Result) -> bool:
    """Every required stage that was asked for passed, and none failed; on a CPU, of those that it can run."""
    fine = {PASSED, NEEDS_GPU} if result["environment"]["type"] == "cpu" else {PASSED}
    rows = result["stages"].values()
    return bool(rows) and all(row["status"] in (fine if row.get("required", True) else fine | {CUT, SKIPPED, ABSENT}) for row in rows)


def summary(result: Result) -> str:
    """For people: the machine, a line for each stage, every requirement that does not hold, every goal that is missed, and the verdict."""
    head = result["environment"]
    lines = [f"varlen_attn {head['varlen_attn']} on {head['device']}, torch {head['torch']}, {head['date']}", ""]
    for name, row in result["stages"].items():
        required, goals = ([c for c in row.get("checks", []) if c["required"] is wanted] for wanted in (True, False))
        counts = [f"{sum(c['holds'] for c in required)} of {len(required)} checks hold"] if required else []
        counts += [f"{sum(c['holds'] for c in goals)} of {len(goals)} goals met"] if goals else []
        lines.append(f"{name:12} {row['status']:16} {row.get('seconds', 0):6.1f} s  {', '.join(counts)}".rstrip())
    for title, wanted in (("What does not hold:", True), ("Goals that are missed:", False)):
        checks = [(name, c) for name, row in result["stages"].items() for c in row.get("checks", [])]
        missed = [(name, c) for name, c in checks if not c["holds"] and c["required"] is wanted]
        lines += ["", title, *(f"  {name}: {c['name']}: {c['detail']}" for name, c in missed)] if missed else []
    lines += [f"\n{part}" for part in times(result)]
    lines += ["", *([f"Left out: {', '.join(head['without'])}"] if head.get("without") else [])]
    lines.append("ACCEPTED" if result["accepted"] else "NOT ACCEPTED")
    if head["type"] == "cpu":
        lines.append("A rehearsal on a CPU: nothing here was shown on a GPU.")
    return "\n".join(lines)


def chosen(names: Sequence[str]) -> tuple[Stage, ...]:
    """The stages named, one by one or separated by commas; all where none is."""
    wanted = _words(names)
    unknown = set(wanted) - {stage.name for stage in STAGES}
    if unknown:
        raise SystemExit(f"--only: there is no stage {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in STAGES)}")
    return tuple(stage for stage in STAGES if not wanted or stage.name in wanted)


def _words(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(word for name in names for word in name.split(",") if word)


def failed(path: Path) -> tuple[str, ...]:
    """The stages that have not passed in an earlier run."""
    stages = json.loads(path.read_text())["stages"]
    return tuple(name for name, row in stages.items() if row["status"] not in (PASSED, ABSENT, NEEDS_GPU))


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", default=(), help=f"stages: {', '.join(stage.name for stage in STAGES)}")
    parser.add_argument("--without", nargs="+", default=(), metavar="BACKEND", help="left out of every stage")
    parser.add_argument("--again", type=Path, metavar="FILE", help="what did not pass in FILE, slowly, with all errors in the log")
    parser.add_argument("--budget", type=float, help=f"seconds for all, {BUDGET:.0f} if left out; what does not fit is not passed")
    parser.add_argument("--out", type=Path, help="the JSON; of a GPU, if left out, benchmarks/results/<GPU>/acceptance.json")
    parser.add_argument("--fa3-library", type=Path, help="an .so, or .so.xz, that registers torch.ops.flash_attn_3")
    parser.add_argument("--cudart", type=Path, help="the CUDA runtime that this library was linked to, or a wheel that holds it")
    asked = parser.parse_args(arguments)
    unknown = set(_words(asked.without)) - {backend.name for backend in BACKENDS}
    if unknown:
        parser.error(f"--without: there is no backend {', '.join(sorted(unknown))}")
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    asked = options(arguments)
    began = time.monotonic()
    stages = chosen(asked.only or (failed(asked.again) if asked.again else ()))
    if asked.device == "cuda":  # matrix products under deterministic algorithms want this, and read it when they are first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if asked.again:
        os.environ |= {"CUDA_LAUNCH_BLOCKING": "1", "TORCH_SHOW_CPP_STACKTRACES": "1"}
    torch.set_num_threads(1)  # of this process, which only waits: a pool of threads would not survive a fork
    head = processes.ask(lambda: environment.facts(asked.device))
    if head is None:
        print("--device cuda: torch sees no GPU here")
        return NO_GPU
    without = _words(asked.without)
    partial = bool(asked.only or asked.again or without)
    folder = RESULTS / environment.slug(head["device"])
    out = asked.out or (folder / (PARTIAL if partial else NAME) if asked.device == "cuda" else None)
    budget = asked.budget or (math.inf if asked.again else BUDGET)
    setting = Setting(
        asked.device, began + budget, without, patient=asked.again is not None, fa3_library=asked.fa3_library, cudart=asked.cudart
    )  # fmt: skip
    signal.signal(signal.SIGTERM, _terminated)
    head |= {"only": [stage.name for stage in stages] if asked.only or asked.again else None, "without": list(without)}
    result = run(stages, setting, head, out)
    _say("\n".join(["", summary(result), *([f"written: {out}"] if out else [])]), out.with_suffix(".log") if out else None)
    return 0 if result["accepted"] else 1


def _terminated(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
