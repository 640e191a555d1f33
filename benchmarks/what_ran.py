"""What has run on which GPU: ``results/*/acceptance.json`` to Markdown, for docs/gpu.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .acceptance.stages import STAGES
from .markdown import table
from .measure import RESULTS

__all__ = ["BEGIN", "END", "block", "load", "times"]

BEGIN, END = "<!-- acceptance: begin (python -m benchmarks.report writes this block) -->", "<!-- acceptance: end -->"
NOTHING = "No run on a GPU is recorded."
NOT_RUN = "has not run"
_CELLS = {True: "yes", False: "**no**", None: "-"}
_SHOWN = 8  # statements that do not hold

Result = Mapping[str, Any]


def load(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All recorded runs on GPUs, by the name of their folder."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*/acceptance.json"))]
    return [result for result in found if result["environment"]["type"] != "cpu"]


def block(results: Sequence[Result]) -> str:
    """What stands between the markers of docs/gpu.md."""
    if not results:
        return f"{NOTHING}\n\n{_stages({})}"
    return "\n\n".join(part for result in results for part in _of_gpu(result))


def _stages(found: Mapping[str, Result]) -> str:
    """A line for each stage, those that have not run too."""
    stages = {stage.name: {"status": NOT_RUN, **found.get(stage.name, {}), "says": stage.says} for stage in STAGES}
    rows: dict[str, Result] = {**found, **stages}
    return table(["stage", "shows", "result"], [[name, row.get("says", ""), _told(row)] for name, row in rows.items()])


def _of_gpu(result: Result) -> list[str]:
    head = result["environment"]
    cuda = ", ".join(f"{what} {head[key]}" for key, what in (("cuda", "CUDA"), ("driver", "driver"), ("cudnn", "cuDNN")) if head.get(key))
    verdict = "accepted" if result["accepted"] else "**not accepted**"
    parts = [
        f"**{head['device']}** (compute capability {head['capability']}), torch {head['torch']}, {cuda}, "
        f"varlen_attn {head['varlen_attn']}, {head['date']}: {verdict}.",
        _stages(result["stages"]),
    ]
    missed = [f"{name}, {c['name']}: {c['detail']}" for name, row in result["stages"].items() for c in _missed(row)]
    if missed:
        more = [f"- and {len(missed) - _SHOWN} more"] if len(missed) > _SHOWN else []
        parts.append("\n".join(["What does not hold:", "", *(f"- {_plain(line)}" for line in missed[:_SHOWN]), *more]))
    return [*parts, *_backends(result), *times(result)]


def _told(row: Result) -> str:
    status = row["status"] if row["status"] in ("passed", "not here", NOT_RUN) else f"**{row['status']}**"
    told = [status]
    for wanted, word in ((True, ""), (False, " goals")):
        checks = [c for c in row.get("checks", []) if c["required"] is wanted]
        told += [f"{sum(c['holds'] for c in checks)} of {len(checks)}{word}"] if checks else []
    return ", ".join(told)


def _missed(row: Result) -> list[dict[str, Any]]:
    return [c for c in row.get("checks", []) if c["required"] and not c["holds"]]


def _plain(text: str) -> str:
    """One line that no Markdown is read into."""
    return " ".join(text.split())[:200].replace("|", "\\|").replace("<", "\\<")


def _backends(result: Result) -> list[str]:
    """A line for each backend that was here: what of it holds; a dash where it refuses, or was not asked."""
    stages = result["stages"]
    names = [name for name, state in result["environment"].get("backends", {}).items() if state == "available"]
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
        "no waiting",
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
    """Whole models by the clock, then one attention by the device."""
    return [*_of_models(result), *_of_attention(result)]


def _of_models(result: Result) -> list[str]:
    rows = [row for stage in ("encoders", "bert") for row in result["stages"].get(stage, {}).get("facts", {}).get("rows", [])]
    lines = []
    for row in rows:
        for way in ("evaluation", "training"):
            found = row.get(way, {})
            taken, faster = found.get("milliseconds", {}), found.get("times faster than as it comes", {})
            if "as it comes" in taken:
                cells = [
                    (taken, "as it comes"),
                    (taken, "after enable"),
                    (faster, "after enable"),
                    (faster, "after enable, lengths on the host"),
                ]
                lines.append(
                    [row["model"], row["tokens"], way, *(format(values[name], ".2f") if name in values else "-" for values, name in cells)]
                )
    header = ["model", "tokens", "", "as it comes, ms", "after `enable`, ms", "times faster", "times faster, lengths on the host"]
    return [table(header, lines)] if lines else []


def _of_attention(result: Result) -> list[str]:
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
