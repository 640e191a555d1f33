"""What packing costs: finding the tokens of a mask, leaving padding out, putting it back. Rows of 512 numbers, on a padded batch.

Baselines are what people write: ``x[mask]``, `torch.masked_select`, `torch.index_select` with `nonzero`, and for the way back
``out[mask] = rows``, `index_copy_` and `masked_scatter`. All give the same rows, and this is checked bit by bit.

The jagged ops are torch's own, from FBGEMM: for padding on the right alone, floating point, without a gradient, and they want offsets.
On a GPU there are also q, k and v together, and the Triton kernel of `fused_rows`, if Triton is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from varlen_attn import SeqLayout

from . import fused_rows
from .measure import DTYPES, PATIENCE, add_machine, facts, interleave, save, use_machine
from .workloads import WORKLOADS, Workload

WIDTH = 512
KEYS = ("threads", "dtype", "workload", "what")
BUILD, PACK, UNPACK, PACK_QKV = "build", "pack", "unpack", "pack q, k, v"
BASE = {BUILD: "nonzero", PACK: "x[mask]", UNPACK: "out[mask] = rows", PACK_QKV: "x[mask], three times"}
OURS = {BUILD: "SeqLayout.from_key_padding_mask", PACK: "layout.pack", UNPACK: "layout.unpack", PACK_QKV: "layout.pack, three times"}

Contest = dict[str, Callable[[], Tensor | tuple[Tensor, ...]]]


def contests(mask: Tensor, x: Tensor, gpu: bool) -> dict[str, Contest]:
    """By what is done, the baseline first. ``mask`` is True at padding; each call gives tensors to compare."""
    keep, (batch, columns, width) = ~mask, x.shape
    layout, flat = SeqLayout.from_key_padding_mask(mask), x.view(batch * columns, width)
    rows, index = layout.pack(x), keep.flatten().nonzero().squeeze(1)
    offsets, total = [layout.cu_seqlens.long()], layout.num_rows
    jagged = torch.ops.aten

    def assigned() -> Tensor:
        out = torch.zeros_like(x)
        out[keep] = rows
        return out

    found: dict[str, Contest] = {
        BUILD: {
            BASE[BUILD]: lambda: keep.flatten().nonzero().squeeze(1),
            "nonzero, lengths and offsets": lambda: _by_hand(keep),
            OURS[BUILD]: lambda: SeqLayout.from_key_padding_mask(mask).token_indices,
        },
        PACK: {
            BASE[PACK]: lambda: x[keep],
            "index_select, index at hand": lambda: flat.index_select(0, index),
            "nonzero and index_select": lambda: flat.index_select(0, keep.flatten().nonzero().squeeze(1)),
            "masked_select": lambda: x.masked_select(keep[..., None]).view(-1, width),
            "jagged op, right padding only": lambda: jagged._padded_dense_to_jagged_forward(x, offsets, total),
            OURS[PACK]: lambda: layout.pack(x),
        },
        UNPACK: {
            BASE[UNPACK]: assigned,
            "index_copy_, index at hand": lambda: flat.new_zeros(flat.shape).index_copy_(0, index, rows).view(x.shape),
            "masked_scatter": lambda: torch.zeros_like(x).masked_scatter(keep[..., None], rows),
            "jagged op, right padding only": lambda: jagged._jagged_to_padded_dense_forward(rows, offsets, [columns], 0.0),
            OURS[UNPACK]: lambda: layout.unpack(rows),
        },
    }
    if gpu:
        qkv = torch.stack([x, x + 1, x + 2], 2)  # as a fused projection leaves them: views with other rows between theirs
        query, key, value = qkv.unbind(2)
        found[PACK_QKV] = {
            BASE[PACK_QKV]: lambda: (query[keep], key[keep], value[keep]),
            "layout.pack, stacked": lambda: layout.pack(qkv).unbind(1),
            OURS[PACK_QKV]: lambda: (layout.pack(query), layout.pack(key), layout.pack(value)),
        }
        _add_triton(found, layout, flat, rows, [part.flatten(0, 1) for part in (query, key, value)])
    return found


def _add_triton(found: dict[str, Contest], layout: SeqLayout, flat: Tensor, rows: Tensor, qkv: list[Tensor]) -> None:
    """The kernel, unless it cannot run."""
    reason = fused_rows.why_not()
    if reason is not None:
        print(f"without Triton's kernel, which {reason}")
        return
    forth, back = fused_rows.rows_of(layout)
    found[PACK]["Triton"] = lambda: fused_rows.move(forth, back, [flat])
    found[UNPACK]["Triton"] = lambda: fused_rows.move(back, forth, [rows])[0].view(layout.batch_size, layout.padded_len, -1)
    found[PACK_QKV]["Triton, one launch"] = lambda: fused_rows.move(forth, back, qkv)


def _by_hand(keep: Tensor) -> Tensor:
    """What a varlen kernel wants of a mask: indices, offsets and the longest row."""
    lengths = keep.sum(1, dtype=torch.int32)
    torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    int(lengths.max())
    return keep.flatten().nonzero().squeeze(1)


def verify(contest: Contest) -> None:
    want = _each(next(iter(contest.values()))())
    for name, call in contest.items():
        assert all(map(torch.equal, _each(call()), want)), f"{name} gives other rows"


def _each(rows: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return rows if isinstance(rows, tuple) else (rows,)


def bench(workload: Workload, dtype: str, device: str, budget: float) -> list[dict[str, Any]]:
    mask = workload.key_padding_mask.to(device)
    x = torch.randn(*mask.shape, WIDTH, generator=torch.Generator().manual_seed(0)).to(device, DTYPES[dtype]) * ~mask[..., None]
    rows = []
    for what, contest in contests(mask, x, device == "cuda").items():
        verify(contest)
        again: dict[str, Callable[[], object]] = {"again": contest[BASE[what]]}
        timings = interleave({**contest, **again}, budget=budget, patience=PATIENCE, device=device)
        rows.append({"dtype": dtype, "workload": workload.name, "what": what, "batch": str(workload), **facts(timings, BASE[what])})
        print(f"{dtype} {workload.name:6} {what:7} {rows[-1]['milliseconds']} ratios {rows[-1]['ratio']}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [w.name for w in WORKLOADS]
    parser.add_argument("--workload", nargs="+", choices=names, default=["w1", "w3", "w4", "w5", "text", "speech"])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"])
    add_machine(parser, budget=2.0)
    options = parser.parse_args()
    use_machine(options.device, options.threads)
    for dtype in options.dtype:
        for workload in WORKLOADS:
            if workload.name in options.workload:
                path = save("layout", bench(workload, dtype, options.device, options.budget), KEYS, options.device)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
