"""Attention of rows that are split over ranks: by heads, after one exchange of rows for heads, or by rows, to the keys of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, LayoutError
from ..kernels.problem import Semantics
from ..kernels.values import Call, Extras, Result
from ..layout.seq_layout import SeqLayout
from .rows import RankRows, Ranks

Attend = Callable[[Tensor, Tensor, Tensor, Call, str], Result]


def way_of(ranks: Ranks, num_heads: int) -> tuple[bool, str]:
    """Whether ranks have heads of all rows, and why."""
    if num_heads < ranks.size:
        return False, f"rows of {ranks.size} ranks, by an all-gather of keys and values: there are too few heads ({num_heads}) to share"
    return True, f"rows of {ranks.size} ranks, by all-to-all: each has {ranks.shares(num_heads)[ranks.rank]} of {num_heads} heads there"


def heads_of(ranks: Ranks, num_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """How many heads of queries and of keys this rank computes."""
    if not way_of(ranks, num_heads)[0]:
        return num_heads, num_kv_heads
    mine, size = ranks.slices(num_heads)[ranks.rank], num_heads // num_kv_heads
    return mine.stop - mine.start, _key_heads(torch.empty(0, num_kv_heads, device="meta"), mine, size).shape[1]


def attend_split(query: Tensor, key: Tensor, value: Tensor, call: Call, attend: Attend) -> Result:
    """``attend(query, key, value, call, reason)`` on other rows or heads, so that it is the attention of all rows.

    Raises:
        ArgumentError: dropout; one layout is split and the other is not.
        LayoutError: few heads, where only the device knows the lengths.
    """
    layout_q, layout_kv = call.layouts
    if not isinstance(layout_q, RankRows) or not isinstance(layout_kv, RankRows):
        raise ArgumentError("queries and keys must both be split over ranks, but one of them is whole, or has fewer rows than ranks.")
    if call.semantics.dropout_p > 0:
        raise ArgumentError(
            f"`dropout_p` must be 0 where rows are split over ranks, but is {call.semantics.dropout_p}: each would draw numbers of its own."
        )
    by_heads, reason = way_of(layout_q.ranks, query.shape[1])
    return (_by_heads if by_heads else _by_rows)(query, key, value, layout_q, layout_kv, call, lambda *given: attend(*given, reason))


# -------------------------------------------------------------------- by heads


def _by_heads(query: Tensor, key: Tensor, value: Tensor, layout_q: RankRows, layout_kv: RankRows, call: Call, attend: Any) -> Result:
    """One all-to-all before, and one after. Heads need not divide by the ranks: some have one more."""
    ranks: Ranks = layout_q.ranks
    heads, size = ranks.slices(query.shape[1]), query.shape[1] // key.shape[1]
    queries = [query[:, h] for h in heads]
    keys, values = ([_key_heads(x, h, size) for h in heads] for x in (key, value))
    if layout_kv is layout_q:
        q, k, v = _to_heads(layout_q, queries, keys, values)
    else:
        (q,), (k, v) = _to_heads(layout_q, queries), _to_heads(layout_kv, keys, values)
    mine = heads[ranks.rank]
    alibi_slopes, sinks, bias = (x[mine] if isinstance(x, Tensor) else x for x in vars(call.extras).values())
    if callable(bias) and not isinstance(bias, Tensor):
        bias = _shifted(bias, mine.start, 0)
    whole = call.on(layout_q.whole, layout_kv.whole)
    out, lse = attend(q, k, v, whole._replace(extras=Extras(alibi_slopes, sinks, bias)))
    out = _to_rows(layout_q, out, heads)
    return out, None if lse is None else _to_rows(layout_q, lse.T[..., None], heads)[..., 0].T


def _key_heads(x: Tensor, heads: slice, size: int) -> Tensor:
    """Those of keys that some heads of queries see, ``size`` of which share one. Repeated where they share unequally."""
    first, last = heads.start // size, (heads.stop - 1) // size
    if first == last or heads.start % size == heads.stop % size == 0:
        return x[:, first : last + 1]
    return x.repeat_interleave(size, 1)[:, heads]


def _to_heads(layout: RankRows, *given: list[Tensor]) -> list[Tensor]:
    """From tensors of the rows of this rank with the heads for each rank: those of this rank, with all rows."""
    parts = [torch.cat([x.flatten(1) for x in parts], 1) for parts in zip(*given, strict=True)]
    mine = [parts[layout.ranks.rank] for parts in given]
    widths = [x.shape[1] * x.shape[2] for x in mine]
    total = layout.whole.num_rows
    rows = layout.ranks.exchange(parts, [n * sum(widths) for n in layout.ranks.shares(total)]).view(total, sum(widths))
    return [y.unflatten(1, x.shape[1:]) for x, y in zip(mine, rows.split(widths, 1), strict=True)]


def _to_rows(layout: RankRows, x: Tensor, heads: list[slice]) -> Tensor:
    """The reverse, of the result."""
    shapes = [(layout.num_rows, h.stop - h.start, x.shape[2]) for h in heads]
    sizes = [rows * some * width for rows, some, width in shapes]
    numbers = layout.ranks.exchange(x.split(layout.ranks.shares(layout.whole.num_rows)), sizes).split(sizes)
    return torch.cat([y.view(shape) for y, shape in zip(numbers, shapes, strict=True)], 1)


def _shifted(bias: Any, head: int, position: int) -> Any:
    """A callable bias for heads and queries that are counted from others."""
    return lambda h, q, k: bias(h + head, q + position, k)


# -------------------------------------------------------------------- by rows


def _by_rows(query: Tensor, key: Tensor, value: Tensor, layout_q: RankRows, layout_kv: RankRows, call: Call, attend: Any) -> Result:
    """Keys and values of all rows on every rank, which attends with its own queries."""
    if layout_q.lengths is None or layout_kv.lengths is None:
        raise LayoutError(
            f"`layout` must have its lengths on the host where {query.shape[1]} heads are shared by {layout_q.ranks.size} ranks, but only the "
            "device knows them: build it from lengths."
        )
    widths = [key.shape[1] * key.shape[2], value.shape[1] * value.shape[2]]
    rows = layout_kv.gathered(torch.cat([key.flatten(1), value.flatten(1)], 1)).split(widths, 1)
    key, value = (y.unflatten(1, x.shape[1:]) for x, y in zip((key, value), rows, strict=True))
    results = [attend(query[q], key[k], value[k], part) for q, k, part in _pieces(call, layout_q.mine)]
    lses = [lse for _, lse in results if lse is not None]
    return torch.cat([out for out, _ in results]), torch.cat(lses, 1) if lses else None


def _pieces(call: Call, mine: slice) -> Iterator[tuple[slice, slice, Call]]:
    """Which of the queries of this rank see which of all keys: all sequences that are whole here at once, and each that is cut alone. There
    is always one, because the gradient of keys is a collective."""
    lengths = list(zip(call.layout_q.lengths or (), call.layout_kv.lengths or (), strict=True))
    starts = list(accumulate(lengths, lambda at, one: (at[0] + one[0], at[1] + one[1]), initial=(0, 0)))
    begins = [at for at, _ in starts]
    whole = [i for i, (n, _) in enumerate(lengths) if mine.start <= begins[i] and begins[i] + n <= mine.stop]
    cut = [i for i, (n, _) in enumerate(lengths) if i not in {*whole} and max(begins[i], mine.start) < min(begins[i] + n, mine.stop)]
    if any(begins[i] < mine.start for i in cut):
        yield _of_cut(call, mine, lengths[cut[0]], starts[cut[0]])
        cut = cut[1:]
    if whole or not (cut or mine.start < mine.stop):
        (q, k), (q_end, k_end) = (starts[whole[0]], starts[whole[-1] + 1]) if whole else ((mine.start, 0), (mine.start, 0))
        layouts = [SeqLayout.from_lengths([lengths[i][side] for i in whole], device=call.layout_q.device) for side in (0, 1)]
        same = call.layout_q is call.layout_kv
        yield slice(q - mine.start, q_end - mine.start), slice(k, k_end), call.on(layouts[0], layouts[0] if same else layouts[1])
    for i in cut:
        yield _of_cut(call, mine, lengths[i], starts[i])


def _of_cut(call: Call, mine: slice, lengths: tuple[int, int], starts: tuple[int, int]) -> tuple[slice, slice, Call]:
    """Some queries of a sequence. Their last one is aligned with the last key: keys that none sees are left out, and a window moves."""
    (len_q, len_k), (at_q, at_k), semantics = lengths, starts, call.semantics
    first, last = max(mine.start - at_q, 0), min(mine.stop - at_q, len_q)
    left, right = semantics.window or (None, None)
    if semantics.causal:
        right = 0
    aligned = last if semantics.causal == "top_left" else last + len_k - len_q
    seen = len_k if right is None else max(0, min(len_k, aligned + right))
    left = None if left is None else left + seen - aligned
    right = None if right is None else max(0, right - seen + aligned)
    if left is not None and left < 0:
        if seen:
            raise ArgumentError("`window` with causal='top_left' and more queries than keys cannot be split over more ranks than heads.")
        left = 0
    causal: Any = "bottom_right" if semantics.causal and right == 0 else False
    right = None if causal else right
    slopes, sinks, bias = vars(call.extras).values()
    if isinstance(bias, Tensor):
        bias = bias[:, first:]
    elif bias is not None:
        bias = _shifted(bias, 0, first)
    if slopes is not None and seen - last != len_k - len_q:
        bias, slopes = _with_slopes(bias, slopes, first + len_k - len_q), None
    changed: Semantics = replace(
        semantics, causal=causal, window=None if left is right is None else (left, right), alibi=slopes is not None, score_bias=bias is not None
    )
    layouts = [SeqLayout.from_lengths([n], device=call.layout_q.device) for n in (last - first, seen)]
    q = slice(at_q + first - mine.start, at_q + last - mine.start)
    return q, slice(at_k, at_k + seen), Call(layouts[0], layouts[1], changed, Extras(slopes, sinks, bias))


def _with_slopes(bias: Any, slopes: Tensor, shift: int) -> Any:
    """ALiBi as a bias, for queries whose distance to keys is not that of the aligned ends."""

    def added(h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = -slopes[h] * (q + shift - k).abs()
        return distance if bias is None else distance + (bias[h, q, k] if isinstance(bias, Tensor) else bias(h, q, k))

    return added
