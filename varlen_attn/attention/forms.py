"""The forms in which a tensor is given, padded either way round, unbatched, packed or nested: to packed rows, and back."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .._torch import is_tracing
from ..layout.seq_layout import SeqLayout, layout_of_all
from .export import static_graph, static_layout

Form = Literal["packed", "nested", "unbatched", "batch first", "sequence first"]


# What padding holds at the end: the nearest token of its row, 0, or what torch computes there.
PaddingRows = Literal["edge", "zero", "exact"]
ROWS = ("packed", "nested")  # forms without padding


def form_of(attn: nn.Module, x: Tensor, layout: SeqLayout | None) -> Form:
    """How ``x`` is given to ``attn``, which says where the batch is."""
    if x.is_nested:
        return "nested"
    if x.dim() == 2:
        return "unbatched" if layout is None else "packed"
    return "batch first" if attn.batch_first else "sequence first"


def batch_first(form: Form, x: Tensor) -> Tensor:
    """``(B, S, ...)``; rows stay rows."""
    return x[None] if form == "unbatched" else x.transpose(0, 1) if form == "sequence first" else x


def given_form(form: Form, x: Tensor) -> Tensor:
    """The reverse of `batch_first`. Contiguous as torch's, because models call `view` on it."""
    return x[0] if form == "unbatched" else x.transpose(0, 1).contiguous() if form == "sequence first" else x


def pack_rows(layout: SeqLayout, x: Tensor, name: str = "x", form: Form = "batch first", apart: bool = False) -> Tensor:
    """Packed rows ``(T, ...)`` of ``(B, S, ...)``, without a copy where nothing is padded, or of rows.

    ``apart``: with a copy there too, if a backward may need the rows and the caller write to ``x`` before, as in ``h += encoder(h)``:
    whether that works does not depend on the batch.
    """
    if form in ROWS:
        return _without_slack(layout, x) if layout.has_slack else x
    layout._check(x, (layout.batch_size, layout.padded_len), name)
    if not layout.is_dense:
        return layout.pack(x)
    rows = x.reshape(layout.num_rows, *x.shape[2:])
    return rows.clone() if apart and torch.is_grad_enabled() and x.is_contiguous() and not is_tracing(x) else rows


def unpack_rows(
    layout: SeqLayout, rows: Tensor, form: Form = "batch first", given: Tensor | None = None, padding_rows: PaddingRows = "zero"
) -> Tensor:
    """``rows`` in the form in which the input, ``given``, came; without a copy where nothing is padded."""
    if form == "packed":
        return _without_slack(layout, rows) if layout.has_slack else rows
    if form == "nested":
        assert given is not None
        if given.layout == torch.jagged:  # with the input's offsets, so that the two can be added
            return torch.nested.nested_tensor_from_jagged(rows, offsets=given.offsets())  # type: ignore[attr-defined]
        return torch.nested.as_nested_tensor(list(layout.split(rows)), layout=torch.strided)
    if layout.is_dense:
        padded = rows.reshape(layout.batch_size, layout.padded_len, *rows.shape[1:])
    else:
        padded = layout.unpack(rows, "edge" if padding_rows == "edge" else 0)
    return padded if form == "batch first" else given_form(form, padded)


def _without_slack(layout: SeqLayout, rows: Tensor) -> Tensor:
    """Packed rows that hold nothing are 0, also where the caller's hold NaN, which gradients of weights would see."""
    return rows.masked_fill(~layout.valid_rows().view(-1, *[1] * (rows.dim() - 1)), 0)


def nested_rows(x: Tensor) -> tuple[Tensor, SeqLayout]:
    """The packed rows of a nested tensor, and their layout."""
    if x.layout == torch.jagged:
        x = x.contiguous()
        return x.values(), SeqLayout.from_nested(x)
    refuse_no_sequence(x)
    parts = x.unbind()
    rows = torch.cat(parts)
    return rows, SeqLayout.from_lengths([len(p) for p in parts], device=rows.device)


def refuse_no_sequence(x: Tensor) -> None:
    """Of a strided nested tensor, which then has no width: in torch's class and words."""
    if x.is_nested and x.layout == torch.strided and x.size(0) == 0:
        raise AssertionError(
            "MultiheadAttention does not support NestedTensor outside of its fast path. Here it has no sequence, so the width of its rows "
            "is not known: leave the call out, or pass a padded torch.zeros(0, 0, D)."
        )


def full_layout(x: Tensor) -> SeqLayout:
    """Of ``x (B, S, ...)`` without padding."""
    if static_graph():
        return static_layout(x, None)
    every = layout_of_all(x.shape[0], x.shape[1], x.device)  # from sizes alone: no list of lengths travels to a device
    return every if is_tracing(x) else every._with(lengths=(x.shape[1],) * x.shape[0])
