"""Attention of rows that are split over ranks: by heads, with an all-to-all before and after, or by rows, to the keys of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError, LayoutError
from ..kernels.values import Call, Extras, Result
from ..layout.seq_layout import SeqLayout
from .rows import RankRows, Ranks

Attend = Callable[[Tensor, Tensor, Tensor, Call], Result]


def way_of(ranks: Ranks, num_heads: int) -> tuple[bool, str]:
    """Whether each rank gets some heads of all rows, and why."""
    by_heads, of = num_heads >= ranks.size, f"rows are split over {ranks.size} ranks"
    if by_heads:
        return True, f"{of}: by all-to-all each has {ranks.shares(num_heads)[ranks.rank]} of {num_heads} heads"
    return False, f"{of}: an all-gather of keys and values, because there are too few heads ({num_heads})"


def attend_split(query: Tensor, key: Tensor, value: Tensor, call: Call, attend: Callable[[str], Attend]) -> Result:
    """The attention of all rows, by ``attend(reason)`` on some heads or rows of them.

    Raises:
        ArgumentError: dropout, or only one layout is split.
        LayoutError: few heads, where only the device knows the lengths.
    """
    layout_q, layout_kv = call.layouts
    if not isinstance(layout_q, RankRows) or not isinstance(layout_kv, RankRows):
        raise ArgumentError("queries and keys must both be split over ranks, but one of them is not, or has fewer rows than ranks.")
    if call.semantics.dropout_p > 0:
        raise ArgumentError(f"`dropout_p` must be 0 where rows are split over ranks, but is {call.semantics.dropout_p}.")
    by_heads, reason = way_of(layout_q.ranks, query.shape[1])
    return (_by_heads if by_heads else _by_rows)(query, key, value, layout_q, layout_kv, call, attend(reason))


# -------------------------------------------------------------------- by heads


def _by_heads(query: Tensor, key: Tensor, value: Tensor, layout_q: RankRows, layout_kv: RankRows, call: Call, attend: Attend) -> Result:
    """Heads need not divide by the ranks: some have one more."""
    ranks, size = layout_q.ranks, query.shape[1] // key.shape[1]
    heads = ranks.slices(query.shape[1])
    queries, *keys = [query[:, h] for h in heads], *([_key_heads(x, h, size) for h in heads] for x in (key, value))
    if layout_kv is layout_q:
        q, k, v = _to_heads(layout_q, queries, *keys)
    else:
        (q,), (k, v) = _to_heads(layout_q, queries), _to_heads(layout_kv, *keys)
    mine = heads[ranks.rank]
    slopes, sinks, bias = (x[mine] if isinstance(x, Tensor) else x for x in vars(call.extras).values())
    extras = Extras(slopes, sinks, bias if bias is None or isinstance(bias, Tensor) else lambda h, q, k: bias(h + mine.start, q, k))
    out, lse = attend(q, k, v, call.on(layout_q.whole, layout_kv.whole)._replace(extras=extras))
    return _to_rows(layout_q, out, heads), None if lse is None else _to_rows(layout_q, lse.T[..., None], heads)[..., 0].T


def _key_heads(x: Tensor, heads: slice, size: int) -> Tensor:
    """What some heads of queries see, ``size`` of which share one. Repeated where they share unequally."""
    first, last = heads.start // size, (heads.stop - 1) // size
    if first == last or heads.start % size == heads.stop % size == 0:
        return x[:, first : last + 1]
    return x.repeat_interleave(size, 1)[:, heads]


def _to_heads(layout: RankRows, *given: list[Tensor]) -> list[Tensor]:
    """From tensors of the rows of this rank with the heads for each rank: those of this rank, with all rows."""
    mine, total = [x[layout.ranks.rank] for x in given], layout.whole.num_rows
    widths = [x.shape[1] * x.shape[2] for x in mine]
    parts = [torch.cat([x.flatten(1) for x in parts], 1) for parts in zip(*given, strict=True)]
    rows = layout.ranks.exchange(parts, [n * sum(widths) for n in layout.ranks.shares(total)]).view(total, sum(widths))
    return [y.unflatten(1, x.shape[1:]) for x, y in zip(mine, rows.split(widths, 1), strict=True)]


def _to_rows(layout: RankRows, x: Tensor, heads: list[slice]) -> Tensor:
    """The reverse, of the result."""
    shapes = [(layout.num_rows, h.stop - h.start, x.shape[2]) for h in heads]
    sizes = [rows * some * width for rows, some, width in shapes]
    numbers = layout.ranks.exchange(x.split(layout.ranks.shares(layout.whole.num_rows)), sizes).split(sizes)
    return torch.cat([y.view(shape) for y, shape in zip(numbers, shapes, strict=True)], 1)


# -------------------------------------------------------------------- by rows


def _by_rows(query: Tensor, key: Tensor, value: Tensor, layout_q: RankRows, layout_kv: RankRows, call: Call, attend: Attend) -> Result:
    """The sequences that this rank has queries of, in one call. The place of a query counts from the end of its sequence. So where places
    matter, and keys after the last query here cannot be left out, all queries of a sequence are computed, of other ranks as zeros."""
    len_q, len_k, mine, semantics = layout_q.lengths, layout_kv.lengths, layout_q.mine, call.semantics
    if len_q is None or len_k is None or torch.compiler.is_compiling():
        raise LayoutError("`layout` must have lengths on the host, and outside of graphs, where there are fewer heads than ranks.")
    parts = layout_kv.gathered(torch.cat([key.flatten(1), value.flatten(1)], 1)).tensor_split([key.shape[1] * key.shape[2]], 1)
    key, value = (rows.unflatten(1, x.shape[1:]) for x, rows in zip((key, value), parts, strict=True))
    at_q, at_k = ([*accumulate(n, initial=0)] for n in (len_q, len_k))
    here = [i for i in range(len(len_q)) if max(at_q[i], mine.start) < min(at_q[i + 1], mine.stop)]
    first, end = (here[0], here[-1] + 1) if here else (0, 0)
    cuts = semantics.causal == "bottom_right" or not (semantics.causal or semantics.window or semantics.alibi)
    some = mine if not here or (cuts and not semantics.score_bias) else slice(at_q[first], at_q[end])
    queries = [min(at_q[i + 1], some.stop) - max(at_q[i], some.start) for i in range(first, end)]
    keys = [*len_k[first:end]]
    if here and semantics.causal:
        keys[-1] = max(0, keys[-1] - at_q[end] + some.stop)
    seen: Any = slice(at_k[first], at_k[first] + sum(keys))
    layouts = (SeqLayout.from_lengths(n, device=layout_q.device) for n in (queries, keys))
    query = F.pad(query, (0, 0, 0, 0, before := mine.start - some.start, some.stop - mine.stop))
    out, lse = attend(query, key[seen], value[seen], call.on(*layouts))
    own = slice(before, before + layout_q.num_rows)
    return out[own], None if lse is None else lse[:, own]
