"""Which keys each packed query row sees, and which blocks of 128 x 128 hold such pairs: the block mask of `flex_attention`.

Sequences stand one after another in packed rows, so the keys that a query sees (its document, cut by a causal mask and a window) are one
run of packed rows. Two numbers a row say everything, and the blocks follow from them: nothing of size T x Tk is made, as
`create_block_mask` does, and nothing is read from the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layout.seq_layout import SeqLayout
from ..kept import kept
from ..problem import Semantics

BLOCK = 128  # rows and columns of a block; what torch's own masks have, and every shipped kernel configuration divides it


class Rows(NamedTuple):
    """int32. Query row t sees the packed keys ``first_T[t] <= s < end_T[t]``; none if there is no such s, and for slack rows.

    ``aligned_T``: the packed key row at distance 0 (for ALiBi). Positions are those within the sequence.
    """

    first_T: Tensor
    end_T: Tensor
    aligned_T: Tensor
    q_positions_T: Tensor
    k_positions_T: Tensor


class Blocks(NamedTuple):
    """What `BlockMask` is made of, by its names: for each block of queries the number of its blocks of keys and then their indices, and
    the transposed. "Full" ones hold visible pairs only; the others may hold hidden ones, and are masked pair by pair."""

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor


class Visible(NamedTuple):
    rows: Rows
    blocks: Blocks


def visible_pairs(layout_q: SeqLayout, layout_kv: SeqLayout, semantics: Semantics) -> Visible:
    """`Visible`, made once for two layouts, a causal mask and a window."""
    key = ("visible", semantics.causal, semantics.window)
    return kept(layout_q, layout_kv, key, lambda: _build(layout_q, layout_kv, semantics))


def _build(layout_q: SeqLayout, layout_kv: SeqLayout, semantics: Semantics) -> Visible:
    rows = _rows(layout_q, layout_kv, semantics)
    touched, full = _touched(rows, layout_kv.num_rows), _full(rows, layout_kv.num_rows)
    partial = touched & ~full
    parts = (partial, full, partial.transpose(0, 1), full.transpose(0, 1))
    return Visible(rows, Blocks(*(x for part in parts for x in _ordered(part))))


def _rows(layout_q: SeqLayout, layout_kv: SeqLayout, semantics: Semantics) -> Rows:
    sequence_T, position_T = layout_q.seq_ids, layout_q.positions
    starts = layout_kv.cu_seqlens.to(torch.int64)
    lengths_q, lengths_k = (F.pad(x.cu_seqlens.to(torch.int64).diff(), (0, 1)) for x in (layout_q, layout_kv))  # slack rows: sequence Q
    start_T, length_T = starts[sequence_T], lengths_k[sequence_T]
    aligned_T = position_T + (lengths_k - lengths_q)[sequence_T]
    low, high = semantics.visible_range(0)
    middle_T = position_T if semantics.causal == "top_left" else aligned_T
    first_T = torch.zeros_like(length_T) if low is None else (middle_T + low).clamp(min=0)
    end_T = length_T if high is None else torch.minimum(middle_T + high + 1, length_T).clamp(min=0)
    first_T = torch.minimum(first_T, end_T)
    columns = start_T + first_T, start_T + end_T, start_T + aligned_T, position_T, layout_kv.positions
    return Rows(*(x.to(torch.int32) for x in columns))


def _touched(rows: Rows, num_keys: int) -> Tensor:
    """``(T/128, Tk/128)`` bool: blocks with a visible pair. Each row enters its first block and leaves behind its last one."""
    num_blocks = -(-num_keys // BLOCK)
    block_T = torch.arange(rows.first_T.shape[0], device=rows.first_T.device) // BLOCK
    sees_T = (rows.first_T < rows.end_T).to(torch.int32)
    steps = sees_T.new_zeros(-(-rows.first_T.shape[0] // BLOCK), num_blocks + 1)
    steps.index_put_((block_T, (rows.first_T // BLOCK).long()), sees_T, accumulate=True)
    steps.index_put_((block_T, ((rows.end_T - 1) // BLOCK + 1).long()), -sees_T, accumulate=True)
    return steps.cumsum(1, dtype=torch.int32)[:, :num_blocks] > 0


def _full(rows: Rows, num_keys: int) -> Tensor:
    """``(T/128, Tk/128)`` bool: blocks in which every query sees every key. The last block of keys is none unless it has 128."""
    missing = -rows.first_T.shape[0] % BLOCK
    last_start = F.pad(rows.first_T, (0, missing)).view(-1, BLOCK).amax(1)
    least_end = F.pad(rows.end_T, (0, missing), value=torch.iinfo(torch.int32).max).view(-1, BLOCK).amin(1)
    starts = torch.arange(0, num_keys, BLOCK, device=rows.first_T.device)
    return (last_start[:, None] <= starts) & (least_end[:, None] >= starts + BLOCK)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """``(1, 1, rows)`` how many are True in each row, and ``(1, 1, rows, columns)`` their columns, first. The kernel takes both for
    contiguous, whatever their strides are."""
    numbers = blocks.to(torch.int32, memory_format=torch.contiguous_format)
    columns = numbers.argsort(dim=1, descending=True, stable=True)
    return numbers.sum(1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]
