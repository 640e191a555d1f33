"""What has run on which GPU: ``results/*/acceptance.json`` to Markdown, for the README."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .markdown import table
from .measure import RESULTS

__all__ = ["BEGIN", "END", "block", "load", "times"]

BEGIN, END = "<!-- acceptance: begin (python -m benchmarks.report writes this block) -->", "<!-- acceptance: end -->"
NOTHING = "No run on a GPU is recorded. `make gpu` makes one, with a table for here."
_CELLS = {True: "yes", False: "**no**", None: "-"}
_SHOWN = 8  # statements that do not hold

Result = Mapping[str, Any]


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All recorded runs on GPUs, by the name of their folder."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*/acceptance.json"))]
    return [result for result in found if result["environment"]["type"] != "cpu"]


def block(results: Sequence[Result]) -> str:
    """What stands between the markers of the README."""
    return "\n\n".join(part for result in results for part in _of_gpu(result)) if results else NOTHING


def _of_gpu(result: Result) -> list[str]:
    head = result["environment"]
    cuda = ", ".join(f"{what} {head[key]}" for key, what in (("cuda", "CUDA"), ("driver", "driver"), ("cudnn", "cuDNN")) if head.get(key))
    verdict = "accepted" if result["accepted"] else "**not accepted**"
    parts = [
        f"**{head['device']}** (compute capability {head['capability']}), torch {head['torch']}, {cuda}, "
        f"varlen_attn {head['varlen_attn']}, {head['date']}: {verdict}.",
        table(["stage", "shows", "result"], [[name, row.get("says", ""), _told(row)] for name, row in result["stages"].items()]),
    ]
    missed = [f"{name}, {c['name']}: {c['detail']}" for name, row in result["stages"].items() for c in _missed(row)]
    if missed:
        more = [f"- and {len(missed) - _SHOWN} more"] if len(missed) > _SHOWN else []
        parts.append("\n".join(["What does not hold:", "", *(f"- {_plain(line)}" for line in missed[:_SHOWN]), *more]))
    return [*parts, *_backends(result), *times(result)]


def _told(row: Result) -> str:
    checks = row.get("checks", [])
    status = row["status"] if row["status"] == "passed" else f"**{row['status']}**"
    return f"{status}, {sum(c['holds'] for c in checks)} of {len(checks)}" if checks else status


def _missed(row: Result) -> list[dict[str, Any]]:
    return [c for c in row.get("checks", []) if c["required"] and not c["holds"]]


def _plain(text: str) -> str:
    """One line that no Markdown is read into."""
    return " ".join(text.split())[:200].replace("|", "\\|").replace("<", "\\<")


def _backends(result: Result) -> list[str]:
    """A line for each backend that was here: what of it holds; a dash where it refuses, or was not asked."""
    stages = result["stages"]
    names = [name for name, state in stages.get("env", {}).get("facts", {}).get("backends", {}).items() if state == "available"]
    lines = []
    for name in names:
        numbers = stages.get("numerics", {}).get("facts", {}).get(name)
        kernels = stages.get("kernels", {}).get("facts", {}).get(name)
        if numbers is None:
            continue
        forward = kernels["forward"][0] if isinstance(kernels, dict) and kernels["forward"] else "-"
        asked = (_holds(stages, stage, name) for stage in ("numerics", "nosync", "graph", "determinism", "memory", "traps"))
        lines.append([name, numbers["ran"], _plain(forward)[:60], *(_CELLS[cell] for cell in asked)])
    if not lines:
        return []
    header = [
        "backend",
        "cases",
        "kernel",
        "as float64",
        "nobody waits",
        "one CUDA graph",
        "same bits",
        "memory by tokens",
        "no known trap",
    ]
    return [table(header, lines)]


def _holds(stages: Mapping[str, Result], stage: str, backend: str) -> bool | None:
    """All checks of a stage that begin with the backend's name; None if there is none."""
    found = [c["holds"] for c in stages.get(stage, {}).get("checks", []) if c["name"].split(",")[0] == backend]
    return all(found) if found else None


def times(result: Result) -> list[str]:
    """Times on the device, of the automatic choice and of torch's."""
    rows = result["stages"].get("timing", {}).get("facts", {}).get("rows", [])
    lines = [[row["shape"], row["auto"], *_line(row, "forward"), *_line(row, "forward+backward")] for row in rows]
    if not lines:
        return []
    header = [rows[0].get("dtype", "bfloat16"), "backend"]
    for way in ("forward", "forward+backward"):
        header += [f"{way}: torch with a mask, us", "ours with packing, us", "times faster", "ours packed before, times faster"]
    return [table(header, lines)]


def _line(row: Result, direction: str) -> list[str]:
    found = row.get(direction, {})
    taken, faster = found.get("microseconds", {}), found.get("times faster than torch, mask", {})
    whole, kernel = "ours, whole path, auto", "ours, kernel only, auto"
    cells = [(taken, "torch, mask", ".0f"), (taken, whole, ".0f"), (faster, whole, ".2f"), (faster, kernel, ".2f")]
    return [format(values[name], form) if name in values else "-" for values, name, form in cells]
