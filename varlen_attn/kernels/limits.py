"""Calls that are larger than a kernel can count, in parts (R-22).

Flash-attention's kernels start ``(blocks of rows, sequences, heads)`` and the memory-efficient one ``(blocks, heads, sequences)``; CUDA
counts to 65,535 in the second and in the third place, and refuses to start more. Read in flash-attention's launch templates (which torch
carries too) and in torch's ``mem_eff_attention/kernel_forward.h`` and ``kernel_backward.h`` (2.11 and 2.13).

The backward of flash-attention 2 counts the gradient of a query in 32 bits, with every sequence in blocks of 128 rows and heads in
multiples of 32: beyond that it reads and writes illegal memory (torch 2.11 on an H200). Its forward does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .._torch import is_tracing
from ..errors import ArgumentError
from ..layout.seq_layout import SeqLayout
from .kept import kept
from .values import Call, Result

MAX_GRADIENT = 2**31 - 1  # of flash-attention 2, in torch and as a package
MAX_SEQUENCES = 65_535 - 4_095  # what is left is for sequences that an adapter adds, such as those over slack rows


def in_parts(query: Tensor, key: Tensor, value: Tensor, call: Call, most: int, run: Callable[..., Result]) -> Result:
    """``run(query, key, value, call)``, with at most so many sequences at a time."""
    known = call.layout_q.lengths is not None and call.layout_kv.lengths is not None and not is_tracing(query)
    return (_by_rows if known else _by_offsets)(query, key, value, call, most, run)


def _slices(num_seqs: int, most: int) -> Iterator[slice]:
    for start in range(0, num_seqs, most):
        yield slice(start, min(start + most, num_seqs))


def _by_rows(query: Tensor, key: Tensor, value: Tensor, call: Call, most: int, run: Callable[..., Result]) -> Result:
    """The rows of a part stand together, and the host knows where."""
    outs, lses, rows_q, rows_k = [], [], 0, 0
    for part in kept(*call.layouts, ("parts", most), lambda: _layouts_of_parts(*call.layouts, most)):
        mine_q, mine_k = slice(rows_q, rows_q + part[0].num_rows), slice(rows_k, rows_k + part[1].num_rows)
        rows_q, rows_k = mine_q.stop, mine_k.stop
        out, lse = run(query[mine_q], key[mine_k], value[mine_k], call.on(*part))
        outs.append(out)
        lses += [] if lse is None else [lse]
    return torch.cat(outs), torch.cat(lses, 1) if lses else None


def _layouts_of_parts(layout_q: SeqLayout, layout_kv: SeqLayout, most: int) -> list[tuple[SeqLayout, SeqLayout]]:
    parts = []
    for part in _slices(layout_q.num_seqs, most):
        part_q = part_kv = SeqLayout.from_lengths((layout_q.lengths or ())[part], device=layout_q.device)
        if layout_kv is not layout_q:
            part_kv = SeqLayout.from_lengths((layout_kv.lengths or ())[part], device=layout_kv.device)
        parts.append((part_q, part_kv))
    return parts


def _by_offsets(query: Tensor, key: Tensor, value: Tensor, call: Call, most: int, run: Callable[..., Result]) -> Result:
    """Only the device knows where a part begins: kernels get all rows, and the part's offsets; what they leave unwritten is not taken."""
    ids_q, ids_k = (layout.seq_ids[:, None, None] for layout in call.layouts)
    out: Tensor | None = None
    lse: Tensor | None = None
    for part in _slices(call.layout_q.num_seqs, most):
        mine_q, mine_k = ((ids >= part.start) & (ids < part.stop) for ids in (ids_q, ids_k))
        part_q, part_kv = (x._part(part) for x in call.layouts)
        part_kv = part_q if call.layout_kv is call.layout_q else part_kv
        q, k, v = torch.where(mine_q, query, 0), torch.where(mine_k, key, 0), torch.where(mine_k, value, 0)
        some, some_lse = run(q, k, v, call.on(part_q, part_kv))
        out = torch.where(mine_q, some, 0 if out is None else out)
        if some_lse is not None:
            lse = torch.where(mine_q[:, 0, 0], some_lse, float("-inf") if lse is None else lse)
    assert out is not None
    return out, lse


def heads_at_once(query: Tensor, key: Tensor, value: Tensor, call: Call, most: int) -> int:
    """How many query heads a kernel takes whose gradient may have ``most`` elements; all, where there is none.

    Raises:
        ArgumentError: one head is too much.
    """
    num_heads = query.shape[1]
    of_one = (query.shape[0] + 128 * call.layout_q.num_seqs) * (-(-query.shape[2] // 32) * 32)
    if of_one * num_heads <= most or not (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))):
        return num_heads
    if of_one > most:
        raise ArgumentError(
            f"`query` must have at most {most} elements a head for the backward of this kernel, each sequence rounded up to 128 rows, but "
            f"has {of_one}: pass fewer sequences at a time, or backend='mem_efficient'."
        )
    return most // of_one


def in_heads(query: Tensor, key: Tensor, value: Tensor, call: Call, most: int, run: Callable[..., Result]) -> Result:
    """``run(query, key, value, call)``, with at most so many query heads at a time, and the key heads that they share."""
    group = query.shape[1] // key.shape[1]
    size = most - most % group if most >= group else max(n for n in range(1, most + 1) if group % n == 0)
    again = max(group // size, 1)  # parts of one key head
    keys, values = ([part for part in x.split(max(size // group, 1), 1) for _ in range(again)] for x in (key, value))
    results = [
        run(*qkv, call._replace(extras=call.extras.of_heads(i * size, size)))
        for i, qkv in enumerate(zip(query.split(size, 1), keys, values, strict=True))
    ]
    lses = [lse for _, lse in results if lse is not None]
    return torch.cat([out for out, _ in results], 1), torch.cat(lses) if lses else None
