"""JSON to Markdown: ``results/tables.md``, and the block between the benchmark markers of README.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bench_encoder import AGAIN, MASKED, OFF, ON, OURS
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


def encoder(rows: list[dict[str, Any]]) -> str:
    """Times and ratios of the encoder."""
    header = ["batch", f"{OFF}, ms", f"{ON}, ms", "ours, ms", "**ratio to off**", f"ratio to {ON}", "off against off", "others", "goal"]
    lines = []
    for row in sorted(rows, key=lambda r: str(r["workload"])):
        times, ratios = row["milliseconds"], row["ratio"]
        as_it_comes = [f"{times[ON]:.1f}", f"{row['ratio_on']:.2f}"] if ON in times else ["", ""]
        lines.append(
            [row["workload"], f"{times[OFF]:.1f}", as_it_comes[0], f"{times[OURS]:.1f}", f"**{ratios[OURS]:.2f}**", as_it_comes[1],
             f"{ratios[AGAIN]:.2f}", f"{row['foreign']:.0%}", _encoder_goal(row)]
        )  # fmt: skip
    return table(header, lines)


def _encoder_goal(row: dict[str, Any]) -> str:
    """A floor is no goal: nothing is taken off it, and the noise of the run stands beside it."""
    found, goal, floor = row["ratio"][OURS], row["goal"], row["floor"]
    if row["foreign"] > DISTURBED:
        return "disturbed"
    if floor is not None:
        return f"never below {floor}: " + ("met" if found >= floor else f"**missed**, at {row['ratio'][AGAIN]:.2f} of off against off")
    return "" if goal is None else f"{goal} " + ("met" if found >= NEAR * goal else "**missed**")


def encoder_summary(rows: list[dict[str, Any]]) -> str:
    """The headline of the README: times of torch with its fast path off / ours."""
    columns = [(d, way) for d in ("float32", "bfloat16") for way in ("eval", "training")]
    cells = {
        (r["workload"], r["dtype"], r["direction"]): f"{r['ratio'][OURS]:.1f}" if r["foreign"] <= DISTURBED else "?" for r in _widest(rows)
    }
    return _by_workload(columns, cells, "-")


def memory(rows: list[dict[str, Any]]) -> str:
    """Peaks by contestant, and the share that ours takes."""
    lines = []
    for row in rows:
        peaks = [f"{row['megabytes'][name]:.0f}" if name in row["megabytes"] else "" for name in (MASKED, ON, OURS)]
        met = "met" if row["ratio"] <= row["goal"] / NEAR else "**missed**"
        lines.append([row["what"], row["dtype"], row["direction"], *peaks, f"**{row['ratio']:.2f}**", f"at most {row['goal']}: {met}"])
    return table(["", "dtype", "", "masked, MB", f"{ON}, MB", "ours, MB", "**ours / masked**", "goal"], lines)


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
    columns = [(d, way) for d in ("float32", "bfloat16") for way in ("forward", "forward+backward")]
    quiet = [r for r in _widest(rows) if r["foreign"] <= DISTURBED]
    return _by_workload(columns, {(r["workload"], r["dtype"], r["direction"]): f"{r['ratio']['packed']:.1f}" for r in quiet}, "?")


def _widest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the most threads."""
    most = max(r["threads"] for r in rows)
    return [r for r in rows if r["threads"] == most]


def _by_workload(columns: Sequence[tuple[str, str]], cells: dict[tuple[str, str, str], str], missing: str) -> str:
    lines = [
        [f"{w.name}: {w.says}", f"B {len(w.lengths)}, S {w.padded_len}", f"{w.fill:.2f}",
         *[cells.get((w.name, *c), missing) for c in columns]]
        for w in WORKLOADS
    ]  # fmt: skip
    return table(["", "batch", "fill", *[f"{d} {way}" for d, way in columns]], lines)


def _encoder_parts(rows: list[dict[str, Any]]) -> list[str]:
    parts = [
        "## A whole encoder",
        "`VarlenTransformerEncoder` against `nn.TransformerEncoder` with the same weights: 6 layers, pre-norm, E 512, 8 heads, FF 2048, "
        "gelu, padded in and out, the bool mask given. Judged against torch with its fast path off, because in evaluation that path, "
        "which torch comes with, is mostly the slower one on a CPU; in training there is none.",
    ]
    for threads in sorted({r["threads"] for r in rows}, reverse=True):
        for dtype in ("float32", "bfloat16"):
            for direction in ("eval", "training"):
                chosen = [r for r in rows if (r["threads"], r["dtype"], r["direction"]) == (threads, dtype, direction)]
                if chosen:
                    parts += [f"### {dtype}, {direction}, {_threads(threads)}", encoder(chosen)]
    return parts


def _memory_parts(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "## Memory",
        "Peak of resident memory during one call on w4 beyond what stood before (model, inputs, gradients of the step before), each in a "
        'process of its own. "Masked" is, for one layer, linear, `F.scaled_dot_product_attention` with a bool mask, linear; for the '
        "encoder, torch's with its fast path off.",
        memory(rows),
    ]


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


def load() -> dict[str, dict[str, Any]]:
    """What has been measured, by benchmark."""
    names = ("encoder", "memory", "attention", "route", "dispatch")
    return {name: json.loads(path.read_text()) for name in names if (path := RESULTS / f"{name}.json").exists()}


def tables(results: dict[str, dict[str, Any]]) -> str:
    """The whole of ``tables.md``; what has not been measured is left out."""
    rows = {name: result["rows"] for name, result in results.items()}
    parts = [
        "# Results",
        f"{setting(next(iter(results.values()))['environment'])}. Written by `python -m benchmarks.report`.",
        "Every ratio is the median over interleaved rounds of one run, each contestant verified against float64 before. "
        '"Masked" is `F.scaled_dot_product_attention` with a bool mask on `(B, N, S, H)`; 8 heads of 64; "same against same" is the masked '
        'call against itself, that is the noise; "others" is the share of the machine that other processes took, which disturbs '
        "two threads more than one. One thread is timed by its CPU time, two by the wall clock.",
        batches(),
    ]
    sections = {"encoder": _encoder_parts, "memory": _memory_parts, "attention": _attention_parts, "route": _route_parts}
    parts += [part for name, section in sections.items() if name in rows for part in section(rows[name])]
    if "dispatch" in rows:
        parts += ["## What choosing costs", dispatch(rows["dispatch"])]
    return "\n\n".join(parts) + "\n"


def block(results: dict[str, dict[str, Any]]) -> str:
    """What stands between the markers of the README: the encoder first, because that is what people run."""
    whole = "A whole encoder of 6 layers, padded in and out: times of `nn.TransformerEncoder`, its fast path off / ours."
    says = {"encoder": (whole, encoder_summary), "attention": ("Attention only: times of masked SDPA / ours.", summary)}
    parts = []
    for name, (caption, short) in says.items():
        if name in results:
            rows, where = results[name]["rows"], setting(results[name]["environment"])
            parts += [f"{caption} {where}, {_threads(max(r['threads'] for r in rows))}.", short(rows)]
    notes = "A question mark: other processes disturbed the measurement." + (" A dash: not measured." if "encoder" in results else "")
    return "\n\n".join([*parts, notes])


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    results = load()
    (RESULTS / "tables.md").write_text(tables(results))
    text = README.read_text()
    if BEGIN in text:
        before, rest = text.split(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{block(results)}\n{END}{rest.split(END)[1]}")
    print("written: benchmarks/results/tables.md, and the block of README.md")


if __name__ == "__main__":
    main()
