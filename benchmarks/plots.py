"""The pictures of the results, for each machine that has some: speed against fill, time and memory against length, losses of a training,
speed on a GPU, and beside inference engines. Drawn by matplotlib, which only this file knows.

The file is the same for the same results: no dates, no random names.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from . import bench_balance as balancing
from . import bench_curves as curves
from .bench_attention import DIRECTIONS, PLAIN
from .bench_engines import ENGINES as OTHERS
from .bench_engines import OURS, ROWS
from .bench_length import PACKED, PADDED, SCORES
from .markdown import machine, threads_of, widest

__all__ = ["BALANCE", "CURVES", "ENGINES", "FILL", "GPU", "GRIDS", "LENGTH", "SAYS", "available", "draw", "files"]

Results = dict[str, dict[str, Any]]
FILL, LENGTH, CURVES, GPU, BALANCE, ENGINES = "fill", "length", "curves", "gpu", "balance", "engines"
GRIDS = ("grid_avx2", "grid_avx512")
NEEDS = {
    FILL: {"encoder", "transformers"}, LENGTH: {"length"}, CURVES: {"curves"}, GPU: {"acceptance"}, BALANCE: {"balance"},
    ENGINES: {"engines"},
    **{name: {name} for name in GRIDS},
}  # fmt: skip
SAYS = {
    FILL: "Speedup of whole models against the share of real tokens",
    LENGTH: "Time and memory of one layer against length, padded and packed, up to 16384 columns",
    CURVES: "Losses of a padded and a packed training: the same over steps, and earlier over time for the packed one",
    GPU: "Speedups of whole models and of one attention on a GPU",
    BALANCE: "Share of the time that ranks wait for the slowest one, against the number of ranks, by sampler",
    ENGINES: "Speedups on a CPU after `enable`, and in inference engines, by batch",
    **dict.fromkeys(GRIDS, "Speedup of the compiled kernel over torch's kernel, by tokens of a sequence and head dimension"),
}
_STYLE: Any = {"svg.hashsalt": "varlen_attn", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:grey")


def available() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def files(results: Results, folder: str = "") -> dict[str, str]:
    """The file of each picture that these results are enough for; ``folder`` is that of a further machine in ``results/``."""
    ending = f"-{folder}.svg" if folder else ".svg"
    return {picture: f"{picture}{ending}" for picture, needs in NEEDS.items() if needs <= set(results)}


def draw(results: Results, into: Path, folder: str = "") -> list[str]:
    """Draw what has been measured; the names of the files."""
    import matplotlib

    matplotlib.use("svg")
    figures: dict[str, Callable[[], Any]] = {
        FILL: lambda: _fill(results["encoder"], results["transformers"]["rows"]),
        LENGTH: lambda: _length(results["length"]),
        CURVES: lambda: _curves(results["curves"]),
        GPU: lambda: _gpu(results["acceptance"]),
        BALANCE: lambda: _balance(results["balance"]["rows"]),
        ENGINES: lambda: _engines(results["engines"]),
        **{name: partial(_grid, results.get(name)) for name in GRIDS},
    }
    drawn = files(results, folder)
    for picture, name in drawn.items():
        with matplotlib.rc_context(_STYLE):
            figures[picture]().savefig(into / name, metadata={"Date": None})
        _trim(into / name)
    return list(drawn.values())


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


def _where(result: dict[str, Any]) -> str:
    return f"{machine(result['environment'])}, {threads_of(max(row['threads'] for row in result['rows']))}, float32"


def _fill(encoders: dict[str, Any], models: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    panel = figure.subplots()
    fills = [0.12 + 0.01 * step for step in range(89)]
    panel.plot(fills, [1 / fill for fill in fills], "--", color="grey", linewidth=1, label="1 / share of real tokens")
    for (label, shown), marker in zip(points(encoders["rows"], models).items(), "osD^", strict=True):
        panel.plot([x for x, _ in shown], [y for _, y in shown], marker, markersize=6, label=label)
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set(xlabel="share of the batch that is real tokens", ylabel="times faster after enable(model)", xlim=(0.1, 1.02), ylim=(0, 8))
    panel.set_title(f"evaluation in float32, {machine(encoders['environment'])}", fontsize=9)
    panel.legend(fontsize=8)
    return figure


def _curves(result: dict[str, Any]) -> Any:
    """The losses over steps, their difference, and the losses over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rows = {row["what"]: row for row in widest(result["rows"])}
    steps, difference, time = figure.subplots(1, 3)
    styles = {curves.PADDED: ("-", 4, "tab:orange"), curves.PACKED: ("-", 1, "tab:blue"), curves.OTHER: ("-", 0.8, "grey")}
    for name, (line, width, colour) in styles.items():
        losses, seconds = rows[name]["losses"], rows[name]["seconds"]
        steps.plot(losses, line, linewidth=width, color=colour, label=name, alpha=0.6 if width > 1 else 1)
        if name != curves.PADDED:
            apart = [max(abs(x - y), 1e-8) for x, y in zip(losses, rows[curves.PADDED]["losses"], strict=True)]
            difference.plot(apart, linewidth=0.8, color=colour)
        if name != curves.OTHER:
            taken = [sum(seconds[: step + 1]) for step in range(len(seconds))]
            time.plot(taken, losses, line, linewidth=1, color=colour)
    difference.set_yscale("log")
    steps.set(xlabel="step", ylabel="loss")
    difference.set(xlabel="step (0 is drawn at 1e-8)", ylabel="difference from the padded loss")
    time.set(xlabel="seconds", ylabel="loss")
    steps.legend(fontsize=8, loc="lower left")
    figure.suptitle(f"a text classifier on docstrings, fill {rows[curves.PACKED]['fill']}, {_where(result)}", fontsize=9)
    return figure


def _balance(rows: list[dict[str, Any]]) -> Any:
    """Against ranks, for documents of two budgets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, data in zip(panels, ("log-normal", "long context"), strict=True):
        shown = sorted((row for row in rows if row["what"] == balancing.IDLE and row["data"] == data), key=lambda row: row["ranks"])
        for name in shown[0]["idle"]:
            label = f"{name}, no budget" if name in shown[0]["tokens"] else name
            panel.plot([row["ranks"] for row in shown], [100 * row["idle"][name] for row in shown], "o-", markersize=3, label=label)
        panel.set(xscale="log", xlabel="ranks", title=f"{data}, budget {shown[0]['budget']}", ylim=(0, 100))
        panel.set_xticks(ranks := [row["ranks"] for row in shown], labels=[str(x) for x in ranks])
        panel.minorticks_off()
    panels[0].set_ylabel("% of the time idle")
    panels[0].legend(fontsize=7, loc="upper left")
    return figure


def _gpu(result: dict[str, Any]) -> Any:
    """Bars of how many times faster: whole models, and one attention between padded tensors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    stages = result["stages"]
    models = [row for stage in ("encoders", "bert") for row in _facts(stages, stage)]
    _bars(panels[0], models, "model", ("evaluation", "training"), "times faster than as it comes", "after enable")
    one = _facts(stages, "timing")
    _bars(panels[1], one, "shape", ("forward", "forward+backward"), "times faster than torch, mask", "ours, whole path, auto")
    panels[0].set_xlabel("times faster after enable(model)")
    panels[1].set_xlabel("times faster than torch with a mask")
    figure.suptitle(f"{machine(result['environment'])}, torch {result['environment']['torch']}, bfloat16", fontsize=9)
    return figure


def _engines(result: dict[str, Any]) -> Any:
    """Bars of how many times faster than the model as it came, a panel for each number of threads."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    order, numbers = list(ROWS), sorted({row["threads"] for row in result["rows"]})
    for panel, threads in zip(figure.subplots(1, len(numbers), squeeze=False)[0], numbers, strict=True):
        rows = sorted((row for row in result["rows"] if row["threads"] == threads), key=lambda row: order.index(row["what"]))
        ways = tuple(name for name in (*OURS, *OTHERS) if any(name in row["ratio"] for row in rows))
        _bars(panel, [{"what": row["what"], **dict.fromkeys(ways, row)} for row in rows], "what", ways, "ratio", None)
        panel.set_xlabel(f"times faster than as it came, {threads_of(threads)}")
    figure.suptitle(f"{machine(result['environment'])}, torch {result['environment']['torch']}, float32", fontsize=9)
    return figure


def _grid(result: Any) -> Any:
    """The compiled kernel against torch's, on sequences of equal lengths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rows = [row for row in widest(result["rows"]) if row["what"] == PLAIN]
    for panel, way in zip(figure.subplots(1, 2, sharey=True), DIRECTIONS, strict=True):
        for width in sorted({row["head_dim"] for row in rows}):
            shown = sorted((row["length"], row["ratio"]) for row in rows if (row["head_dim"], row["direction"]) == (width, way))
            panel.plot([x for x, _ in shown], [y for _, y in shown], "o-", markersize=3, label=f"head dimension {width}")
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(xscale="log", xlabel="tokens of a sequence", title=way)
        panel.set_ylim(bottom=0)
        panel.set_xticks(lengths := sorted({row["length"] for row in rows}), labels=[str(x) for x in lengths], fontsize=7)
        panel.minorticks_off()
    figure.axes[0].set_ylabel("times faster than torch's kernel")
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(_where(result), fontsize=9)
    return figure


def _facts(stages: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = stages.get(stage, {}).get("facts", {}).get("rows", [])
    return found


def _bars(panel: Any, rows: list[dict[str, Any]], label: str, ways: tuple[str, ...], ratio: str, name: str | None) -> None:
    """One group for each row, one bar for each way, whose ratio is that of ``name``, or its own."""
    height = 0.8 / len(ways)
    for number, way in enumerate(ways):
        key = name or way
        shown = [(place, row[way][ratio][key]) for place, row in enumerate(rows) if key in row.get(way, {}).get(ratio, {})]
        places = [place + height * (number + 0.5) - 0.4 for place, _ in shown]
        bars = panel.barh(places, [x for _, x in shown], height=0.95 * height, color=_COLOURS[number], label=way)
        panel.bar_label(bars, fmt="%.2f", fontsize=7 if len(ways) < 4 else 5, padding=2)
    panel.set_yticks(range(len(rows)), labels=[row[label] for row in rows], fontsize=7)
    panel.axvline(1, color="black", linewidth=0.8)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.grid(visible=False, axis="y")
    panel.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(ways) if len(ways) < 4 else 2, frameon=False)


def _length(result: dict[str, Any]) -> Any:
    """Time and memory against columns; a cross at the limit is one that does not fit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(_where(result), fontsize=9)
    rows = sorted((row for row in widest(result["rows"]) if row["dtype"] == "float32"), key=lambda row: row["length"])
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
