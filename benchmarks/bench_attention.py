"""Attention itself: packed, against `F.scaled_dot_product_attention` with a mask on the padded batch. 8 heads of 64.

Each contestant is compared with float64 first, output and gradients, and nothing is reported of one that fails.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varlen_attn import SeqLayout, padded_attention, varlen_attention
from varlen_attn.testing import assert_within_budget, reference_attention

from .measure import interleave, ratio, save
from .workloads import WORKLOADS, Workload

HEADS, HEAD_DIM = 8, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GOALS = {
    ("float32", "forward"): {"w1": 3.5, "w2": 1.8, "w3": 3.5, "w4": 3.8, "w5": 0.97, "w6": 0.97},
    ("float32", "forward+backward"): {"w1": 3.8, "w2": 1.9, "w3": 5.0, "w4": 3.7, "w5": 0.97, "w6": 0.97},
}


@dataclass(frozen=True)
class Contestant:
    """One way to compute the batch.

    Attributes:
        inputs: q, k, v as it wants them.
        attend: the call.
        rows: its result, as packed rows ``(T, N, H)``, to compare.
        grad: the gradient of its result.
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    rows: Callable[[Tensor], Tensor]
    grad: Tensor

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.attend(*self.inputs)

    def both(self) -> Sequence[Tensor]:
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        out = self.attend(*leaves)
        return (out, *torch.autograd.grad(out, leaves, self.grad))


def build(workload: Workload, layout: SeqLayout, tensors: Sequence[Tensor]) -> dict[str, Contestant]:
    """All contestants, on the same numbers: ``tensors`` are packed q, k, v and the gradient of the output."""
    padded = [layout.unpack(x) for x in tensors]
    *qkv_BSNH, grad_BSNH = padded
    *qkv_BNSH, grad_BNSH = (x.transpose(1, 2).contiguous() for x in padded)
    keep = ~workload.key_padding_mask[:, None, None]

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = varlen_attention(q, k, v, layout)
        return result

    def through_padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = padded_attention(q, k, v, layout=layout)
        return result

    def rows_of_heads(x: Tensor) -> Tensor:
        return layout.pack(x.transpose(1, 2))

    found = {
        "masked": Contestant((qkv_BNSH[0], qkv_BNSH[1], qkv_BNSH[2]), masked, rows_of_heads, grad_BNSH),
        "packed": Contestant((tensors[0], tensors[1], tensors[2]), packed, lambda x: x, tensors[3]),
        "pack+unpack": Contestant((qkv_BSNH[0], qkv_BSNH[1], qkv_BSNH[2]), through_padding, layout.pack, grad_BSNH),
    }
    if layout.is_dense:
        found["dense"] = Contestant(found["masked"].inputs, F.scaled_dot_product_attention, rows_of_heads, grad_BNSH)
    return found


def verify(contestants: dict[str, Contestant], layout: SeqLayout, tensors: Sequence[Tensor]) -> None:
    """Raise AssertionError unless all outputs and gradients are as near to float64 as eager attention is; one head at a time."""
    for name, contestant in contestants.items():
        for got, want, plain in zip(_packed_results(contestant), *_expected(layout, tensors), strict=True):
            assert_within_budget(got, want, plain, gradient=True, what=name)


def _packed_results(contestant: Contestant) -> list[Tensor]:
    return [contestant.rows(x.detach()) for x in contestant.both()]


def _expected(layout: SeqLayout, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of q, k, v in float64, and by eager attention in the dtype of the tensors."""
    key = (id(layout), tensors[0].dtype)
    if key not in _known:
        _known.clear()
        _known[key] = tuple(_reference(layout, tensors, dtype) for dtype in (torch.float64, tensors[0].dtype))
    truth, plain = _known[key]
    return truth, plain


_known: dict[tuple[int, torch.dtype], tuple[list[Tensor], ...]] = {}


def _reference(layout: SeqLayout, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    heads = []
    for head in range(tensors[0].shape[1]):
        q, k, v, grad = (x[:, head : head + 1].to(dtype).requires_grad_() for x in tensors)
        out = reference_attention(q, k, v, layout, dtype=dtype)
        heads.append([out.detach(), *torch.autograd.grad(out, (q, k, v), grad.detach())])
    return [torch.cat(parts, dim=1) for parts in zip(*heads, strict=True)]


def bench(workload: Workload, dtype: str, budget: float) -> list[dict[str, Any]]:
    """One row for each direction."""
    generator = torch.Generator().manual_seed(1)
    layout = SeqLayout.from_lengths(workload.lengths, workload.padded_len)
    shape = (layout.num_rows, HEADS, HEAD_DIM)
    tensors = [torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(4)]
    contestants = build(workload, layout, tensors)
    verify(contestants, layout, tensors)
    rows = []
    for direction in ("forward", "forward+backward"):
        calls = {name: c.forward if direction == "forward" else c.both for name, c in contestants.items()}
        timings = interleave({**calls, "masked again": calls["masked"]}, budget=budget)
        rows.append(
            {
                "threads": torch.get_num_threads(),
                "dtype": dtype,
                "workload": workload.name,
                "direction": direction,
                "batch": str(workload),
                "milliseconds": {name: round(t.seconds * 1e3, 3) for name, t in timings.items()},
                "spread": {name: round(t.spread, 3) for name, t in timings.items()},
                "ratio": {name: round(ratio(timings["masked"], timings[name]), 3) for name in timings if name != "masked"},
                "ratio_dense": round(ratio(timings["dense"], timings["packed"]), 3) if "dense" in timings else None,
                "rounds": len(timings["masked"].rounds),
                "foreign": round(timings["masked"].foreign, 3),
                "goal": GOALS.get((dtype, direction), {}).get(workload.name) if torch.get_num_threads() == 2 else None,
            }
        )
        print(
            f"{dtype:9} {workload.name} {direction:17}",
            rows[-1]["milliseconds"],
            "ratios",
            rows[-1]["ratio"],
            "others",
            rows[-1]["foreign"],
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [w.name for w in WORKLOADS]
    parser.add_argument("--workload", nargs="+", choices=names, default=names)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=2, help="1 is timed by CPU time, more by the wall clock")
    parser.add_argument("--budget", type=float, default=15.0, help="seconds for one row; never fewer than 5 rounds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dtype in options.dtype:
        for workload in WORKLOADS:
            if workload.name in options.workload:
                path = save("attention", bench(workload, dtype, options.budget), ("threads", "dtype", "workload", "direction"))
    print(f"written: benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
