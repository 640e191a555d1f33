"""What the programs of docs/reliability.md found last, from ``results/reliability.json``, ``mutants.json`` and ``mutants_native.json``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .markdown import setting, table
from .measure import RESULTS

__all__ = ["BEGIN", "END", "block"]

BEGIN, END = "<!-- lanes: begin (python -m benchmarks.report writes this block) -->", "<!-- lanes: end -->"
_APART = ("environment", "seconds")


def block(folder: Path = RESULTS) -> str:
    """What is between the markers of docs/reliability.md; what has not run is left out."""
    lanes, mutants, by_hand = (_read(folder / f"{name}.json") for name in ("reliability", "mutants", "mutants_native"))
    parts = []
    if lanes:
        rows = [[name, _figures(found), f"{found['seconds'] / 60:.0f}" if "seconds" in found else ""] for name, found in lanes.items()]
        machines = sorted({setting(found["environment"]) for found in lanes.values()})
        parts += [table(["program", "found", "minutes"], rows), f"On {'; '.join(machines)}."]
    if mutants:
        parts += _mutants(mutants, by_hand)
    return "\n\n".join(parts)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _figures(found: Mapping[str, Any]) -> str:
    """Every number with its name."""
    said = []
    for name, value in found.items():
        if name not in _APART:
            inside = value.items() if isinstance(value, dict) else [(name, value)]
            said += [
                f"{str(key).replace('_', ' ')}: {n:,}" if isinstance(n, int) else f"{str(key).replace('_', ' ')}: {n}" for key, n in inside
            ]
    return ", ".join(said)


def _mutants(found: Mapping[str, Any], by_hand: Mapping[str, Any]) -> list[str]:
    rows = found["mutants"]
    drawn, seen = (Counter(Path(row["path"]).parts[1] for row in rows if row["by"] or every) for every in (True, False))
    lines = [[part, seen[part], drawn[part]] for part in sorted(drawn)]
    lines += [["all", f"**{found['seen']}**", found["of"]]]
    if by_hand:
        lines += [["the compiled kernel, by hand", by_hand["seen"], by_hand["of"]]]
    low, high = found["interval"]
    named = [(row["path"].removeprefix("varlen_attn/"), row) for row in rows if not row["by"] and not row.get("equal")]
    unseen = [
        f"- `{path}`, line {row['line']}, `{row['old']}` as `{row['new']}`: {row.get('why', 'no reason is known yet')}"
        for path, row in named
    ]
    unseen += [
        f"- `{row['path']}`, {row['what']}: {row.get('why', 'no reason is known yet')}"
        for row in by_hand.get("mutants", ())
        if not row["by"]
    ]
    equal = sum(row.get("equal", False) for row in rows)
    share, between = found["seen"] / (found["of"] - equal), f"{low:.0%} to {high:.0%}"
    return [
        f"Of {found['of']} faults (seed {found['seed']}) the tests see {found['share']:.0%} ({between}). {equal} others change no "
        f"result, only time for example. Of those that can change one, {share:.0%} are seen. All are in `benchmarks/results/mutants.json`.",
        table(["part", "seen", "faults"], lines),
        "Those that could change a result, and are not seen:",
        "\n".join(unseen),
    ]
