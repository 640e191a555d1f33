"""What all tables of results are written with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["DISTURBED", "NEAR", "machine", "setting", "table", "threads_of", "widest"]

DISTURBED = 0.2  # share of the machine taken by others, above which two threads say nothing: left out of pages, no goal is judged
NEAR = 0.95  # a goal is met when the median ratio reaches this share of it


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine(environment: dict[str, Any]) -> str:
    """The GPU, else the CPU with its instructions."""
    gpu: str | None = environment.get("gpu", environment.get("device"))
    return gpu or f"{environment['cpu']} ({environment['cpu_capability']})"


def setting(environment: dict[str, Any]) -> str:
    return f"{machine(environment)}, torch {environment['torch']}"


def widest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the most threads."""
    most = max(r["threads"] for r in rows)
    return [r for r in rows if r["threads"] == most]


def threads_of(number: int) -> str:
    return "one thread" if number == 1 else f"{number} threads"
