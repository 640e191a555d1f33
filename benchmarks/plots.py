"""The pictures of the README: speed-up against fill, and time and memory against length. Drawn by matplotlib, which only this file knows.

The files are the same for the same results: no dates, no random names.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .bench_length import PACKED, PADDED, SCORES
from .markdown import threads_of, widest

__all__ = ["FILL", "LENGTH", "available", "break_even", "draw"]

FILL, LENGTH = "fill.svg", "length.svg"
_STYLE: Any = {"svg.hashsalt": "varlen_attn", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")


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
    written = []
    with matplotlib.rc_context(_STYLE):
        for name, source, make in ((FILL, "route", _fill), (LENGTH, "length", _length)):
            if source in results:
                figure = make(results[source]["rows"])
                figure.savefig(folder / name, metadata={"Date": None})
                _trim(folder / name)
                written.append(name)
    return written


def _trim(path: Path) -> None:
    """matplotlib leaves blanks at line ends."""
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def break_even(points: Sequence[tuple[float, float]]) -> float | None:
    """The fill from which on packing loses: where the line of ``(fill, ratio)`` last goes below 1. None if it never does, 0 if always."""
    ordered = sorted(points)
    if not ordered or ordered[-1][1] >= 1:
        return None
    for (fill, ratio), (next_fill, next_ratio) in reversed(list(pairwise(ordered))):
        if ratio >= 1:
            return fill + (ratio - 1) / (ratio - next_ratio) * (next_fill - fill)
    return 0.0


def _fill(rows: list[dict[str, Any]]) -> Any:
    """Two panels, forward and with the backward; a colour for each length, dashes where rows are packed already."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rows = widest(rows)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, direction in zip(panels, ("forward", "forward+backward"), strict=True):
        chosen = [row for row in rows if row["direction"] == direction]
        for colour, (batch, columns) in zip(
            _COLOURS, sorted({(r["batch"], r["padded_len"]) for r in chosen}, key=lambda p: p[1]), strict=False
        ):
            line = sorted((_real_fill(r), r["ratio"], r.get("ratio_rows")) for r in chosen if r["padded_len"] == columns)
            panel.plot([x for x, *_ in line], [y for _, y, _ in line], "o-", color=colour, markersize=3, label=f"{batch} x {columns}")
            already = [(x, y) for x, _, y in line if y is not None]
            panel.plot([x for x, _ in already], [y for _, y in already], ":", color=colour)
            loses = break_even([(x, y) for x, y, _ in line])
            if loses:
                panel.plot([loses], [1], "x", color=colour)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(title=direction, xlabel="fill: tokens / positions", yscale="log")
        panel.set_yticks([0.5, 1, 2, 5, 10], labels=["0.5", "1", "2", "5", "10"])
    panels[0].set_ylabel("times faster than masked SDPA")
    panels[1].legend(title="B x S", fontsize=8)
    figure.suptitle(
        "Solid: packed and unpacked for the one call (x: loses from here on). Dotted: packed already. float32, "
        + threads_of(rows[0]["threads"]),
        fontsize=9,
    )
    return figure


def _real_fill(row: dict[str, Any]) -> float:
    return float(row.get("real_fill", row["fill"]))


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
