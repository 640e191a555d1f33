"""Graphs that must not depend on data: `torch.export`, ONNX, `torch.jit.trace` and `make_fx` record padded attention with a mask.

While one of them records, and where `torch.vmap` maps the mask, calls on padded tensors get a `PaddedRows` in place of a packing layout.
Its rows are the padded ones, zeroed at padding, so that all that happens between packing and unpacking stays as it is written; attention
hides padding by a mask. The graph holds aten ops only, runs where this package is not installed, and serves every mask of its shape (of all
shapes that are declared dynamic).
Packing that is written out, ``layout.pack(x)`` and `varlen_attention`, is exported as it is, with a number of rows that is data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._state import state
from .._torch import constant_while_tracing, in_make_fx, is_transformed
from ..errors import BackendRefused
from ..kernels.base import Backend, repeat_kv
from ..kernels.dense import EAGER, FUSED, attend_dense, needs_eager
from ..kernels.problem import Semantics
from ..kernels.values import Extras
from ..layout.build import refuse_bad_values
from ..layout.padded import PaddedRows
from ..layout.seq_layout import SeqLayout, padding_of
from .dispatch import problem_of_fields
from .records import dense_call, write

REASON = "exported: static control flow"

Fields = tuple[tuple[str, Any], ...]


@constant_while_tracing  # because dynamo of torch 2.11 takes `is_exporting` for True in every compiled function
def static_graph() -> bool:
    """Whether what runs now is recorded as a graph that may not depend on data."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or in_make_fx()  # type: ignore[attr-defined]


# -------------------------------------------------------------------- the layout


def static_layout(x: Tensor, mask: Tensor | None) -> PaddedRows:
    """For ``x (B, S, ...)`` and its ``key_padding_mask``; without one nothing is padded."""
    if mask is None:
        return PaddedRows.of(x, None)
    padding, bad = padding_of(here(mask, x))
    if bad is not None:
        refuse_bad_values(bad)
    return PaddedRows.of(x, padding)


def here(mask: Tensor, x: Tensor) -> Tensor:
    """``mask`` where ``x`` is; a move that is none would stand in the graph, with a device that may not be there where it runs."""
    return mask if mask.device == x.device else mask.to(x.device)


def static_layouts(
    x: Tensor, layout: SeqLayout | None, y: Tensor, layout_kv: SeqLayout | None
) -> tuple[SeqLayout | None, SeqLayout | None]:
    """What callers built for padded ``x`` and ``y``, as `PaddedRows` where a graph must be static. Several documents a row stay packed;
    so do layouts with a capacity in `make_fx`, whose graphs run here and may hold our ops."""
    given = [a for a in (layout, layout_kv) if a is not None]
    keep = in_make_fx() and not torch.compiler.is_exporting()
    if not static_graph() or any(a.row_ids is not None or isinstance(a, PaddedRows) or (a.has_slack and keep) for a in given):
        return layout, layout_kv
    own = None if layout is None else PaddedRows.of(x, None if layout.is_dense else layout.padding_mask())
    if layout_kv is None or layout_kv is layout:
        return own, None if layout_kv is None else own
    return own, PaddedRows.of(y, None if layout_kv.is_dense else layout_kv.padding_mask())


# -------------------------------------------------------------------- attention


def static_kernel(semantics: Semantics) -> str:
    """What `static_attention` calls."""
    return EAGER if needs_eager(semantics) or semantics.alibi or semantics.return_lse or is_transformed() else FUSED


def static_attention(
    query: Tensor, key: Tensor, value: Tensor, layout_q: SeqLayout, layout_kv: SeqLayout, semantics: Semantics, extras: Extras
) -> tuple[Tensor, Tensor | None]:
    """``query (B*Sq,N,H)``, ``key (B*Sk,K,H)``, ``value (B*Sk,K,Hv)`` -> ``(B*Sq,N,Hv)``, 0 at padding, and lse ``(N, B*Sq)`` or None.

    Distances count tokens, as the packed way does, whatever the side of the padding and with holes too.
    """
    key, value = repeat_kv(int(query.shape[1]), key, value)  # of rows: of (B, K, S, H), torch.export in 2.11 guards on its strides
    q = layout_q.unpack(query).transpose(1, 2)
    k, v = (layout_kv.unpack(x).transpose(1, 2) for x in (key, value))
    visible = None if layout_kv.is_dense else ~layout_kv.padding_mask()[:, None, None, :]
    positions: tuple[Tensor, Tensor] | None = None
    offset: int | Tensor = 0
    if semantics.causal or semantics.window or semantics.alibi or semantics.score_bias:
        rows, columns = positions = layout_q.counts()[:, None, :, None], layout_kv.counts()[:, None, None, :]
        if layout_q is not layout_kv:
            offset = columns[..., -1:] - rows[:, :, -1:]
    out, lse, _ = attend_dense(
        q, k, v, semantics, extras, visible=visible, offset=offset, positions=positions, kernel=static_kernel(semantics)
    )
    packed_lse = layout_q.pack(lse.transpose(1, 2)).transpose(0, 1) if lse is not None else None
    return layout_q.pack(out.transpose(1, 2)), packed_lse


# -------------------------------------------------------------------- what is recorded


def refuse_order(order: str | Backend, why: str, fix: str) -> None:
    """A request is kept: only the padded backend may compute a call on padded tensors."""
    name = order if isinstance(order, str) else order.name
    if name not in ("auto", "sdpa_padded"):
        raise BackendRefused(f"backend {name!r} was requested but cannot run this call: {why}. Fix: {fix}.")


@constant_while_tracing
def note_static(problem: Fields, semantics: Fields, slots: int | None, module: torch.nn.Module | None, reason: str = REASON) -> None:
    """Write the call into the open records."""
    if not state.records:
        return
    stated = problem_of_fields(problem, semantics)
    write(dense_call(stated, static_kernel(stated.semantics), reason, slots, traced=True), module)
