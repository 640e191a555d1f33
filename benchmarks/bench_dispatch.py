"""What choosing costs: `choose` from its cache, and ``import varlen_attn`` beyond ``import torch``."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from statistics import median
from typing import Any

import torch

from varlen_attn import Problem, SeqLayout, choose

from .measure import save

GOAL_CHOOSE = 10.0  # microseconds
GOAL_IMPORT = 60.0  # milliseconds

_IMPORTS = """
import time
start = time.perf_counter()
import torch
between = time.perf_counter()
import varlen_attn
print(between - start, time.perf_counter() - between)
"""


def bench_choose(rounds: int = 9, calls: int = 2000) -> dict[str, Any]:
    """`choose` on a `Problem` that it has met, and the same with building the `Problem` from tensors, as every call does."""
    q, k, v = (torch.randn(12, 8, 64) for _ in range(3))
    layout = SeqLayout.from_lengths([5, 7])
    problem = Problem()
    choose(problem)

    def of_tensors() -> None:
        choose(Problem.of(q, k, v, layout, layout, problem.semantics, needs_grad=False))

    return {
        "what": "choose, cached",
        "microseconds": round(_per_call(lambda: choose(problem), rounds, calls), 2),
        "with the Problem built": round(_per_call(of_tensors, rounds, calls), 2),
        "goal": GOAL_CHOOSE,
    }


def _per_call(call: Any, rounds: int, calls: int) -> float:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        taken.append((time.perf_counter() - start) / calls)
    return median(taken) * 1e6


def bench_import(rounds: int) -> dict[str, Any]:
    """Fresh processes: each times ``import torch``, and then ``import varlen_attn``. (Differences of two processes drown in the
    noise of the first, which takes a second.)"""
    taken = []
    for _ in range(rounds + 1):
        done = subprocess.run([sys.executable, "-c", _IMPORTS], capture_output=True, text=True, check=True)
        taken.append([float(x) * 1e3 for x in done.stdout.split()])
    torch_ms, ours_ms = zip(*taken[1:], strict=True)  # the first round fills the file cache
    return {
        "what": "import varlen_attn, beyond import torch",
        "milliseconds": round(median(ours_ms), 1),
        "import torch": round(median(torch_ms), 1),
        "goal": GOAL_IMPORT,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="fresh processes")
    options = parser.parse_args()
    rows = [bench_choose(), bench_import(options.rounds)]
    for row in rows:
        print(row)
    print(f"written: benchmarks/results/{save('dispatch', rows, ('what',)).name}")


if __name__ == "__main__":
    main()
