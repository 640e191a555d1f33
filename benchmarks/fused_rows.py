"""Packing and unpacking by one Triton kernel, up to three tensors (q, k, v) in one launch. No part of the package: a contestant of
`bench_layout` on a GPU, until it is measured there.

Triton 3.6 compiles it for compute capability 8.0 and 9.0, to loads and stores of 16 bytes where rows and strides are multiples of 128
bytes; it has never run on a GPU. Triton's interpreter (``TRITON_INTERPRET=1``) runs it on a CPU, which is how it is tested. Results are the
same bits as those of `SeqLayout.pack` and `SeqLayout.unpack`.

Sources may be views with any distance between rows, such as q, k and v of a fused projection: they are read in place. Rows are copied
as integers of the widest size that fits all of them, 8 bytes at most, so a copy changes no bit, and one kernel serves all dtypes.

To pack or unpack three tensors of N real rows and B*S slots, in sizes of a row of one of them; arithmetic, not measured:

==========================  ==============  ========  =================  =====================
path                        pack: bytes     launches  unpack: bytes      launches
==========================  ==============  ========  =================  =====================
formulas, eager             6N              3         12N + 3BS          9
`_gather`, eager            6N              3         6N + 3BS           6
this kernel                 6N              1         3N + 3BS           1
==========================  ==============  ========  =================  =====================

No way to unpack moves fewer bytes than reading N rows and writing B*S. With slack rows the others launch 4 more kernels for each tensor
to find and clear them when they pack; this one reads their number in passing, and it does not read the rows that it clears.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varlen_attn import SeqLayout

__all__ = ["Rows", "move", "rows_of", "why_not"]

_MOST = 3  # tensors of one launch
_BLOCK = 1024  # words of a program: with 128 threads and words of 8 bytes, 4 loads of 16 bytes each
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Rows:
    """From where each row of a result comes.

    Attributes:
        index: ``(rows,)`` int64: the row of the source, plus ``base``; below ``base`` there is none.
        base: 0 for `SeqLayout.token_indices`, 1 for `SeqLayout.gather_indices`.
        count: ``(1,)``: from this row on there is none either; None if ``index`` says it all.
    """

    index: Tensor
    base: int
    count: Tensor | None


def rows_of(layout: SeqLayout) -> tuple[Rows, Rows]:
    """Packed and padded rows, by where they find theirs in the others."""
    return Rows(layout.token_indices, 0, layout.cu_seqlens[-1:] if layout.has_slack else None), Rows(layout.gather_indices, 1, None)


def why_not() -> str | None:
    """A sentence without its subject if the kernel does not run on this machine, else None."""
    if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        return "needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1)"
    try:
        from . import fused_rows_kernel  # noqa: F401
    except ImportError as error:
        return f"needs triton, which does not import ({error})"
    return None


def move(forth: Rows, back: Rows, xs: Sequence[Tensor], pad_value: float = 0) -> tuple[Tensor, ...]:
    """``(sources, ...) -> (rows, ...)`` of each tensor by ``forth``; ``back`` is the way of the gradients."""
    moved: tuple[Tensor, ...] = _Move.apply(forth, back, pad_value, *xs)
    return moved


class _Move(torch.autograd.Function):
    """Pack or unpack, whichever ``forth`` is; the other one is its backward."""

    @staticmethod
    def forward(ctx: Any, forth: Rows, back: Rows, pad_value: float, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(forth.index, forth.count, back.index, back.count)
        ctx.bases = forth.base, back.base
        ctx.set_materialize_grads(False)
        copied = _launch(forth, xs, pad_value)
        # One of them with a gradient would give all of them one.
        ctx.mark_non_differentiable(*(y for y, needed in zip(copied, ctx.needs_input_grad[3:], strict=True) if not needed))
        return copied

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        forth_index, forth_count, back_index, back_count = ctx.saved_tensors
        forth, back = Rows(forth_index, ctx.bases[0], forth_count), Rows(back_index, ctx.bases[1], back_count)
        there = {i: grad for i, grad in enumerate(grads) if grad is not None}
        moved = dict(zip(there, move(back, forth, tuple(there.values())), strict=True)) if there else {}
        return None, None, None, *(moved.get(i) for i in range(len(grads)))


def _launch(rows: Rows, xs: Sequence[Tensor], pad_value: float) -> tuple[Tensor, ...]:
    from .fused_rows_kernel import copy_rows

    flats = [_flat(x) for x in xs]
    size = math.gcd(8, *(n for flat in flats for n in _bytes(flat)))
    pads = [_bits(pad_value, x.dtype, size) for x in xs]
    total = rows.index.shape[0]
    outs = tuple(x.new_empty((total, *x.shape[1:])) for x in xs)
    widest = max(flat.shape[1] * flat.element_size() for flat in flats) // size
    if total == 0 or widest == 0:
        return outs
    arguments: list[Any] = []
    for flat, out, pad in zip(flats, outs, pads, strict=True):
        source, target = (x.view(_WORDS[size]) for x in (flat, out.view(total, flat.shape[1])))
        arguments += [source, target, source.stride(0), source.shape[1], pad]
    arguments += arguments[:5] * (_MOST - len(xs))  # a kernel has all its arguments; the grid ends before these
    block_words = min(256, 1 << (widest - 1).bit_length())
    block_rows = _BLOCK // block_words
    grid = (-(-total // block_rows), -(-widest // block_words), len(xs))
    with torch.cuda.device(xs[0].device) if xs[0].is_cuda else nullcontext():
        copy_rows[grid](
            rows.index, rows.base, rows.index if rows.count is None else rows.count, total, *arguments,
            HAS_COUNT=rows.count is not None, BLOCK_ROWS=block_rows, BLOCK_WORDS=block_words,
        )  # fmt: skip
    return outs


def _flat(x: Tensor) -> Tensor:
    """``(T, ...) -> (T, width)`` with the numbers of a row side by side: a view if they are."""
    x = x.resolve_conj().resolve_neg()
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    if flat.shape[1] == 1:
        return flat.squeeze(1).unsqueeze(1)  # a stride of 1, whatever it was
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _bytes(flat: Tensor) -> tuple[int, ...]:
    """What a word must divide."""
    size = flat.element_size()
    return flat.shape[1] * size, flat.stride(0) * size, int(flat.storage_offset()) * size, flat.data_ptr()


def _bits(pad_value: float, dtype: torch.dtype, size: int) -> int:
    """A word of padding as an integer."""
    if pad_value == 0 and math.copysign(1, pad_value) == 1:
        return 0
    padding = torch.full((16,), pad_value, dtype=dtype, device="cpu").view(_WORDS[size])
    if not bool((padding == padding[0]).all()):
        raise ValueError(f"`pad_value` must repeat in every {size} bytes, but {pad_value} does not in {dtype}.")
    return int(padding[0])
