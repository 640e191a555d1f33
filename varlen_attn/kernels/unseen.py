"""Leave out the sequences and the queries that have nothing to see, for kernels that get them wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout.build import exact
from ..layout.seq_layout import SeqLayout
from .base import nothing
from .kept import kept
from .values import Call, Result


def without_unseen(
    query: Tensor, key: Tensor, value: Tensor, call: Call, attend: Callable[..., Result], *, queries: bool = False
) -> Result:
    """``attend(query, key, value, call)`` without the sequences that have no queries or no keys; then 0, gradient 0 and -inf in the places
    of their queries.

    With ``queries`` without those too that see no key under a bottom-right causal mask, the first ``Lq - Lk`` of a sequence, so that no
    sequence has more queries than keys. Needs lengths on the host; reads nothing from the device.
    """
    rest = kept(*call.layouts, ("rest", queries), lambda: _rest(*call.layouts, queries))
    if rest is None:
        return attend(query, key, value, call)
    if rest.layout_q.num_seqs == 0:
        return nothing(query, key, value, call)
    key, value = (x if rest.rows_k is None else rest.rows_k.pack(x[None]) for x in (key, value))
    some = query if rest.rows_q is None else rest.rows_q.pack(query[None])
    out, lse = attend(some, key, value, call.on(rest.layout_q, rest.layout_kv))
    if rest.rows_q is None:
        return out, lse
    if lse is not None:
        lse = rest.rows_q.unpack(lse.transpose(0, 1).contiguous(), float("-inf"))[0].transpose(0, 1)
    return rest.rows_q.unpack(out)[0], lse


class _Rest(NamedTuple):
    """Layouts of what is left, and its packed rows, as tokens of one row of T columns; None for all."""

    layout_q: SeqLayout
    layout_kv: SeqLayout
    rows_q: SeqLayout | None
    rows_k: SeqLayout | None


def _rest(layout_q: SeqLayout, layout_kv: SeqLayout, queries: bool) -> _Rest | None:
    """None if nothing is left out."""
    assert layout_q.lengths is not None, "the backend refuses lengths that only the device knows"
    assert layout_kv.lengths is not None, "the backend refuses lengths that only the device knows"
    pairs = list(zip(layout_q.lengths, layout_kv.lengths, strict=True))
    rest = [(min(a, b) if queries else a, b) for a, b in pairs if a and b]
    if rest and rest == pairs:
        return None
    rest_q = rest_kv = SeqLayout.from_lengths([a for a, _ in rest], device=layout_q.device)
    if layout_kv is not layout_q:
        rest_kv = SeqLayout.from_lengths([b for _, b in rest], device=layout_kv.device)
    lengths_Q, keys_Q = (x.cu_seqlens.to(torch.int64).diff() for x in (layout_q, layout_kv))
    first_Q = lengths_Q - keys_Q if queries else torch.where(keys_Q > 0, 0, lengths_Q)
    rows_q = _rows(layout_q, rest_q, lambda: layout_q.positions >= first_Q[layout_q.seq_ids])
    return _Rest(rest_q, rest_kv, rows_q, _rows(layout_kv, rest_kv, lambda: lengths_Q[layout_kv.seq_ids] > 0))


def _rows(layout: SeqLayout, rest: SeqLayout, taken: Callable[[], Tensor]) -> SeqLayout | None:
    if rest.num_rows == layout.num_rows:  # what is left out had no rows
        return None
    taken_1T = taken()[None]
    return SeqLayout._of(exact(taken_1T, taken_1T.sum(1), (rest.num_rows,)), taken_1T.shape)
