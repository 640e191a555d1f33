"""From which fill on is the padded call faster? Packed (pack, attend, unpack) against masked attention on the padded batch, by fill.

`varlen_attn.route` goes by this table: dense only where nothing is padded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varlen_attn import SeqLayout, padded_attention

from .measure import interleave, ratio, save

HEADS, HEAD_DIM = 8, 64
SHAPES = ((64, 64), (32, 128), (8, 512), (2, 2048))  # B, S: about as many positions each
FILLS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def lengths_of(batch: int, padded_len: int, fill: float) -> list[int]:
    """Lengths spread evenly around ``fill``, one of them full."""
    width = min(fill, 1 - fill)
    lengths = [round(padded_len * (fill - width + 2 * width * (i + 0.5) / batch)) for i in range(batch)]
    return [max(1, min(n, padded_len)) for n in (*lengths[:-1], padded_len)]


def bench(batch: int, padded_len: int, fill: float, budget: float) -> list[dict[str, Any]]:
    """One row for each direction. Both contestants read and write padded ``(B, S, N, H)``, as a model does."""
    layout = SeqLayout.from_lengths(lengths_of(batch, padded_len, fill), padded_len)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(batch, padded_len, HEADS, HEAD_DIM, generator=generator) for _ in range(4))
    keep = layout.unpack(torch.ones(layout.num_rows)).bool()[:, None, None]

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = padded_attention(q, k, v, layout=layout)
        return result

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2)

    real = keep[:, 0, 0, :, None, None]
    torch.testing.assert_close(packed(q, k, v), masked(q, k, v) * real)

    def forward(attend: Callable[..., Tensor]) -> Callable[[], object]:
        return torch.no_grad()(lambda: attend(q, k, v))

    def both(attend: Callable[..., Tensor]) -> Callable[[], object]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return lambda: torch.autograd.grad(attend(*leaves), leaves, grad)

    rows = []
    for direction, calls in (("forward", forward), ("forward+backward", both)):
        timings = interleave({"masked": calls(masked), "packed": calls(packed)}, budget=budget)
        rows.append(
            {
                "threads": torch.get_num_threads(),
                "batch": batch,
                "padded_len": padded_len,
                "fill": fill,
                "direction": direction,
                "milliseconds": {name: round(t.seconds * 1e3, 3) for name, t in timings.items()},
                "ratio": round(ratio(timings["masked"], timings["packed"]), 3),
                "foreign": round(timings["masked"].foreign, 3),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="1 is timed by CPU time, more by the wall clock")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for one row; never fewer than 5 rounds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [row for shape in SHAPES for fill in FILLS for row in bench(*shape, fill, options.budget)]
    print(f"written: benchmarks/results/{save('route', rows, ('batch', 'padded_len', 'fill', 'direction')).name}")


if __name__ == "__main__":
    main()
