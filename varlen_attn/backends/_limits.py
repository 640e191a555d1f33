"""Calls with more sequences than a kernel's grid can count, in parts (R-22).

Flash-attention's kernels start ``(blocks of rows, sequences, heads)`` and the memory-efficient one ``(blocks, heads, sequences)``; CUDA
counts to 65,535 in the second and in the third place, and refuses to start more. Read in flash-attention's launch templates (which torch
carries too) and in torch's ``mem_eff_attention/kernel_forward.h`` and ``kernel_backward.h`` (2.11 and 2.13); not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..layout import SeqLayout, is_tracing
from ._kept import kept

MAX_SEQUENCES = 65_535 - 4_095  # what is left is for sequences that an adapter adds, such as those over slack rows

Result = tuple[Tensor, Tensor | None]
Run = Callable[..., Result]


def in_grids(run: Run) -> Run:
    """`Backend.run` that never gets more than `MAX_SEQUENCES` sequences."""

    @wraps(run)
    def split(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout_q: SeqLayout,
        layout_kv: SeqLayout,
        *options: Any,
    ) -> Result:
        if layout_q.num_seqs <= MAX_SEQUENCES:
            return run(self, query, key, value, layout_q, layout_kv, *options)
        known = layout_q.lengths is not None and layout_kv.lengths is not None and not is_tracing(query)

        def attend(q: Tensor, k: Tensor, v: Tensor, part_q: SeqLayout, part_kv: SeqLayout) -> Result:
            return run(self, q, k, v, part_q, part_kv, *options)

        return (_by_rows if known else _by_offsets)(query, key, value, layout_q, layout_kv, attend)

    return split


def _parts(num_seqs: int) -> Iterator[slice]:
    for start in range(0, num_seqs, MAX_SEQUENCES):
        yield slice(start, min(start + MAX_SEQUENCES, num_seqs))


def _by_rows(query: Tensor, key: Tensor, value: Tensor, layout_q: SeqLayout, layout_kv: SeqLayout, attend: Callable[..., Result]) -> Result:
    """The rows of a part stand together, and the host knows where."""
    outs, lses, rows_q, rows_k = [], [], 0, 0
    for part_q, part_kv in kept(layout_q, layout_kv, ("parts", MAX_SEQUENCES), lambda: _layouts_of_parts(layout_q, layout_kv)):
        mine_q, mine_k = slice(rows_q, rows_q + part_q.num_rows), slice(rows_k, rows_k + part_kv.num_rows)
        rows_q, rows_k = mine_q.stop, mine_k.stop
        out, lse = attend(query[mine_q], key[mine_k], value[mine_k], part_q, part_kv)
        outs.append(out)
        lses += [] if lse is None else [lse]
    return torch.cat(outs), torch.cat(lses, 1) if lses else None


def _layouts_of_parts(layout_q: SeqLayout, layout_kv: SeqLayout) -> list[tuple[SeqLayout, SeqLayout]]:
    parts = []
    for part in _parts(layout_q.num_seqs):
        part_q = SeqLayout.from_lengths((layout_q.lengths or ())[part], device=layout_q.device)
        part_kv = part_q if layout_kv is layout_q else SeqLayout.from_lengths((layout_kv.lengths or ())[part], device=layout_kv.device)
        parts.append((part_q, part_kv))
    return parts


def _by_offsets(
    query: Tensor, key: Tensor, value: Tensor, layout_q: SeqLayout, layout_kv: SeqLayout, attend: Callable[..., Result]
) -> Result:
    """Only the device knows where a part begins: kernels get all rows, and the part's offsets; what they leave unwritten is not taken."""
    ids_q, ids_k = layout_q.seq_ids[:, None, None], layout_kv.seq_ids[:, None, None]
    out: Tensor | None = None
    lse: Tensor | None = None
    for part in _parts(layout_q.num_seqs):
        mine_q, mine_k = ((ids >= part.start) & (ids < part.stop) for ids in (ids_q, ids_k))
        part_q, part_kv = (replace(x, cu_seqlens=x.cu_seqlens[part.start : part.stop + 1]) for x in (layout_q, layout_kv))
        part_kv = part_q if layout_kv is layout_q else part_kv
        q, k, v = torch.where(mine_q, query, 0), torch.where(mine_k, key, 0), torch.where(mine_k, value, 0)
        some, some_lse = attend(q, k, v, part_q, part_kv)
        out = torch.where(mine_q, some, 0 if out is None else out)
        if some_lse is not None:
            lse = torch.where(mine_q[:, 0, 0], some_lse, float("-inf") if lse is None else lse)
    assert out is not None
    return out, lse
