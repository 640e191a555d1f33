"""One attention layer, padded in and padded out: `nn.MultiheadAttention` with its fast path on and off, the layer written by hand over
`F.scaled_dot_product_attention`, and ours by every backend that is here. E 512, 8 heads; the same weights.

The contest itself is that of ``python -m varlen_attn bench``: all are compared with float64 first, outputs and all gradients. The baseline
is the layer by hand with a bool mask, which is mostly the faster one of torch's.
"""

from __future__ import annotations

import argparse

import torch

from varlen_attn.cli.bench import DIRECTIONS, Batch, Setting, rows

from .measure import DTYPES, add_machine, save, use_machine
from .workloads import WORKLOADS

WIDTH, HEADS = 512, 8
KEYS = ("threads", "dtype", "workload", "direction")
DEFAULT = ("w1", "w3", "w5", "w6", "text", "speech")  # a row of w2 or w4 takes a minute and says what attention alone says


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=[w.name for w in WORKLOADS], default=DEFAULT)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    add_machine(parser, budget=5.0)
    options = parser.parse_args()
    use_machine(options.device, options.threads)
    for dtype in options.dtype:
        setting = Setting(options.device, DTYPES[dtype], WIDTH, HEADS, budget=options.budget)
        for workload in WORKLOADS:
            if workload.name not in options.workload:
                continue
            batch = Batch(workload.name, workload.lengths, workload.padded_len)
            for row in rows([batch], setting, options.direction):
                row = {"dtype": dtype, "workload": row.pop("name"), **row, "batch": str(workload)}
                save("mha", [row], KEYS, options.device)
                print(f"{dtype:9} {workload.name:6} {row['direction']:17} {row['milliseconds']} ratios {row['ratio']}", flush=True)
    print(f"written: results/mha.json, on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
