"""What flash kernels want of the arguments that they get: aligned rows, bounds of lengths, and windows that survive their normalisation."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..base import HALF, Capabilities, contiguous_grad, nothing, pad_head_dim
from ..limits import MAX_SEQUENCES
from ..problem import Semantics
from ..values import Call, Result

Run = Callable[..., Result]

# What flash kernels have in common; an adapter says where its own differs.
FLASH = Capabilities(
    devices=frozenset({"cuda"}), dtypes=HALF, min_capability=(8, 0), max_head_dim=256, max_sequences=MAX_SEQUENCES,
    causal_top_left=False, score_bias=False, slack_rows=False,
)  # fmt: skip

_BYTES = 16  # of one load


def aligned(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy where the kernels' loads could not read it.

    Flash kernels load 16 bytes at once and check ``stride(-1) == 1`` only: at another address a load raises "misaligned address", after
    which every CUDA call of the process fails. They were also wrong on heads with a stride of 0.

    Raises:
        RuntimeError: while `torch.compile` traces, where the offset is not a multiple of 16 bytes. It cannot be read there, so that
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


def fitted(*, align: bool) -> Callable[[Run], Run]:
    """`Backend.run` of a flash kernel, which gets at least one sequence, and heads of one width that is a multiple of 8, under the true
    scale. With ``align`` it gets `aligned` rows and a contiguous gradient too, which our own ops see to themselves."""

    def decorate(run: Run) -> Run:
        @wraps(run)
        def fit(self: Any, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
            value_dim = value.shape[-1]
            if call.layout_q.num_seqs == 0:  # kernels refuse an empty batch
                return nothing(query, key, value, call)
            query, key, value = pad_head_dim(8, query, key, value, least=8)
            if align:
                query, key, value = aligned(query), aligned(key), aligned(value)
            out, lse = run(self, query, key, value, call)
            out = contiguous_grad(out) if align else out
            return out if value_dim == out.shape[-1] else out[..., :value_dim], lse if call.semantics.return_lse else None

        return fit

    return decorate


def flash2_bounds(call: Call) -> tuple[int, int]:
    """``max_seqlen_q, max_seqlen_k`` for the kernels of flash-attn 2, which torch carries too.

    - One query with grouped heads takes a decoding shortcut that wants one query in every sequence: so at least 2 is passed.
    - A right side of a window of at least ``max_seqlen_k`` is taken for unlimited, and an unlimited one beside a limited left one for
      ``max_seqlen_k`` (``flash_api.cpp``, ``set_params_fprop``; flash-attention#895). Both are wrong where a sequence has more queries
      than keys, because the window begins ``Lk - Lq`` before the query's own number. With the longest query added to ``max_seqlen_k``
      neither hides or shows a key. The forward uses the number for nothing else; the backward launches more blocks, which return at once.
    """
    max_q, max_k = max(2, call.layout_q.max_seqlen), max(1, call.layout_kv.max_seqlen)
    if call.semantics.window is not None and not call.semantics.causal and call.layout_kv is not call.layout_q:
        max_k += max_q
    return max_q, max_k


def flash_window(semantics: Semantics) -> tuple[int, int]:
    """``(left, right)`` around the bottom-right diagonal, -1 for unlimited; causal alone is ``(-1, 0)``."""
    left, right = semantics.window or (None, None)
    return -1 if left is None else left, 0 if semantics.causal else -1 if right is None else right
