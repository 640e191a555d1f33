"""The sections of ``tables.md`` about contestants, layers, packing, lengths and the mini test, and their summaries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from . import bench_balance as balancing
from . import bench_curves as training
from . import bench_minitest as mini
from . import bench_recipes
from .bench_attention import BACKWARD, DIRECTIONS, GRID_SLOWER, OVER_MASKED, PLAIN, SHARE, useful_flops
from .bench_layout import BASE, OURS
from .bench_length import PACKED, PADDED, SCORES
from .contestants import AUTO, MASKED, WITH_PACKING
from .markdown import DISTURBED, setting, table, threads_of, widest
from .workloads import WORKLOADS

__all__ = [
    "balance",
    "contestants",
    "curves",
    "grid",
    "layout",
    "length",
    "losses",
    "mha",
    "minitest",
    "minitest_summary",
    "recipes",
    "roof",
]

Rows = list[dict[str, Any]]
_ORDER = {w.name: (i, w) for i, w in enumerate(WORKLOADS)}


def _groups(rows: Rows, *keys: str) -> dict[tuple[Any, ...], Rows]:
    found: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def _workloads(rows: Iterable[dict[str, Any]]) -> list[str]:
    return sorted({row["workload"] for row in rows}, key=lambda name: _ORDER[name][0])


def _matrix(rows: Rows, base: str, first: str) -> list[str]:
    """Times of ``base`` / times of each contestant, a column for each workload, and the reasons of who is not there."""
    parts = []
    for (threads, dtype, direction), group in sorted(_groups(rows, "threads", "dtype", "direction").items(), reverse=True):
        by_name = {row["workload"]: row for row in group}
        names = _workloads(group)
        contestants = list(dict.fromkeys(name for row in group for name in (*row["ratio"], *row.get("absent", {}))))
        lines = [[_label(name, group), *[_cell(by_name[w], name) for w in names]] for name in contestants]
        lines = [line for line in lines if set(line[1:]) != {"-"}]
        parts += [f"### {dtype}, {direction}, {threads_of(threads)}", table([first, *names], [[base, *["1"] * len(names)], *lines])]
    return [*parts, *_reasons(rows)]


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row["ratio"]:
        return "-"
    found = f"{row['ratio'][name]:.2f}"
    return f"?{found}" if row["foreign"] > DISTURBED else f"~{found}" if name in row.get("once", ()) else found


def _label(name: str, rows: Rows) -> str:
    """Ours with the backend that ran."""
    ran = " or ".join(sorted({row["backend"] for row in rows if "backend" in row}))
    return (
        f"**ours, {ran}**"
        if name == AUTO and ran
        else name.replace(f"{AUTO}, ", "ours, ").replace(WITH_PACKING, "ours with pack and unpack")
    )


def _reasons(rows: Rows) -> list[str]:
    """Who is not in a table, and why: one line for each reason."""
    found: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for name, reason in row.get("absent", {}).items():
            found.setdefault((name, reason), set()).add(row["workload"])
    if not found:
        return []
    everywhere = set(_workloads(rows))
    lines = []
    for (name, reason), where in found.items():
        places = "" if where == everywhere else f" ({', '.join(sorted(where, key=lambda w: _ORDER[w][0]))})"
        lines.append(f"- {name.replace(f'{AUTO}, ', 'ours, ')}{places}: {reason}")
    return ["Not measured:", "\n".join(lines)]


def contestants(rows: Rows) -> list[str]:
    """Attention alone, by everything that is installed."""
    rows = [row for row in rows if "absent" in row]
    if not rows:
        return []
    return [
        "## Attention, by everything that runs here",
        f'Times of the masked call / times of each. "~": timed once, because it is too slow for the turns; "?": other processes disturbed '
        f'the row; "masked again" is the noise. "{MASKED}" and "dense" are `F.scaled_dot_product_attention` with and without a bool mask.',
        *_matrix(rows, MASKED, "masked / ..."),
    ]


def roof(rows: Rows) -> list[str]:
    """Shares of what the machine can do."""
    rows = [row for row in rows if row.get("attainable") and row["foreign"] <= DISTURBED]
    if not rows:
        return []
    lines = []
    for row in sorted(rows, key=lambda r: (-r["threads"], r["dtype"], r["direction"], _ORDER[r["workload"]][0])):
        work = useful_flops(_ORDER[row["workload"]][1].lengths) * (1 if row["direction"] == DIRECTIONS[0] else BACKWARD)
        rates = {name: work / row["milliseconds"][name] / 1e6 for name in (MASKED, AUTO)}
        roofs = row["attainable"]
        shares = [f"{rates[name] / roofs[kind]:.0%}" for kind in ("flash", "gemm") for name in (MASKED, AUTO)]
        setting = [row["dtype"], row["direction"], threads_of(row["threads"]), row["workload"]]
        lines.append([*setting, f"{rates[AUTO]:.0f}", f"{roofs['flash']:.0f}", f"{roofs['gemm']:.0f}", *shares])
    header = [
        "dtype",
        "",
        "",
        "batch",
        "ours, GFLOP/s",
        "flash",
        "gemm",
        "masked / flash",
        "**ours / flash**",
        "masked / gemm",
        "ours / gemm",
    ]
    return [
        "## How close to the limits of the machine",
        "Useful work (`4 * N * H * sum(L^2)`, with the backward 3.5 times that) per time, and its share of two rates of the same run: "
        '"flash" is torch\'s own kernel forward on one sequence of 4096 tokens without a mask, "gemm" a product of large square matrices.',
        table(header, lines),
    ]


def grid(result: dict[str, Any]) -> list[str]:
    """The compiled kernel against torch's, on one CPU and with one instruction set."""
    parts = [
        f"## The compiled kernel against torch's: {setting(result['environment'])}",
        "Times of torch's kernel (the backend `cpu`) / times of `cpu_native`, forward / forward + backward, in float32: the least of "
        "several rounds, and of up to four times as many where a ratio is below 1.03. Batches of equal lengths, at most 8192 tokens and "
        f"8 heads. Bold is a ratio below {GRID_SLOWER}. Shares are of the rate of a product of large square matrices.",
    ]
    kinds = {
        PLAIN: ("length", "head_dim"), "more kinds": ("what", "length"), SHARE: ("what", "length"), OVER_MASKED: ("head_dim", "length")
    }  # fmt: skip
    rows = [{**row, "kind": row["what"] if row["what"] in kinds else "more kinds"} for row in result["rows"]]
    by_kind = _groups(rows, "threads", "kind")
    for threads, kind in sorted(by_kind, key=lambda key: (key[0], list(kinds).index(key[1]))):
        group, (down, across) = by_kind[threads, kind], kinds[kind]
        places = {(row[down], row[across], row["direction"]): row for row in group}
        downs, acrosses = (sorted({row[key] for row in group}) for key in (down, across))
        lines = [[x, *[" / ".join(_grid_cell(places.get((x, y, d))) for d in DIRECTIONS) for y in acrosses]] for x in downs]
        by = "batch" if kind == OVER_MASKED else "tokens of a sequence"
        first = f"{by}, by head dimension" if kind == PLAIN else f"head dimension 64, by {by}"
        parts += [f"### {kind[0].upper()}{kind[1:]}, {threads_of(threads)}", table([first, *acrosses], lines)]
    return parts


def _grid_cell(row: dict[str, Any] | None) -> str:
    if row is None or "share" in row:
        return "-" if row is None else f"{row['share']:.0%}"
    return f"{row['ratio']:.2f}" if row["ratio"] >= GRID_SLOWER else f"**{row['ratio']:.2f}**"


def mha(rows: Rows) -> list[str]:
    return [
        "## One attention layer",
        "Padded in, padded out, E 512, 8 heads, the same weights. Times of the layer by hand over `F.scaled_dot_product_attention` with "
        "a bool mask / times of each; marks as above.",
        *_matrix(rows, "masked SDPA", "by hand / ..."),
    ]


def layout(rows: Rows) -> list[str]:
    parts = [
        "## What packing costs",
        "Rows of 512 numbers; microseconds. A layout is built once a batch, for all layers. It knows more than indices: lengths, "
        "offsets, positions, flags; and it has checked the mask.",
    ]
    for (threads, dtype, what), group in sorted(_groups(rows, "threads", "dtype", "what").items(), reverse=True):
        by_name = {row["workload"]: row for row in group}
        names = [name for name in group[0]["milliseconds"] if name != "again"]
        lines = [
            [f"**{name}**" if name == OURS[what] else name, *[f"{by_name[w]['milliseconds'][name] * 1e3:.0f}" for w in _workloads(group)]]
            for name in names
        ]
        parts += [f"### {what}, {dtype}, {threads_of(threads)}, against `{BASE[what]}`", table(["", *_workloads(group)], lines)]
    return parts


def length(rows: Rows) -> list[str]:
    """Time of a forward and memory of a step of training."""
    lines = []
    for row in sorted(rows, key=lambda r: (-r["threads"], r["dtype"], r["length"])):
        times, peaks = row["milliseconds"], row["megabytes"]
        cells = [f"{times[name]:.1f}" if name in times else "-" for name in (SCORES, PADDED, PACKED)]
        memory = ["does not fit" if peaks[name] is None else f"{peaks[name]:.0f}" for name in (SCORES, PADDED, PACKED)]
        lines.append([row["length"], row["dtype"], threads_of(row["threads"]), *cells, f"**{row['ratio'][PACKED]:.2f}**", *memory])
    header = ["S", "dtype", "", "scores, ms", "padded, ms", "packed, ms", "**padded / packed**", "scores, MB", "padded, MB", "packed, MB"]
    return [
        "## Against length",
        'One layer, two rows, the second an eighth as long. "Scores" is `nn.MultiheadAttention` as its documentation calls it, which keeps '
        '`(B, N, S, S)` scores; "padded" is masked SDPA by hand. Time of a forward; memory of a training step, in a process that may take'
        f" {rows[0]['limit_gb']:g} GB beyond model and input: what needs more does not fit.",
        table(header, lines),
    ]


def curves(rows: Rows) -> str:
    """How far the losses of a packed training are from the padded one's, and its time."""
    found = {row["what"]: row for row in widest(rows)}
    padded, packed, other = (found[name] for name in (training.PADDED, training.PACKED, training.OTHER))
    apart, usual = (max(abs(x - y) for x, y in zip(padded["losses"], row["losses"], strict=True)) for row in (packed, other))
    times = [sum(row["seconds"]) for row in (padded, packed)]
    return (
        f"The text classifier of `examples/`, {len(padded['losses'])} steps on docstrings ({packed['batch']}, fill {packed['fill']}, "
        f"float32), trained padded and packed from the same weights. The losses differ by {apart:.0e} at most. Other initial weights "
        f"change them by up to {usual:.2g}. The padded training took {times[0]:.0f} s, the packed one {times[1]:.0f} s, on "
        f"{threads_of(padded['threads'])}: {times[0] / times[1]:.1f} times faster."
    )


def balance(rows: Rows) -> list[str]:
    """What ranks wait for each other, and what the plans that shorten it take."""
    lines = [
        [row["data"], row["ranks"], row["documents"], row["budget"], *(f"{row['tokens'][name]:.1f}" for name in row["tokens"])]
        for row in _balanced(rows)
    ]
    names = [f"tokens / budget, {name}" for name in (balancing.RANDOM, balancing.GROUPED)]
    plans = sorted((row for row in rows if row["what"] == balancing.PLANNING), key=lambda row: (row["documents"], row["ranks"]))
    planned = [
        [
            f"{row['documents']:,}",
            row["ranks"],
            row["steps"],
            f"{row['made']:.2f}",
            f"{row['first']:.2f}",
            f"{row['step_ms']:.1f}",
            row["megabytes"],
        ]
        for row in plans
    ]
    return [
        "## Balanced batches",
        idle_shares(rows),
        "The first two have as many documents in each batch, whatever their lengths. The largest batch is so many times the budget:",
        table(["documents", "ranks", "number", "budget", *names], lines),
        "What planning takes on a rank, for log-normal documents and a budget of 8192: CPU time of one thread, memory beyond lengths.",
        table(["documents", "ranks", "steps", "made, s", "first batch, s", "a step, ms", "MB"], planned),
    ]


def idle_shares(rows: Rows) -> str:
    """The table of the page."""
    found = _balanced(rows)
    names = list(found[0]["idle"])
    lines = [[row["data"], row["ranks"], *(f"{row['idle'][name]:.1%}" for name in names)] for row in found]
    most = max(row["tokens"][balancing.GROUPED] for row in found)
    says = (
        "Share of all ranks' time in which they wait for the slowest one of their step. The work of a document is "
        "`l + l**2 / (6 * width)`, simulated, without communication. The first two keep to no budget of tokens: grouped by length, the "
        f"largest batch holds up to {most:.0f} times the budget."
    )
    return f"{says}\n\n{table(['documents', 'ranks', *names], lines)}"


def _balanced(rows: Rows) -> Rows:
    order = list(balancing.DATA)
    return sorted((row for row in rows if row["what"] == balancing.IDLE), key=lambda row: (order.index(row["data"]), row["ranks"]))


# -------------------------------------------------------------------- the mini test


def _mini_cell(row: dict[str, Any] | None) -> str:
    if row is None or row.get("absent") is not None:
        return "-"
    mark = "?" if row["foreign"] > DISTURBED else ""
    return f"{mark}{row['seconds'] / row['steps'] * 100:.1f} s, x{row['to_first_column']:.1f}, {kernel_word(row['kernel'])}"


def kernel_word(kernel: str) -> str:
    """One word for a kernel, for a table: fused ones by their name, and "scores" where they are written out."""
    for word, signs in (
        ("native", ("cpu_native",)),
        ("scores", ("explicit", "math")),
        ("flash", ("flash", "fmha")),
        ("efficient", ("efficient",)),
    ):
        if any(sign in kernel for sign in signs):
            return word
    return kernel.rsplit("::", 1)[-1]


def minitest_summary(rows: Rows) -> str:
    """A line for each layer: time of 100 steps, that over its first column, and the kernel."""
    rows = widest(rows)
    columns = [str(column) for column in mini.COLUMNS]
    dtype = max({row["dtype"] for row in rows})
    cells = {(row["row"], row["column"]): row for row in rows if row["dtype"] == dtype}
    names = list(dict.fromkeys(name for name, _ in cells))
    names.sort(key=lambda name: (name.startswith(mini.OURS), [mini.WEIGHTS, mini.PLAIN, mini.BY_HAND, mini.FLASH].index(name) if name in
                                 (mini.WEIGHTS, mini.PLAIN, mini.BY_HAND, mini.FLASH) else 9, name))  # fmt: skip
    lines = [[f"**{name}**" if name == mini.OURS else name, *[_mini_cell(cells.get((name, c))) for c in columns]] for name in names]
    return table(["", *columns], [line for line in lines if set(line[1:]) != {"-"}])


def minitest(rows: Rows) -> list[str]:
    measured = [row for row in rows if row.get("absent") is None]
    steps = " or ".join(str(n) for n in sorted({row["steps"] for row in measured}))
    kernels: dict[tuple[str, str], list[str]] = {}
    for row in widest(measured):
        kernels.setdefault((row["row"], row["kernel"]), []).append(row["column"])
    reasons = list(dict.fromkeys((row["row"], row["absent"]) for row in rows if row.get("absent")))
    return [
        "## The mini test: what do a mask, causal attention and dropout cost?",
        f"Training of one attention layer: batch 32, 500 tokens, width 128, 4 heads; time of 100 steps ({steps} timed), how many times "
        "that is of the first column, and the kernel that `torch.profiler` saw. Columns without dropout were compared with float64.",
        minitest_summary(rows),
        "The kernels in full:",
        "\n".join(f"- {row} ({', '.join(columns)}): `{kernel}`" for (row, kernel), columns in kernels.items()),
        "Not measured:",
        "\n".join(f"- {row}: {reason}" for row, reason in reasons),
    ]


# -------------------------------------------------------------------- recipes


def recipes(rows: Rows, threads: int | None = None) -> str:
    """In the order of `RECIPES`; of one number of threads, or of all."""
    order = list(bench_recipes.RECIPES)
    lines = []
    for row in sorted(rows, key=lambda row: (row["threads"], order.index(row["recipe"]), row["what"])):
        ratios = [f"{row['ratio'][who]:.1f}" if who in row["ratio"] else "" for who in (bench_recipes.ENABLE, bench_recipes.ROWS)]
        if threads in (None, row["threads"]):
            lines.append([row["what"], row["batch"], row["threads"], f"{row['milliseconds'][bench_recipes.TORCH]:.1f}", *ratios])
    return table(["model", "batch", "threads", "torch, ms", "`enable`", "on rows"], lines)


# -------------------------------------------------------------------- where we lose


def losses(results: dict[str, dict[str, Any]]) -> str:
    """Every measured case where ours is slower than the best of torch's, in one sentence; undisturbed rows with the most threads."""
    found: list[str] = []
    for row in _quiet(results, "attention"):
        best = max([1.0, row["ratio"].get("dense", 0.0)])
        if row["ratio"][AUTO] < 0.95 * best:
            found.append(f"attention alone, {row['workload']} {row['dtype']} {row['direction']} ({row['ratio'][AUTO] / best:.2f})")
    for row in _quiet(results, "mha"):
        ours = max((x for name, x in row["ratio"].items() if name.startswith("ours")), default=1.0)
        best = max(1.0, *(x for name, x in row["ratio"].items() if not name.startswith(("ours", "masked"))))
        if ours < 0.95 * best:
            found.append(f"a layer, {row['workload']} {row['dtype']} {row['direction']} ({ours / best:.2f})")
    found += _minitest_losses(_quiet(results, "minitest"))
    return (
        ("Slower than the best of torch's: " + "; ".join(found) + ".")
        if found
        else "No case in these tables was slower than the best of torch's."
    )


def _minitest_losses(rows: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for (_, column), cells in _groups(list(rows), "dtype", "column").items():
        ours = min((row["seconds"] for row in cells if row["row"] == mini.OURS), default=0.0)
        theirs = min((row["seconds"] for row in cells if not row["row"].startswith(mini.OURS)), default=ours)
        if ours > theirs / 0.95:
            found.append(f"the mini test, {column} ({theirs / ours:.2f})")
    return found


def _quiet(results: dict[str, dict[str, Any]], name: str) -> Sequence[dict[str, Any]]:
    rows = results[name]["rows"] if name in results else []
    return [row for row in widest(rows) if row.get("foreign", 1.0) <= DISTURBED] if rows else []
