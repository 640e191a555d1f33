"""Leave out the queries that see no key, for kernels that get them wrong under a bottom-right causal mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...layout.seq_layout import SeqLayout
from ..kept import kept
from ..values import Call, Result


def drop_fully_masked_queries(query: Tensor, call: Call, attend: Callable[[Tensor, Call], Result]) -> Result:
    """``attend(query, call)`` on the rest; then 0, gradient 0 and -inf in the places of those left out.

    Under a bottom-right causal mask they are the first ``Lq - Lk`` of a sequence, so that afterwards no sequence has more queries than
    keys. Sequences with neither queries nor keys are left out too. Needs lengths on the host; reads nothing from the device.
    """
    rest = kept(*call.layouts, "see a key", lambda: _rest(*call.layouts))
    if rest is None:
        return attend(query, call)
    rest_q, rest_kv, rows = rest
    if rows is None:
        return attend(query, call.on(rest_q, rest_kv))
    some, some_lse = attend(query.index_select(0, rows), call.on(rest_q, rest_kv))
    out = some.new_zeros((query.shape[0], *some.shape[1:])).index_copy(0, rows, some)
    if some_lse is None:
        return out, None
    return out, some_lse.new_full((query.shape[1], query.shape[0]), float("-inf")).index_copy(1, rows, some_lse)


def _rest(layout_q: SeqLayout, layout_kv: SeqLayout) -> tuple[SeqLayout, SeqLayout, Tensor | None] | None:
    """Layouts of the queries that see a key and of their keys, and the packed rows of these queries, None for all; None if nothing is
    left out."""
    assert layout_q.lengths is not None, "the backend refuses lengths that only the device knows"
    assert layout_kv.lengths is not None, "the backend refuses lengths that only the device knows"
    pairs = list(zip(layout_q.lengths, layout_kv.lengths, strict=True))
    rest = [(min(a, b), b) for a, b in pairs if b]
    if rest == pairs:
        return None
    rest_q = SeqLayout.from_lengths([a for a, _ in rest], device=layout_q.device)
    rest_kv = rest_q if layout_kv is layout_q else SeqLayout.from_lengths([b for _, b in rest], device=layout_kv.device)
    if rest_q.num_rows == layout_q.num_rows:
        return rest_q, rest_kv, None
    blind_Q = layout_q.cu_seqlens.to(torch.int64).diff() - layout_kv.cu_seqlens.to(torch.int64).diff()
    sees_T = layout_q.positions >= blind_Q[layout_q.seq_ids]
    rows = torch.nonzero_static(sees_T, size=rest_q.num_rows).squeeze(1)  # its size is known: nothing is read back
    return rest_q, rest_kv, rows
