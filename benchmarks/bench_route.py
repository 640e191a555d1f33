"""From which fill on is the padded call faster? Against masked attention on the padded batch, by fill: packed for the one call (pack,
attend, unpack), and attention on rows that are packed already, as a model that packs once has them. 8 heads of 64, float32.

`varlen_attn.route` goes by this table: dense only where nothing is padded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varlen_attn.bench import batch_of_fill

from .bench_attention import DIRECTIONS, verify
from .contestants import AUTO, MASKED, WITH_PACKING, Case, Contestant, our_backend, with_packing
from .measure import add_machine, interleave, ratio, save, use_machine
from .workloads import Workload

HEADS, HEAD_DIM = 8, 64
SHAPES = ((64, 64), (32, 128), (8, 512), (2, 2048))  # B, S: about as many positions each
FILLS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
KEYS = ("threads", "batch", "padded_len", "fill", "direction")


def masked(case: Case) -> Contestant:
    """On padded ``(B, S, N, H)``, as a model has it, and as pack and unpack have it."""
    q, k, v, grad = case.padded(heads_first=False)
    keep = case.keep

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2)

    return Contestant((q, k, v), attend, case.layout.pack, grad)


def bench(batch: int, padded_len: int, fill: float, device: str, budget: float) -> list[dict[str, Any]]:
    """One row for each direction."""
    workload = Workload("fill", f"fill {fill}", padded_len, batch_of_fill(fill, batch, padded_len).lengths)
    case = Case.of(workload, torch.float32, HEADS, HEAD_DIM, device)
    found = {MASKED: masked(case), WITH_PACKING: with_packing(case), AUTO: our_backend(case, "auto")}
    verify(found, case.layout, case.tensors)
    rows = []
    for direction in DIRECTIONS:
        calls: dict[str, Callable[[], object]] = {n: c.forward if direction == "forward" else c.both for n, c in found.items()}
        timings = interleave({**calls, "masked again": calls[MASKED]}, warm_up=0, budget=budget, device=device)
        rows.append(
            {
                "threads": torch.get_num_threads(),
                "batch": batch,
                "padded_len": padded_len,
                "fill": fill,
                "real_fill": round(workload.fill, 3),
                "direction": direction,
                "milliseconds": {name: round(t.seconds * 1e3, 3) for name, t in timings.items()},
                "ratio": round(ratio(timings[MASKED], timings[WITH_PACKING]), 3),
                "ratio_rows": round(ratio(timings[MASKED], timings[AUTO]), 3),
                "again": round(ratio(timings[MASKED], timings["masked again"]), 3),
                "foreign": round(timings[MASKED].foreign, 3),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", nargs="+", type=int, choices=[s for _, s in SHAPES], default=[s for _, s in SHAPES], help="S")
    parser.add_argument("--fill", nargs="+", type=float, default=list(FILLS))
    add_machine(parser, budget=1.0)
    options = parser.parse_args()
    use_machine(options.device, options.threads)
    for batch, padded_len in SHAPES:
        if padded_len in options.length:
            for fill in (f for f in options.fill if f * batch >= 1):  # one row is full, which is a fill of its own
                rows = bench(batch, padded_len, fill, options.device, options.budget)
                path = save("route", rows, KEYS, options.device)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
