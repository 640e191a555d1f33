"""The picture of the README: time and memory against length. Drawn by matplotlib, which only this file knows.

The file is the same for the same results: no dates, no random names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .bench_length import PACKED, PADDED, SCORES
from .markdown import widest

__all__ = ["LENGTH", "available", "draw"]

LENGTH = "length.svg"
_STYLE: Any = {"svg.hashsalt": "varlen_attn", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
_COLOURS = ("tab:blue", "tab:orange", "tab:green")


def available() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(results: dict[str, dict[str, Any]], folder: Path) -> list[str]:
    """Draw what has been measured; the names of the files."""
    import matplotlib

    matplotlib.use("svg")
    if "length" not in results:
        return []
    with matplotlib.rc_context(_STYLE):
        _length(results["length"]["rows"]).savefig(folder / LENGTH, metadata={"Date": None})
    _trim(folder / LENGTH)
    return [LENGTH]


def _trim(path: Path) -> None:
    """matplotlib leaves blanks at line ends."""
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def _length(rows: list[dict[str, Any]]) -> Any:
    """Time and memory against columns; a cross at the limit is one that does not fit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rows = sorted((row for row in widest(rows) if row["dtype"] == "float32"), key=lambda row: row["length"])
    times, memory = figure.subplots(1, 2)
    limit = rows[0]["limit_gb"] * 1e3
    for colour, name in zip(_COLOURS, (SCORES, PADDED, PACKED), strict=False):
        timed = [(row["length"], row["milliseconds"][name]) for row in rows if name in row["milliseconds"]]
        times.plot([x for x, _ in timed], [y for _, y in timed], "o-", color=colour, markersize=3, label=name)
        fits = [(row["length"], row["megabytes"][name]) for row in rows if row["megabytes"][name] is not None]
        memory.plot([x for x, _ in fits], [y for _, y in fits], "o-", color=colour, markersize=3, label=name)
        beyond = [row["length"] for row in rows if row["megabytes"][name] is None]
        memory.plot(beyond, [limit] * len(beyond), "x", color=colour, markersize=8)
    memory.axhline(limit, color="black", linewidth=0.8)
    for panel, label in ((times, "ms, forward"), (memory, f"MB, one step of training (limit {rows[0]['limit_gb']:g} GB)")):
        panel.set(xscale="log", yscale="log", xlabel="columns S; two rows, the second an eighth as long", ylabel=label)
        panel.set_xticks([row["length"] for row in rows], labels=[str(row["length"]) for row in rows])
        panel.minorticks_off()
    times.legend(fontsize=8)
    return figure
