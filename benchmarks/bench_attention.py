"""Attention itself, on a padded or a packed batch: ours by every backend that is here, and what else there is. 8 heads of 64.

The baseline is `F.scaled_dot_product_attention` with a bool mask. Each contestant is compared with float64 first, output and gradients,
and nothing is reported of one that fails. One that takes more than four times as long as the baseline is timed once, outside of the
turns, and marked so; one that cannot run stands there with the reason.

Beside every batch stands what the machine can do, measured in the same run: the rate of a large matrix product, and that of torch's flash
kernel on one sequence of 4096 tokens. Useful work of a batch is ``4 * N * H * sum(L^2)`` forward, 3.5 times that with the backward.

With ``--grid`` the compiled kernel meets torch's (the backend `cpu`) instead, in float32, on batches of equal lengths by length and head
dimension. To see what a CPU without AVX-512 would give, set ``ATEN_CPU_CAPABILITY=avx2 DNNL_MAX_CPU_ISA=AVX2``.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varlen_attn import SeqLayout, explain, varlen_attention
from varlen_attn.testing import assert_within_budget, reference_attention

from .contestants import (
    AUTO,
    MASKED,
    UNMASKED,
    WITH_PACKING,
    Case,
    Contestant,
    contestants,
    masked,
    our_backend,
    reasons_without_backward,
)  # fmt: skip
from .measure import DTYPES, PATIENCE, Timing, add_machine, facts, interleave, ratio, save, use_machine
from .workloads import SYNTHETIC, WORKLOADS, Workload

HEADS, HEAD_DIM = 8, 64
DIRECTIONS = ("forward", "forward+backward")
AGAIN = "masked again"
KEYS = ("threads", "dtype", "workload", "direction")
# Ratios to masked attention on two threads that each backend should reach. Those of `cpu` were set on a CPU with AMX.
GOALS = {
    "cpu_native": {
        ("float32", "forward+backward"): {"w1": 5.0, "w3": 8.8, "w4": 4.4, "w5": 1.3, "w6": 3.0},
        ("bfloat16", "forward+backward"): {"w1": 8.0, "w3": 25.0, "w4": 4.2, "w5": 2.0, "w6": 14.0},
    },
    "cpu": {
        ("float32", "forward"): {"w1": 4.0, "w2": 1.9, "w3": 5.0, "w4": 4.0, "w5": 1.0, "w6": 1.9},
        ("float32", "forward+backward"): {"w1": 4.0, "w2": 2.0, "w3": 7.4, "w4": 3.9, "w5": 0.99, "w6": 2.1},
        ("bfloat16", "forward"): {"w1": 2.5, "w2": 1.9, "w3": 3.3, "w4": 4.0, "w5": 1.0, "w6": 1.3},
        ("bfloat16", "forward+backward"): {"w1": 3.0, "w2": 1.8, "w3": 9.4, "w4": 3.7, "w5": 1.0, "w6": 4.7},
    },
}
ROOF_LENGTH, ROOF_GEMM = 4096, {"cpu": 2048, "cuda": 8192}
BACKWARD = 3.5  # work of forward and backward / work of forward: five products where the forward has two


# -------------------------------------------------------------------- verified


def verify(found: dict[str, Contestant], layout: SeqLayout, tensors: Sequence[Tensor]) -> dict[str, str]:
    """Compare outputs and gradients with float64: the error may be what eager attention may make. The reasons of those that fail.

    Raises:
        AssertionError: one of ours fails, or the baseline. There is nothing to report then.
    """
    truth, plain = (_reference(layout, tensors, dtype) for dtype in (torch.float64, tensors[0].dtype))
    failed = {}
    for name, contestant in found.items():
        try:
            results = contestant.results()
            for got, want, naive in zip(results, truth[: len(results)], plain[: len(results)], strict=True):
                assert_within_budget(got, want, naive, gradient=True, what=name)
        except (AssertionError, RuntimeError, NotImplementedError) as error:
            if name == MASKED or name.startswith((AUTO, WITH_PACKING)):
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return failed


def _reference(layout: SeqLayout, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of q, k, v by the specification; one head at a time, for the memory."""
    heads = []
    for head in range(tensors[0].shape[1]):
        q, k, v, grad = (x[:, head : head + 1].to(dtype).requires_grad_() for x in tensors)
        out = reference_attention(q, k, v, layout, dtype=dtype)
        heads.append([out.detach(), *torch.autograd.grad(out, (q, k, v), grad.detach())])
    return [torch.cat(parts, dim=1) for parts in zip(*heads, strict=True)]


# -------------------------------------------------------------------- the roof


def roof(dtype: torch.dtype, device: str, budget: float = 3.0) -> dict[str, float]:
    """GFLOP/s of a large matrix product, and of torch's flash kernel on a long sequence, in turns."""
    rows = ROOF_GEMM[device]
    a, b = (torch.randn(rows, rows).to(device, dtype) for _ in range(2))
    q, k, v = (torch.randn(1, HEADS, ROOF_LENGTH, HEAD_DIM).to(device, dtype) for _ in range(3))
    work = {"gemm": 2 * rows**3, "flash": useful_flops((ROOF_LENGTH,))}
    timings = interleave({"gemm": lambda: a @ b, "flash": lambda: F.scaled_dot_product_attention(q, k, v)}, budget=budget, device=device)
    return {name: round(flops / timings[name].seconds / 1e9, 1) for name, flops in work.items()}


def useful_flops(lengths: Sequence[int]) -> int:
    """Of a forward: two products for each pair of tokens of a sequence."""
    return 4 * HEADS * HEAD_DIM * sum(n * n for n in lengths)


# -------------------------------------------------------------------- timed


def bench(
    case: Case, dtype: str, budget: float, attainable: dict[str, float], directions: Sequence[str] = DIRECTIONS, *, others: bool = True
) -> list[dict[str, Any]]:
    """One row for each direction; without ``others``, of the baseline and ours only."""
    found, absent = contestants(case, others)
    failed = verify(found, case.layout, case.tensors)
    found, absent = {name: c for name, c in found.items() if name not in failed}, absent | failed
    rows = []
    for direction in directions:
        calls: dict[str, Callable[[], object]]
        if direction == "forward":
            reasons, calls = absent, {name: c.forward for name, c in found.items()}
        else:
            reasons, calls = absent | reasons_without_backward(found), {name: c.both for name, c in found.items() if c.grad is not None}
        again = {AGAIN: calls[MASKED]}
        timings = interleave({**calls, **again}, rounds=7, warm_up=0, budget=budget, patience=PATIENCE, device=case.device)
        rows.append({**_row(case, dtype, direction, timings, attainable), "absent": reasons})
    return rows


def _row(case: Case, dtype: str, direction: str, timings: dict[str, Timing], attainable: dict[str, float]) -> dict[str, Any]:
    work = useful_flops(case.workload.lengths) * (1 if direction == "forward" else BACKWARD)
    plan = explain(*case.tensors[:3], case.layout)
    return {
        "dtype": dtype,
        "workload": case.workload.name,
        "direction": direction,
        "batch": str(case.workload),
        **facts(timings, MASKED),
        "ratio_dense": round(ratio(timings[UNMASKED], timings[AUTO]), 3) if UNMASKED in timings else None,
        "backend": plan.backend,
        "kernel": plan.kernel,
        "gflops": round(work / timings[AUTO].seconds / 1e9, 1),
        "attainable": attainable,
    }


# -------------------------------------------------------------------- the compiled kernel against torch's

GRID_LENGTHS, GRID_DIMS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192), (16, 32, 64, 96, 128)
PLAIN, SHARE, OVER_MASKED = "self-attention", "share of a matrix product", "masked SDPA / cpu_native"
# More than lengths and dimensions: query heads, key/value heads, and options, at GRID_OPTION_LENGTHS and head dimension 64.
GRID_OPTIONS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "causal": (8, 8, {"causal": True}),
    "window 64": (8, 8, {"window": (64, 64)}),
    "causal, window 256": (8, 8, {"causal": True, "window": (256, 0)}),
    "8 heads over 2": (8, 2, {}),
    "8 heads over 1": (8, 1, {}),
    "16 heads": (16, 16, {}),
    "1 sequence, 1 head": (1, 1, {}),
}
GRID_OPTION_LENGTHS = (16, 64, 256, 512, 2048)
GRID_NOISE, GRID_TRIES = 1.03, 4  # a ratio below is measured again, so many times in all
GRID_SLOWER = 0.97  # and below this the compiled kernel counts as the slower one
GRID_KEYS = ("threads", "what", "direction", "head_dim", "length")


def keep_memory() -> None:
    """Let glibc keep what is freed. Else each call of one of the kernels may get its results page by page from the system, and not of the
    other, by chance; short sequences take a quarter longer then."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, 1 << 30), mallopt(-3, 1 << 25)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD


def grid_rows(threads: int, budget: float, what: str) -> list[dict[str, Any]]:
    """One row for each cell: the least time of each kernel, and the ratio of them."""
    cells: list[tuple[str, int, int, int, int, int, dict[str, Any]]]
    if what in (PLAIN, SHARE):  # fewer heads and tokens where rows are long, for the time
        lengths, dims = (GRID_LENGTHS, GRID_DIMS) if what == PLAIN else (GRID_LENGTHS[6:], (HEAD_DIM,))
        sizes = [(n, 8 if n <= 512 else 4 if n <= 1024 else 2, max(1, 4096 // n)) for n in lengths]
        cells = [(what, n, batch, heads, heads, dim, {}) for dim in dims for n, heads, batch in sizes]
    else:
        heads, kv_heads, rest = GRID_OPTIONS[what]
        batches = [(n, 1 if heads == 1 else max(1, 4096 // n)) for n in GRID_OPTION_LENGTHS]
        cells = [(what, n, batch, heads, kv_heads, HEAD_DIM, rest) for n, batch in batches]
    return [_cell(threads, budget, direction, *cell) for cell in cells for direction in DIRECTIONS]


def _least(calls: dict[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """Seconds by contestant. Again where the compiled kernel is not clearly faster than the first."""
    found: list[dict[str, Timing]] = []
    while True:
        found.append(interleave(calls, rounds=9, least=0.01, warm_up=1, budget=budget, fewest=3))
        least = {name: min(seconds for timings in found for seconds in timings[name].rounds) for name in calls}
        if least[next(iter(calls))] >= GRID_NOISE * least["cpu_native"] or len(found) == GRID_TRIES:
            return least


def workload_rows(threads: int, budget: float) -> list[dict[str, Any]]:
    """Of the grid too: w1 to w6 against masked SDPA, in both dtypes."""
    rows: list[dict[str, Any]] = []
    for workload in SYNTHETIC:
        for dtype in DTYPES:
            case = Case.of(workload, DTYPES[dtype], HEADS, HEAD_DIM)
            made = {MASKED: masked(case), "cpu_native": our_backend(case, "cpu_native")}
            for direction in DIRECTIONS:
                calls: dict[str, Callable[[], object]] = {n: c.forward if direction == DIRECTIONS[0] else c.both for n, c in made.items()}
                least = _least(calls, budget)
                place = {"threads": threads, "what": OVER_MASKED, "direction": direction, "head_dim": dtype, "length": workload.name}
                times = {name: round(seconds * 1e3, 3) for name, seconds in least.items()}
                rows.append({**place, "milliseconds": times, "ratio": round(least[MASKED] / least["cpu_native"], 3)})
                print(rows[-1], flush=True)
    return rows


def _cell(
    threads: int, budget: float, direction: str, what: str, length: int, batch: int, heads: int, kv_heads: int, dim: int,
    rest: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    layout = SeqLayout.from_lengths([length] * batch)
    q, k, v, grad = (torch.randn(layout.num_rows, n, dim) for n in (heads, kv_heads, kv_heads, heads))
    attend = {name: partial(varlen_attention, layout=layout, backend=name, **rest) for name in ("cpu", "cpu_native")}
    made = {name: Contestant((q, k, v), call, lambda x: x, grad) for name, call in attend.items()}
    calls: dict[str, Callable[[], object]] = {n: c.forward if direction == DIRECTIONS[0] else c.both for n, c in made.items()}
    if what == SHARE:
        a, b = (torch.randn(ROOF_GEMM["cpu"], ROOF_GEMM["cpu"]) for _ in range(2))
        calls["gemm"] = lambda: a @ b
    least = _least(calls, budget)
    row = {"threads": threads, "what": what, "direction": direction, "head_dim": dim, "length": length, "batch": batch, "heads": heads}
    times = {name: round(seconds * 1e3, 3) for name, seconds in least.items()}
    found = {**row, "milliseconds": times, "ratio": round(least["cpu"] / least["cpu_native"], 3)}
    if what == SHARE:
        work = 4 * heads * dim * batch * length**2 * (1 if direction == DIRECTIONS[0] else BACKWARD)
        found["share"] = round(work / least["cpu_native"] / (2 * ROOF_GEMM["cpu"] ** 3 / least["gemm"]), 3)
    print(found, flush=True)
    return found


def chosen(names: Sequence[str]) -> list[Workload]:
    return [w for w in WORKLOADS if w.name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [w.name for w in WORKLOADS]
    parser.add_argument("--workload", nargs="+", choices=names, default=names)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--grid", nargs="+", choices=[PLAIN, SHARE, OVER_MASKED, *GRID_OPTIONS], help="the compiled kernel against torch's")
    parser.add_argument("--everything", action="store_true", help="also what takes minutes on a CPU: nested tensors, flex_attention")
    add_machine(parser, budget=6.0)
    options = parser.parse_args()
    use_machine(options.device, options.threads)
    if options.grid:
        keep_memory()
        name = f"grid_{torch.backends.cpu.get_cpu_capability().lower()}"
        for what in options.grid:
            measured = workload_rows if what == OVER_MASKED else partial(grid_rows, what=what)
            print("written:", save(name, measured(options.threads, options.budget), GRID_KEYS))
        return
    for dtype in options.dtype:
        attainable = roof(DTYPES[dtype], options.device)
        print(f"{dtype}: the machine does", attainable, "GFLOP/s", flush=True)
        for workload in chosen(options.workload):
            case = Case.of(workload, DTYPES[dtype], HEADS, HEAD_DIM, options.device, options.everything)
            for row in bench(case, dtype, options.budget, attainable, options.direction):
                path = save("attention", [row], KEYS, options.device)
                print(
                    f"{dtype:9} {workload.name:6} {row['direction']:17} {row['milliseconds']} ratios {row['ratio']} others {row['foreign']}"
                )
                print(f"{'':9} {row['backend']} at {row['gflops']} GFLOP/s; absent: {sorted(row['absent'])}", flush=True)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
