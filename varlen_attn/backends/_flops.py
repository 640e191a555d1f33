"""Formulas for `torch.utils.flop_counter`, whose import costs 50 ms: registered where somebody has imported it.

That is looked for when this package is imported and at every call. A `FlopCounterMode` copies the formulas when it is made, so import
``torch.utils.flop_counter`` first, or make one call before it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .._gather import is_tracing


def register_flops() -> None:
    """Tell the FLOP counter of this process, if there is one, about our own ops."""
    counter = sys.modules.get("torch.utils.flop_counter")
    for name in ("cpu", "cpu_native", "flash3", "flash4"):
        forward, backward = (getattr(torch.ops.varlen_attn, f"{name}_{way}", None) for way in ("forward", "backward"))
        if counter is not None and forward is not None and forward not in counter.flop_registry:
            counter.register_flop_formula(forward, get_raw=True)(_forward_flops)
            counter.register_flop_formula(backward, get_raw=True)(_backward_flops)


def _pairs(cu_q: Tensor, cu_k: Tensor, rows_q: int, rows_k: int) -> int:
    """Query-key pairs of all sequences. Masks are not subtracted, as torch's own formulas do not."""
    if is_tracing(cu_q):  # no values: as if all were equally long
        return rows_q * rows_k // max(1, cu_q.shape[0] - 1)
    return int((cu_q.diff().to(torch.int64) * cu_k.diff().to(torch.int64)).sum())


def _forward_flops(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, *args: Any, **kwargs: Any) -> int:
    """Two matrix products: scores, and their weights times the values."""
    pairs = _pairs(cu_q, cu_k, query.shape[0], key.shape[0])
    return 2 * pairs * query.shape[1] * (query.shape[2] + value.shape[2])


def _backward_flops(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, *args: Any, **kwargs: Any
) -> int:
    """Five: the scores again, and the gradients of weights, values, queries and keys."""
    pairs = _pairs(cu_q, cu_k, query.shape[0], key.shape[0])
    return 2 * pairs * query.shape[1] * (3 * query.shape[2] + 2 * value.shape[2])
