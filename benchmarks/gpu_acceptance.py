"""Accept this library on a GPU: what is claimed of it is shown there, stage by stage, in 8 minutes at most.

``python -m benchmarks.gpu_acceptance`` writes ``benchmarks/results/<GPU>/acceptance.json`` after every stage, so that a run that is cut
still tells what it had, prints a summary, and ends with status 0 only if everything required holds. A stage that the budget has no time
for is not passed. On a CPU the same stages run with small shapes, where they have anything to do: a rehearsal, which says nothing about a
GPU and writes no file unless one is named.

It needs torch, einops and a clone of this repository; flash-attn, xformers and others take part where they are installed. What is asked
is the public interface: `varlen_attention`, `padded_attention`, `varlen_mha`, `SeqLayout`, `enabled`, `record`, `explain`. A bare kernel
is called only to have something to compare with. `make gpu` runs this, and the tests of all backends on the GPU.

A library of flash-attention 3 that is not installed, only carried here, takes part with ``--fa3-library fa3.so.xz``, and
``--cudart libcudart.so.12`` where it was linked to another CUDA runtime than torch's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .acceptance import environment
from .acceptance.findings import Findings, OutOfTime, Setting, Stage, one_line, time_limit
from .acceptance.stages import STAGES
from .measure import RESULTS, use_machine
from .what_ran import times

__all__ = ["accepted", "main", "run", "summary"]

NAME, PARTIAL = "acceptance.json", "partial.json"  # a part of the stages does not replace what all of them have shown
PASSED, FAILED, CUT, SKIPPED, NEEDS_GPU, RUNNING = "passed", "failed", "cut: budget", "skipped: budget", "needs a GPU", "running"

Result = dict[str, Any]


def run(stages: Sequence[Stage], setting: Setting, head: dict[str, Any], out: Path | None) -> Result:
    """All stages that fit; what is known stands in ``out`` after each, and which one is running meanwhile."""
    result: Result = {"environment": head, "accepted": False, "stages": {}}
    for stage in stages:
        result["stages"][stage.name] = {"status": RUNNING}
        _write(result, out)
        result["stages"][stage.name] = row = _of_stage(stage, setting)
        print(f"{stage.name:12} {row['status']:16} {row['seconds']:6.1f} s", flush=True)
        _write(result, out)
    result["accepted"] = accepted(result)
    _write(result, out)
    return result


def _of_stage(stage: Stage, setting: Setting) -> Result:
    findings, began = Findings(), time.monotonic()
    row: Result = {"says": stage.says, "required": stage.required}
    if stage.needs_gpu and setting.device == "cpu":
        row["status"] = NEEDS_GPU
    elif setting.left() < (1 if setting.small else stage.seconds):
        row["status"] = SKIPPED
    else:
        row["status"] = _status(stage, setting, findings)
    return {**row, "seconds": round(time.monotonic() - began, 1), **findings.as_dict()}


def _status(stage: Stage, setting: Setting, findings: Findings) -> str:
    """Run it: whatever it raises is its failure, and not the end of the others."""
    try:
        with time_limit(setting.left()):
            stage.run(setting, findings)
    except OutOfTime:
        return CUT
    except Exception as error:
        findings.check("the stage itself", False, one_line(error, 2000))
    if not findings.checks:
        findings.check("something was checked", False)
    return FAILED if findings.failed else PASSED


def _write(result: Result, out: Path | None) -> None:
    """In one step, so that a run that is cut while it writes leaves the file of before."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_suffix(".part")
    draft.write_text(json.dumps(result, indent=1, default=str) + "\n")
    os.replace(draft, out)


def accepted(result: Result) -> bool:
    """Every required stage that was asked for passed, and none failed; on a CPU, of those that it can run."""
    fine = {PASSED, NEEDS_GPU} if result["environment"]["type"] == "cpu" else {PASSED}
    rows = result["stages"].values()
    return bool(rows) and all(row["status"] in (fine if row["required"] else fine | {CUT, SKIPPED}) for row in rows)


def summary(result: Result) -> str:
    """For people: the machine, a line for each stage, every check that does not hold, and the verdict."""
    head = result["environment"]
    lines = [f"varlen_attn {head['varlen_attn']} on {head['device']}, torch {head['torch']}, {head['date']}", ""]
    for name, row in result["stages"].items():
        checks = row.get("checks", [])
        counts = f"{sum(c['holds'] for c in checks)} of {len(checks)} checks hold" if checks else ""
        lines.append(f"{name:12} {row['status']:16} {row.get('seconds', 0):6.1f} s  {counts}".rstrip())
    missed = [(name, c) for name, row in result["stages"].items() for c in row.get("checks", []) if not c["holds"]]
    if missed:
        lines += ["", "What does not hold:"]
        lines += [f"  {name}: {c['name']}{'' if c['required'] else ' (not required)'}: {c['detail']}" for name, c in missed]
    lines += [f"\n{part}" for part in times(result)]
    lines += ["", "ACCEPTED" if result["accepted"] else "NOT ACCEPTED"]
    if head["type"] == "cpu":
        lines.append("A rehearsal on a CPU: nothing here was shown on a GPU.")
    return "\n".join(lines)


def chosen(names: str) -> tuple[Stage, ...]:
    """The stages named, separated by commas; all for an empty string."""
    wanted = [name for name in names.split(",") if name]
    unknown = set(wanted) - {stage.name for stage in STAGES}
    if unknown:
        raise SystemExit(f"--only: there is no stage {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in STAGES)}")
    return tuple(stage for stage in STAGES if not wanted or stage.name in wanted)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help=f"stages, separated by commas: {', '.join(stage.name for stage in STAGES)}")
    parser.add_argument("--budget", type=float, default=475, help="seconds for all; what does not fit is not run, and not passed")
    parser.add_argument("--out", type=Path, help="the JSON; of a GPU, if left out, benchmarks/results/<GPU>/acceptance.json")
    parser.add_argument("--fa3-library", type=Path, help="an .so, or .so.xz, that registers torch.ops.flash_attn_3")
    parser.add_argument("--cudart", type=Path, help="the CUDA runtime that this library was linked to")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    asked = options(arguments)
    stages = chosen(asked.only)
    if asked.device == "cuda":  # matrix products under deterministic algorithms want this, and read it when they are first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    use_machine(asked.device, 1 if asked.device == "cpu" else torch.get_num_threads())
    if asked.fa3_library is not None:
        environment.load_library(asked.fa3_library, asked.cudart)
    head = environment.facts(asked.device)
    folder = RESULTS / environment.slug(head["device"])
    out = asked.out or (folder / (PARTIAL if asked.only else NAME) if asked.device == "cuda" else None)
    deadline = time.monotonic() + asked.budget if math.isfinite(asked.budget) else math.inf
    result = run(stages, Setting(asked.device, deadline), {**head, "only": asked.only or None}, out)
    print("", summary(result), *([f"written: {out}"] if out else []), sep="\n")
    return 0 if result["accepted"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
