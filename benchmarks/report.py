"""JSON to Markdown: ``results/tables.md``, and the block between the benchmark markers of README.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measure import RESULTS
from .workloads import WORKLOADS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin (make bench writes this block) -->", "<!-- benchmarks: end -->"
DISTURBED = 0.2  # share of the machine taken by others, above which two threads say nothing: left out of the README, no goal is judged
NEAR = 0.95  # a goal is met when the median ratio reaches this share of it


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def setting(environment: dict[str, Any]) -> str:
    facts = environment
    return f"{facts['cpu']} ({facts['cpu_capability']}), torch {facts['torch']}"


def attention(rows: list[dict[str, Any]], dtype: str) -> str:
    """Times and ratios of one dtype."""
    header = ["batch", "", "masked, ms", "packed, ms", "**ratio**", "with pack and unpack", "same against same", "others", "goal"]
    order = {w.name: i for i, w in enumerate(WORKLOADS)}
    chosen = [r for r in rows if r["dtype"] == dtype]
    lines = []
    for row in sorted(chosen, key=lambda r: (order[r["workload"]], r["direction"])):
        times, ratios, goal = row["milliseconds"], row["ratio"], row["goal"]
        met = (
            "disturbed"
            if row["foreign"] > DISTURBED
            else ""
            if goal is None
            else f"{goal} " + ("met" if ratios["packed"] >= NEAR * goal else "**missed**")
        )
        lines.append(
            [row["workload"], row["direction"], f"{times['masked']:.1f}", f"{times['packed']:.1f}", f"**{ratios['packed']:.2f}**",
             f"{ratios['pack+unpack']:.2f}", f"{ratios['masked again']:.2f}", f"{row['foreign']:.0%}", met]
        )  # fmt: skip
    return table(header, lines)


def against_dense(rows: list[dict[str, Any]]) -> str:
    """w5 has no padding, so that the unmasked call is its fair competitor."""
    lines = [
        [r["dtype"], r["direction"], f"{r['milliseconds']['dense']:.1f}", f"{r['milliseconds']['packed']:.1f}", f"{r['ratio_dense']:.2f}"]
        for r in rows
        if r["ratio_dense"] is not None
    ]
    return table(["dtype", "", "unmasked SDPA, ms", "ours, ms", "ratio"], lines)


def route(rows: list[dict[str, Any]]) -> str:
    """Ratio by fill, a line for each batch shape and direction."""
    fills = sorted({r["fill"] for r in rows})
    cells = {(r["batch"], r["padded_len"], r["direction"], r["fill"]): r["ratio"] for r in rows}
    groups = dict.fromkeys((r["batch"], r["padded_len"], r["direction"]) for r in sorted(rows, key=lambda r: r["padded_len"]))
    lines = [[f"B {b}, S {s}, {d}", *[f"{cells.get((b, s, d, fill), float('nan')):.2f}" for fill in fills]] for b, s, d in groups]
    return table(["masked / packed", *[f"fill {fill}" for fill in fills]], lines)


def dispatch(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        unit = "microseconds" if "microseconds" in row else "milliseconds"
        met = "met" if row[unit] <= row["goal"] / NEAR else "**missed**"
        lines.append([row["what"], f"{row[unit]} {unit}", f"at most {row['goal']:.0f}: {met}"])
    return table(["what", "measured", "goal"], lines)


def batches() -> str:
    return "\n".join(f"- {workload}" for workload in WORKLOADS)


def summary(rows: list[dict[str, Any]]) -> str:
    """The short table of the README: float32 and bfloat16 ratios, on two threads or whatever the most is."""
    most = max(r["threads"] for r in rows)
    rows = [r for r in rows if r["threads"] == most]
    cells = {(r["workload"], r["dtype"], r["direction"]): f"{r['ratio']['packed']:.1f}" for r in rows if r["foreign"] <= DISTURBED}
    columns = [(d, way) for d in ("float32", "bfloat16") for way in ("forward", "forward+backward")]
    lines = [
        [f"{w.name}: {w.says}", f"B {len(w.lengths)}, S {w.padded_len}", f"{w.fill:.2f}", *[cells.get((w.name, *c), "?") for c in columns]]
        for w in WORKLOADS
    ]
    return table(["", "batch", "fill", *[f"{d} {way}" for d, way in columns]], lines)


def _attention_parts(rows: list[dict[str, Any]]) -> list[str]:
    parts = []
    for threads in sorted({r["threads"] for r in rows}, reverse=True):
        chosen = [r for r in rows if r["threads"] == threads]
        for dtype in ("float32", "bfloat16"):
            if any(r["dtype"] == dtype for r in chosen):
                parts += [f"## Attention, {dtype}, {_threads(threads)}", attention(chosen, dtype)]
        parts += [f"## No padding (w5), against SDPA without a mask, {_threads(threads)}", against_dense(chosen)]
    return parts


def _route_parts(rows: list[dict[str, Any]]) -> list[str]:
    parts = []
    for threads in sorted({r["threads"] for r in rows}, reverse=True):
        title = f"## Route: pack, attend, unpack against the masked call, float32, {_threads(threads)}"
        parts += [title, route([r for r in rows if r["threads"] == threads])]
    return parts


def _threads(number: int) -> str:
    return "one thread" if number == 1 else f"{number} threads"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ("attention", "route", "dispatch")}
    rows = results["attention"]["rows"]
    where = setting(results["attention"]["environment"])
    parts = [
        "# Results",
        f"{where}. Written by `python -m benchmarks.report`.",
        "Every ratio is the median over interleaved rounds of one run, each contestant verified against float64 before. "
        '"Masked" is `F.scaled_dot_product_attention` with a bool mask on `(B, N, S, H)`; 8 heads of 64; "same against same" is the masked '
        'call against itself, that is the noise; "others" is the share of the machine that other processes took, which disturbs '
        "two threads more than one. One thread is timed by its CPU time, two by the wall clock.",
        batches(),
        *_attention_parts(rows),
        *_route_parts(results["route"]["rows"]),
        "## What choosing costs",
        dispatch(results["dispatch"]["rows"]),
    ]
    (RESULTS / "tables.md").write_text("\n\n".join(parts) + "\n")
    text = README.read_text()
    if BEGIN in text:
        before, rest = text.split(BEGIN)
        after = rest.split(END)[1]
        threads = max(r["threads"] for r in rows)
        caption = f"{where}, {threads} threads; times of masked SDPA / ours. A question mark: other processes disturbed the measurement."
        block = f"{caption}\n\n{summary(rows)}"
        README.write_text(f"{before}{BEGIN}\n{block}\n{END}{after}")
    print("written: benchmarks/results/tables.md, and the block of README.md")


if __name__ == "__main__":
    main()
