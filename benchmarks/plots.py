"""The pictures of the documentation: speed against fill, time and memory against length. Drawn by matplotlib, which only this file knows.

The file is the same for the same results: no dates, no random names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .bench_length import PACKED, PADDED, SCORES
from .markdown import widest

__all__ = ["FILL", "LENGTH", "available", "draw"]

FILL = "fill.svg"
LENGTH = "length.svg"
NEEDS = {FILL: {"encoder", "transformers"}, LENGTH: {"length"}}  # results, by picture
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
    figures = {
        FILL: lambda: _fill(results["encoder"]["rows"], results["transformers"]["rows"]),
        LENGTH: lambda: _length(results["length"]["rows"]),
    }
    drawn = [name for name in figures if NEEDS[name] <= set(results)]
    for name in drawn:
        with matplotlib.rc_context(_STYLE):
            figures[name]().savefig(folder / name, metadata={"Date": None})
        _trim(folder / name)
    return drawn


def _trim(path: Path) -> None:
    """matplotlib leaves blanks at line ends."""
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def points(encoders: list[dict[str, Any]], models: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Fill and speedup of whole models in evaluation, float32; of encoders against the faster of torch's two ways."""
    shown = [row for row in widest(encoders) if row["dtype"] == "float32" and row["direction"] == "eval"]
    found = {"nn.TransformerEncoder": [(_fill_of(row), min(row["ratio"]["ours"], row["ratio_on"])) for row in shown]}
    for part, label in (("text", "MiniLM"), ("encode", "SentenceTransformer.encode"), ("audio", "wav2vec 2.0")):
        found[label] = [(_fill_of(row), row["ratio"]["model"]) for row in widest([row for row in models if row["part"] == part])]
    return found


def _fill_of(row: dict[str, Any]) -> float:
    return float(re.search(r"fill (\d\.\d+)", row["batch"])[1])  # type: ignore[index]


def _fill(encoders: list[dict[str, Any]], models: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    panel = figure.subplots()
    fills = [0.12 + 0.01 * step for step in range(89)]
    panel.plot(fills, [1 / fill for fill in fills], "--", color="grey", linewidth=1, label="1 / share of real tokens")
    for (label, shown), marker in zip(points(encoders, models).items(), "osD^", strict=True):
        panel.plot([x for x, _ in shown], [y for _, y in shown], marker, markersize=6, label=label)
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set(xlabel="share of the batch that is real tokens", ylabel="times faster after enable(model)", xlim=(0.1, 1.02), ylim=(0, 8))
    panel.legend(fontsize=8)
    return figure


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
