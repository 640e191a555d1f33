"""JSON to Markdown: ``results/tables.md``, and what is between the markers of docs/performance.md, docs/gpu.md and docs/reliability.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import bench_compile, bench_engines, bench_host, lanes, plots, sections, what_ran
from . import bench_transformers as hf
from .bench_attention import GOALS
from .bench_encoder import AGAIN, MASKED, OFF, ON, OURS
from .markdown import DISTURBED, NEAR, machine, setting, table, threads_of, widest
from .measure import RESULTS
from .workloads import WORKLOADS

DOCS = Path(__file__).parent.parent / "docs"
PAGE, GPU_PAGE, RELIABILITY, PICTURES = DOCS / "performance.md", DOCS / "gpu.md", DOCS / "reliability.md", DOCS / "pictures"
RECIPES_PAGE = DOCS / "how-to" / "recipes.md"
BEGIN, END = "<!-- benchmarks: begin (make bench writes this block) -->", "<!-- benchmarks: end -->"


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
    """The headline of the page: times of torch with its fast path off / ours."""
    columns = [(d, way) for d in ("float32", "bfloat16") for way in ("eval", "training")]
    cells = {
        (r["workload"], r["dtype"], r["direction"]): f"{r['ratio'][OURS]:.1f}" if r["foreign"] <= DISTURBED else "?" for r in widest(rows)
    }
    return _by_workload(columns, cells)


def memory(rows: list[dict[str, Any]]) -> str:
    """Peaks by contestant, and the share that ours takes."""
    lines = []
    for row in rows:
        peaks = [f"{row['megabytes'][name]:.0f}" if name in row["megabytes"] else "" for name in (MASKED, ON, OURS)]
        met = "met" if row["ratio"] <= row["goal"] / NEAR else "**missed**"
        lines.append([row["what"], row["dtype"], row["direction"], *peaks, f"**{row['ratio']:.2f}**", f"at most {row['goal']}: {met}"])
    return table(["", "dtype", "", "masked, MB", f"{ON}, MB", "ours, MB", "**ours / masked**", "goal"], lines)


def transformers(rows: list[dict[str, Any]]) -> str:
    """Times and ratios of one part."""
    header = [
        "",
        "batch",
        "before, ms",
        'level "attention"',
        '**level "model"**',
        "by token",
        "before against before",
        "difference",
        "others",
        "goals",
    ]
    lines = []
    for row in rows:
        times, ratios, differences = row["milliseconds"], row["ratio"], row["difference"]
        front = f", front end {times[hf.FRONT]:.0f} ms" if hf.FRONT in times else ""
        lines.append(
            [row["what"], row["batch"] + front, f"{times[hf.BEFORE]:.0f}", f"{ratios[hf.ATTENTION]:.2f}" if hf.ATTENTION in ratios else "",
             f"**{ratios[hf.MODEL]:.2f}**", f"{row['by_token']:.2f}", f"{ratios[hf.AGAIN]:.2f}",
             f"{max(differences.values()):.0e}" if differences else "", f"{row['foreign']:.0%}", _transformers_goals(row)]
        )  # fmt: skip
    return table(header, lines)


def enabling(rows: list[dict[str, Any]]) -> str:
    """Of `enable` itself."""
    lines = []
    for row in rows:
        forward, taken = (row["milliseconds"][name] for name in (hf.BEFORE, hf.ENABLING))
        limit = max(forward, 1e3 * hf.ENABLE_LIMIT)
        met = "disturbed" if row["foreign"] > DISTURBED else "met" if taken <= limit / NEAR else "**missed**"
        lines.append([row["what"], f"{forward:.0f}", f"**{taken:.0f}**", f"{row['foreign']:.0%}", f"at most {limit:.0f}: {met}"])
    return table(["", "one forward of 4 x 32, ms", "**enable and disable, ms**", "others", "goal"], lines)


def _transformers_goals(row: dict[str, Any]) -> str:
    """Nothing is taken off a floor, and the noise of the run stands beside it."""
    if row["foreign"] > DISTURBED and (row["goals"] or row["floors"]):
        return "disturbed"
    found = row["ratio"]
    goals = [f"{name} {goal}: " + ("met" if found[name] >= NEAR * goal else "**missed**") for name, goal in row["goals"].items()]
    floors = [f"{name} never below {floor}: " + ("met" if found[name] >= floor else "**missed**") for name, floor in row["floors"].items()]
    return "; ".join([*goals, *floors])


def transformers_summary(rows: list[dict[str, Any]]) -> str:
    """The short table of the page: times before / after, and what they would be if all work were by token."""
    lines = []
    for row in _in_order(widest(rows)):
        if row["part"] == hf.ENABLE or (row["part"] == hf.AUDIO and not row["what"].startswith("wav2vec2, 12 layers")):
            continue  # HuBERT is as fast, and no published model is that shallow
        found = [f"{row['ratio'][level]:.1f}" if level in row["ratio"] else "-" for level in hf.LEVELS]
        cells = found if row["foreign"] <= DISTURBED else ["?"] * len(found)
        lines.append([_TRANSFORMERS[row["part"]].format(row["what"]), row["batch"], *cells, f"{row['by_token']:.1f}"])
    return table(["", "batch", 'level="attention"', "enable(model)", "by token"], lines)


_TRANSFORMERS = {
    hf.TEXT: "MiniLM, {}",
    hf.ENCODE: "`SentenceTransformer.encode`, {}",
    hf.TRAINING: "MiniLM, training, {}",
    hf.AUDIO: "{}",
    hf.SHAPES: "{}",
}


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: hf.PARTS.index(row["part"]))


def attention(rows: list[dict[str, Any]], dtype: str) -> str:
    """Times and ratios of one dtype: of the backend that runs by itself, and of `cpu`, which everybody has."""
    header = [
        "batch", "", "masked, ms", "ours, ms", "**ratio**", "goal", "with pack and unpack", "`cpu`, ms", "**ratio of `cpu`**", "goal",
        "same against same", "others",
    ]  # fmt: skip
    order = {w.name: i for i, w in enumerate(WORKLOADS)}  # w1 to w6, and then the real ones
    chosen = [r for r in rows if r["dtype"] == dtype]
    lines = []
    for row in sorted(chosen, key=lambda r: (order[r["workload"]], r["direction"])):
        times, ratios = row["milliseconds"], row["ratio"]
        alone = "packed, cpu" if "packed, cpu" in times else "packed"
        lines.append(
            [row["workload"], row["direction"], f"{times['masked']:.1f}", f"{times['packed']:.1f}", f"**{ratios['packed']:.2f}**",
             _attention_goal(row, row["backend"], "packed"), f"{ratios['pack+unpack']:.2f}", f"{times[alone]:.1f}",
             f"**{ratios[alone]:.2f}**", _attention_goal(row, "cpu", alone), f"{ratios['masked again']:.2f}", f"{row['foreign']:.0%}"]
        )  # fmt: skip
    return table(header, lines)


def _attention_goal(row: dict[str, Any], backend: str, name: str) -> str:
    goal = GOALS.get(backend, {}).get((row["dtype"], row["direction"]), {}).get(row["workload"])
    if goal is None or row["threads"] != 2:
        return ""
    if row["foreign"] > DISTURBED:
        return "disturbed"
    return f"{goal} " + ("met" if row["ratio"][name] >= NEAR * goal else "**missed**")


def against_dense(rows: list[dict[str, Any]]) -> str:
    """w5 has no padding, so that the unmasked call is its fair competitor."""
    lines = [
        [r["dtype"], r["direction"], f"{r['milliseconds']['dense']:.1f}", f"{r['milliseconds']['packed']:.1f}", f"{r['ratio_dense']:.2f}"]
        for r in rows
        if r["ratio_dense"] is not None
    ]
    return table(["dtype", "", "unmasked SDPA, ms", "ours, ms", "ratio"], lines)


def host(result: dict[str, Any]) -> str:
    """Measured by itself, on a machine that may be another one than that of the tables before."""
    lines = []
    for row in result["rows"]:
        times = row["microseconds"]
        shown = [f"{times[name]:.0f}" if name in times else "-" for name in (bench_host.WAS, bench_host.OURS)]
        goal = "-" if row["limit"] is None else f"{row['limit']:.3g}: {'met' if row['met'] else '**missed**'}"
        lines.append([row["what"], *shown, f"{row['ratio']:.3g}", goal])
    says = (
        "Ours / what it was, so that 1.03 is 3 % slower: one thread, CPU time, the best of many rounds in turns. A further layer is timed "
        "with kernels that compute nothing."
    )
    return "\n\n".join([f"{setting(result['environment'])}.", says, table(["what", "as it was, us", "ours, us", "ratio", "goal"], lines)])


def compiled(result: dict[str, Any]) -> str:
    """Measured by itself, as the host's."""
    names = (hf.BEFORE, *(name for pair in bench_compile.PAIRS for name in reversed(pair) if name != hf.BEFORE))
    lines = []
    for row in sorted(result["rows"], key=lambda row: (row["threads"], row["what"], row["fill"])):
        times = [f"{row['milliseconds'][name]:.0f}" for name in names]
        gains = [f"**{row['gain'][packed]:.2f}**" for packed, _ in bench_compile.PAIRS]
        lines.append([row["what"], row["batch"], str(row["threads"]), *times, *gains, f"{row['ratio'][hf.AGAIN]:.2f}"])
    header = [
        "",
        "batch",
        "threads",
        *(f"{name}, ms" for name in names),
        *(f"{b} / {a}" for a, b in bench_compile.PAIRS),
        f"{hf.BEFORE} / {hf.AGAIN}",
    ]
    says = (
        "Models of transformers by inductor, padded and packed, without and with `freezing`; graphs are those for any size. One thread is "
        "timed by its CPU time. Ratios are times padded / times packed; the last column is the noise."
    )
    return "\n\n".join([f"{setting(result['environment'])}.", says, table(header, lines)])


def engines(result: dict[str, Any]) -> str:
    """Measured by itself, as the host's."""
    names, order = (*bench_engines.OURS, *bench_engines.ENGINES), list(bench_engines.ROWS)
    lines = []
    for row in sorted(result["rows"], key=lambda row: (row["threads"], order.index(row["what"]))):
        shown = [row["ratio"].get(name) for name in names]
        best = max(filter(None, shown))
        cells = ["-" if x is None else f"**{x:.2f}**" if x == best else f"{x:.2f}" for x in shown]
        goal = "-" if row["goal"] is None else f"{row['goal']:.2f}"
        lines.append([row["what"], row["batch"], str(row["threads"]), f"{row['milliseconds'][hf.BEFORE]:.1f}", *cells, goal])
    found = dict.fromkeys(", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in result["rows"])
    versions = "; ".join(filter(None, found))
    says = (
        "MiniLM in float32 on docstrings cut at 256 tokens, unless another model is named, which has random weights: times of the model "
        f"as it came, with attention by `sdpa` / those of each contestant, in turns in one process. {versions}. The last column is what "
        "prepacked weights aim at on two threads."
    )
    header = ["", "batch", "threads", "as it came, ms", *names, "goal"]
    return "\n\n".join([f"{setting(result['environment'])}.", says, table(header, lines)])


def serving(result: dict[str, Any]) -> str:
    """Measured by itself, as the host's."""
    lines = []
    for row in sorted(result["rows"], key=lambda row: (row["threads"], row["load"])):
        at_once = row["rate"] is None
        for name, answered in row["answered"].items():
            lines.append([
                row["load"], str(row["threads"]), name, "-" if at_once else f"{row['rate']:.1f}", f"{answered:.1f}",
                *("-" if at_once else f"{row[p][name]:.0f}" for p in ("p50", "p95")),
            ])  # fmt: skip
    busy = max(row["busy"] for row in result["rows"])
    says = (
        "MiniLM in float32 on docstrings cut at 256 tokens, by `examples/serving.py`: texts come at random times, the same for every "
        "contestant, in turns. Loads are shares of what the model as it came answers when all come at once. "
        + (
            f"The machine was busy: its load average was {busy:.0f} before the run, and times are longer than on a quiet one."
            if busy > 1
            else ""
        )
    )
    header = ["load", "threads", "", "asked, texts/s", "answered, texts/s", "p50, ms", "p95, ms"]
    return "\n\n".join([f"{setting(result['environment'])}.", says.strip(), table(header, lines)])


def batches() -> str:
    return "\n".join(f"- {workload}" for workload in WORKLOADS)


def summary(rows: list[dict[str, Any]]) -> str:
    """The short table of the page: float32 and bfloat16 ratios, on two threads or whatever the most is. Of the backend that ran by
    itself, and where that was another than `cpu`, of `cpu`, which needs no compiler."""
    columns = [(d, way) for d in ("float32", "bfloat16") for way in ("forward", "forward+backward")]
    cells = {}
    for row in widest(rows):
        found = [f"{row['ratio'][name]:.1f}" for name in ("packed", "packed, cpu") if name in row["ratio"]]
        cells[(row["workload"], row["dtype"], row["direction"])] = " / ".join(found) if row["foreign"] <= DISTURBED else "?"
    return _by_workload(columns, cells)


def _by_workload(columns: Sequence[tuple[str, str]], cells: dict[tuple[str, str, str], str]) -> str:
    """A line for each workload that was measured at all; a dash where it was not."""
    lines = [
        [f"{w.name}: {w.says}", f"B {len(w.lengths)}, S {w.padded_len}", f"{w.fill:.2f}",
         *[cells.get((w.name, *c), "-") for c in columns]]
        for w in WORKLOADS if any(name == w.name for name, *_ in cells)
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
                    parts += [f"### {dtype}, {direction}, {threads_of(threads)}", encoder(chosen)]
    return parts


def _memory_parts(rows: list[dict[str, Any]]) -> list[str]:
    ran = " or ".join(sorted({f"`{row.get('backend', 'cpu')}`" for row in rows}))
    return [
        "## Memory",
        "Peak of resident memory during one call on w4 beyond what was there before it (model, inputs, gradients of the step before), each "
        'in a process of its own. "Masked" is, for one layer, linear, `F.scaled_dot_product_attention` with a bool mask, linear; for the '
        f"encoder, torch's with its fast path off. Ours is the backend {ran} here.",
        memory(rows),
    ]


def _attention_parts(rows: list[dict[str, Any]]) -> list[str]:
    parts = []
    for threads in sorted({r["threads"] for r in rows}, reverse=True):
        chosen = [r for r in rows if r["threads"] == threads]
        for dtype in ("float32", "bfloat16"):
            if any(r["dtype"] == dtype for r in chosen):
                parts += [f"## Attention, {dtype}, {threads_of(threads)}", attention(chosen, dtype)]
        parts += [f"## No padding (w5), against SDPA without a mask, {threads_of(threads)}", against_dense(chosen)]
    return parts


def _transformers_parts(rows: list[dict[str, Any]]) -> list[str]:
    parts = [
        "## Models of transformers",
        f"Before and after `enable`, at both levels; before is attention by `sdpa`. {_libraries(rows)}.",
        "MiniLM (6 layers, width 384) has its published weights and reads docstrings of the standard library, at most 256 tokens of each; "
        'Wav2Vec2 and HuBERT have random weights of base width and the durations of spoken prompts. "By token" is what the ratio would be '
        "if all of the work were by token, that is padded positions / tokens. Attention, whose work grows with the square of lengths, "
        "saves more; a whole speech model saves less, because its convolutional front end stays padded, and is counted as it was timed. "
        '"Difference" is the largest of outputs at real tokens, or of vectors, from those before.',
    ]
    for threads in sorted({r["threads"] for r in rows}, reverse=True):
        for part, title in _PARTS.items():
            chosen = [r for r in rows if (r["threads"], r["part"]) == (threads, part)]
            if chosen:
                parts += [f"### {title}, {threads_of(threads)}", enabling(chosen) if part == hf.ENABLE else transformers(chosen)]
    return parts


_PARTS = {
    hf.TEXT: "MiniLM in evaluation",
    hf.ENCODE: "`SentenceTransformer.encode`, tokenising included",
    hf.TRAINING: "MiniLM, forward and backward",
    hf.AUDIO: "Wav2Vec2 and HuBERT",
    hf.SHAPES: "Other shapes, random weights",
    hf.ENABLE: "What `enable` itself takes",
}


def _libraries(rows: list[dict[str, Any]]) -> str:
    return "; ".join(dict.fromkeys(row["libraries"] for row in rows))


NAMES = (
    "encoder", "memory", "transformers", "attention", "mha", "layout", "length", "minitest", "host", "compile", "engines", "curves",
    "serving", "recipes", "balance", "acceptance", *plots.GRIDS,
)  # fmt: skip


def load(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """What has been measured, by benchmark."""
    return {name: json.loads(path.read_text()) for name in NAMES if (path := folder / f"{name}.json").exists()}


def others(folder: Path = RESULTS) -> dict[str, dict[str, dict[str, Any]]]:
    """What has been measured on further machines, each in a folder of its own."""
    found = {path.name: load(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    return {name: results for name, results in found.items() if results}


def tables(results: dict[str, dict[str, Any]]) -> str:
    """The whole of ``tables.md``; what has not been measured is left out."""
    rows = {name: result["rows"] for name, result in results.items()}
    parts = [
        "# Results",
        f"{setting(next(iter(results.values()))['environment'])}. {_when(results)}Written by `python -m benchmarks.report`.",
        "Every ratio is the median over interleaved rounds of one run, each contestant verified against float64 before. "
        '"Masked" is `F.scaled_dot_product_attention` with a bool mask on `(B, N, S, H)`; 8 heads of 64; "same against same" is the masked '
        'call against itself, that is the noise; "others" is the share of the machine that other processes took, which disturbs '
        "two threads more than one. One thread is timed by its CPU time, two by the wall clock.",
        batches(),
        sections.losses(results),
    ]
    for name, section in _SECTIONS:
        if name in rows:
            parts += section(rows[name])
    for name in plots.GRIDS:
        parts += sections.grid(results[name]) if name in results else []
    if "host" in results:
        parts += ["## What a call takes of the host", host(results["host"])]
    if "compile" in results:
        parts += ["## `torch.compile`", compiled(results["compile"])]
    if "engines" in results:
        parts += ["## Beside inference engines", engines(results["engines"])]
    if "serving" in results:
        parts += ["## A service under load", serving(results["serving"])]
    return "\n\n".join(parts) + "\n"


def _when(results: dict[str, dict[str, Any]]) -> str:
    """Rows that a later run did not measure again stay, so that days may differ."""
    days = sorted({row["measured"] for result in results.values() for row in result["rows"] if "measured" in row})
    return "" if not days else f"Measured on {days[0]}. " if len(days) == 1 else f"Measured from {days[0]} to {days[-1]}. "


_SECTIONS = (
    ("minitest", sections.minitest),
    ("encoder", _encoder_parts),
    ("memory", _memory_parts),
    ("transformers", _transformers_parts),
    ("attention", _attention_parts),
    ("attention", sections.contestants),
    ("attention", sections.roof),
    ("mha", sections.mha),
    ("length", sections.length),
    ("curves", lambda rows: ["## A training, padded and packed", sections.curves(rows)]),
    ("layout", sections.layout),
    ("balance", sections.balance),
    ("recipes", lambda rows: ["## Recipes", _RECIPES, sections.recipes(rows)]),
)
_RECIPES = "The models of docs/how-to/, in float32: how many times faster after `enable`, and on packed rows."
_MINITEST = (
    "The mini test, training of one attention layer (batch 32, 500 tokens, width 128, 4 heads): time of 100 steps, the same relative to "
    'that layer without options, and the kernel that `torch.profiler` saw. "Scores" means that no fused kernel ran and all scores were '
    "stored. With a mask a third of the positions is padding, which ours leaves out."
)
_WHOLE = (
    "A whole encoder of 6 layers with padded input and output: how many times faster than `nn.TransformerEncoder` without its fast path."
)
_MODELS = (
    "Models of transformers: how many times faster after `enable`. Before it, attention was `sdpa`. The last column is what that would be "
    "if all work were done for each token alone."
)
_SUMMARIES = {
    "minitest": (_MINITEST, sections.minitest_summary),
    "encoder": (_WHOLE, encoder_summary),
    "transformers": (_MODELS, transformers_summary),
    "attention": (
        "Attention only: how many times faster than SDPA with a mask. The first number is that of the compiled kernel, the second that of "
        "`cpu`, which needs no compiler.",
        summary,
    ),
}


def block(results: dict[str, dict[str, Any]], further: dict[str, dict[str, dict[str, Any]]]) -> str:
    """What is between the markers of docs/performance.md: tables of the first machine, and pictures of all."""
    parts = []
    for name, (caption, short) in _SUMMARIES.items():
        if name in results:
            rows, where = results[name]["rows"], setting(results[name]["environment"])
            parts += [f"{caption} {where}, {threads_of(max(r['threads'] for r in rows))}.", short(rows)]
    notes = "A question mark: other processes disturbed the measurement. A dash: not measured."
    parts += [sections.losses(results), notes]
    drawn = plots.files(results)
    if plots.LENGTH in drawn:
        parts += ["## Length and memory", _picture(plots.LENGTH, results)]
    if plots.CURVES in drawn:
        parts += ["## The same training", sections.curves(results["curves"]["rows"]), _picture(plots.CURVES, results)]
    if plots.BALANCE in drawn:
        parts += ["## Balanced batches", sections.idle_shares(results["balance"]["rows"]), _picture(plots.BALANCE, results)]
    if plots.ENGINES in drawn:
        parts += ["## Beside inference engines", _picture(plots.ENGINES, results)]
    grids = [_picture(picture, results) for picture in plots.GRIDS if picture in drawn]
    parts += ["## The compiled kernel, by instruction set", *grids] if grids else []
    further = {folder: found for folder, found in further.items() if plots.files(found)}
    parts += ["## Other machines"] if further else []
    for folder, found in further.items():
        name = machine(next(iter(found.values()))["environment"])
        parts += [f"### {name}", *(_picture(picture, found, folder) for picture in plots.files(found, folder))]
    return "\n\n".join(parts)


def _picture(picture: str, results: dict[str, dict[str, Any]], folder: str = "") -> str:
    return f"![{plots.SAYS[picture]}]({PICTURES.name}/{plots.files(results, folder)[picture]})"


def page(text: str, results: dict[str, dict[str, Any]], further: dict[str, dict[str, dict[str, Any]]]) -> str:
    """docs/performance.md with its block written anew."""
    return _between(text, BEGIN, END, block(results, further))


def gpu_page(text: str, on_gpus: Sequence[dict[str, Any]]) -> str:
    """docs/gpu.md with its block written anew."""
    return _between(text, what_ran.BEGIN, what_ran.END, what_ran.block(on_gpus))


def recipes_page(text: str, results: dict[str, dict[str, Any]]) -> str:
    """docs/how-to/recipes.md with its block written anew, of one thread."""
    where = setting(results["recipes"]["environment"])
    return _between(text, BEGIN, END, f"{where}.\n\n{sections.recipes(results['recipes']['rows'], threads=1)}")


def reliability_page(text: str) -> str:
    """docs/reliability.md with its block written anew."""
    return _between(text, lanes.BEGIN, lanes.END, lanes.block())


def _between(text: str, begin: str, end: str, new: str) -> str:
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder of results; of another than the usual one, tables only")
    options = parser.parse_args()
    results = load(options.results)
    (options.results / "tables.md").write_text(tables(results))
    if options.results == RESULTS:
        PAGE.write_text(page(PAGE.read_text(), results, others()))
        RECIPES_PAGE.write_text(recipes_page(RECIPES_PAGE.read_text(), results))
        GPU_PAGE.write_text(gpu_page(GPU_PAGE.read_text(), what_ran.load()))
        RELIABILITY.write_text(reliability_page(RELIABILITY.read_text()))
    drawn = ["no pictures: matplotlib is not installed (`make bench` does)"]
    if plots.available():
        drawn = plots.draw(results, PICTURES if options.results == RESULTS else options.results)
        for folder, found in others().items() if options.results == RESULTS else ():
            drawn += plots.draw(found, PICTURES, folder)
    print("written:", options.results / "tables.md", *drawn)


if __name__ == "__main__":
    main()
