"""From which fill on should one attention call stay padded? `padded_attention` packed against dense, for every backend that packs here.

Both routes are ours and both keep what stands at padding out: what is compared is moving rows with computing them. 8 heads of 64.
`varlen_attn.route` goes by this table, for calls that pack for themselves; whoever packs once for several layers always gains.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from varlen_attn import BackendRefused, padded_attention
from varlen_attn.bench import batch_of_fill

from .bench_attention import DIRECTIONS, verify
from .contestants import Case, Contestant
from .measure import DTYPES, add_machine, interleave, ours, ratio, save, use_machine
from .workloads import Workload

HEADS, HEAD_DIM = 8, 64
SHAPES = ((128, 16), (128, 32), (64, 64), (32, 128), (8, 512))  # B, S
FILLS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
KEYS = ("threads", "backend", "dtype", "batch", "padded_len", "fill", "direction")
NO_PACKING = ("sdpa_padded", "reference", "nested")  # they pad again, or run by order only


def contestant(case: Case, **options: Any) -> Contestant:
    q, k, v, grad = case.padded(heads_first=False)
    return Contestant((q, k, v), partial(padded_attention, layout=case.layout, **options), case.layout.pack, grad)


def bench(backend: str, dtype: str, batch: int, padded_len: int, fill: float, device: str, budget: float) -> list[dict[str, Any]]:
    """One row for each direction."""
    workload = Workload("fill", f"fill {fill}", padded_len, batch_of_fill(fill, batch, padded_len).lengths)
    case = Case.of(workload, DTYPES[dtype], HEADS, HEAD_DIM, device)
    found = {"packed": contestant(case, route="packed", backend=backend), "dense": contestant(case, route="dense")}
    failed = verify(found, case.layout, case.tensors)
    assert not failed, failed
    rows = []
    for direction in DIRECTIONS:
        calls: dict[str, Callable[[], object]] = {n: c.forward if direction == "forward" else c.both for n, c in found.items()}
        timings = interleave({**calls, "packed again": calls["packed"]}, warm_up=0, budget=budget, device=device)
        rows.append(
            {
                "threads": torch.get_num_threads(),
                "backend": backend,
                "dtype": dtype,
                "batch": batch,
                "padded_len": padded_len,
                "fill": fill,
                "real_fill": round(workload.fill, 3),
                "pairs": round(sum(n * n for n in workload.lengths) / (batch * padded_len**2), 3),
                "direction": direction,
                "milliseconds": {name: round(t.seconds * 1e3, 3) for name, t in timings.items()},
                "dense_to_packed": round(ratio(timings["dense"], timings["packed"]), 3),
                "again": round(ratio(timings["packed"], timings["packed again"]), 3),
                "foreign": round(timings["packed"].foreign, 3),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", nargs="+", type=int, choices=[s for _, s in SHAPES], default=[s for _, s in SHAPES], help="S")
    parser.add_argument("--fill", nargs="+", type=float, default=list(FILLS))
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    add_machine(parser, budget=0.4)
    options = parser.parse_args()
    use_machine(options.device, options.threads)
    available = [name for name, reason in ours(options.device).items() if reason is None and name not in NO_PACKING]
    for backend, dtype, (batch, padded_len) in ((b, d, s) for b in available for d in options.dtype for s in SHAPES):
        if padded_len in options.length:
            for fill in (f for f in options.fill if f * batch >= 1):  # one row is full, which is a fill of its own
                try:
                    rows = bench(backend, dtype, batch, padded_len, fill, options.device, options.budget)
                except BackendRefused:
                    continue  # this dtype is not for this backend
                save("break_even", rows, KEYS, options.device)


if __name__ == "__main__":
    main()
