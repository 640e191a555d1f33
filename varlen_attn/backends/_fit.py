"""What flash kernels want of the arguments that they get: aligned rows, bounds of lengths, and windows that survive their normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import SeqLayout
from ..problem import Semantics

_BYTES = 16  # of one load


def aligned(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy where the kernels' loads could not read it.

    Flash kernels load 16 bytes at once and check ``stride(-1) == 1`` only: at another address a load raises "misaligned address", after
    which every CUDA call of the process fails. They were also wrong on heads with a stride of 0.

    Raises:
        RuntimeError: while `torch.compile` traces, where the offset is not a multiple of 16 bytes. It can not be read there, so that
            nothing can be decided by it; a view of a wider number checks it.
    """
    unit = _BYTES // x.element_size()
    *strides, last = x.stride()
    if last != 1 or not all(stride and stride % unit == 0 for stride in strides):
        return x.clone(memory_format=torch.contiguous_format)
    if torch.compiler.is_compiling():
        if not x.is_contiguous():
            x.detach().view(torch.complex128)
        return x
    return x if _address(x) % _BYTES == 0 else x.clone(memory_format=torch.contiguous_format)


def _address(x: Tensor) -> int:
    """Where ``x`` begins in memory, which another library may have allocated; within its storage where it has none (fake tensors)."""
    try:
        return x.data_ptr()
    except RuntimeError:
        return int(x.storage_offset()) * x.element_size()


def flash2_bounds(layout_q: SeqLayout, layout_kv: SeqLayout, semantics: Semantics) -> tuple[int, int]:
    """``max_seqlen_q, max_seqlen_k`` for the kernels of flash-attn 2, which torch carries too.

    - One query with grouped heads takes a decoding shortcut that wants one query in every sequence: so at least 2 is passed.
    - A right side of a window of at least ``max_seqlen_k`` is taken for unlimited, and an unlimited one beside a limited left one for
      ``max_seqlen_k`` (``flash_api.cpp``, ``set_params_fprop``; flash-attention#895). Both are wrong where a sequence has more queries
      than keys, because the window begins ``Lk - Lq`` before the query's own number. With the longest query added to ``max_seqlen_k``
      neither hides or shows a key. The forward uses the number for nothing else; the backward launches more blocks, which return at once.
    """
    max_q, max_k = max(2, layout_q.max_seqlen), max(1, layout_kv.max_seqlen)
    if semantics.window is not None and not semantics.causal and layout_kv is not layout_q:
        max_k += max_q
    return max_q, max_k


def flash_window(semantics: Semantics) -> tuple[int, int]:
    """``(left, right)`` around the bottom-right diagonal, -1 for unlimited; causal alone is ``(-1, 0)``."""
    left, right = semantics.window or (None, None)
    return -1 if left is None else left, 0 if semantics.causal else -1 if right is None else right
