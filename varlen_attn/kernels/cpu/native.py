"""The compiled kernel of ``csrc/``: one parallel region over all sequences, heads and blocks of queries, forward and backward.

Softcap, ALiBi, sinks, windows and dropout run inside the kernel; a score
bias does not. float32 is computed in float32; bfloat16 by bfloat16 products with float32 sums where the CPU has instructions for them,
else, like float16, in float32. A sequence's result is bitwise the same whatever else is in the batch, but for dropout, which is drawn by
the place in the batch.

Its matrix products are those that libtorch exports from oneDNN (`at::native::cpublas::brgemm`, which uses AMX where there is one), or
the kernel's own where libtorch has none for this CPU. Its threads are libtorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..._state import state
from ...errors import ArgumentError
from ...layout.checks import check_offsets
from ..base import HALF, Backend, Capabilities, Refusal, on_launch, pad_head_dim
from ..ops import check_operands, define_ops
from ..problem import Problem
from ..values import Call, Result
from . import build as _native

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in attention.h
_UNLIMITED = 1 << 40  # a side of a window that cuts nothing
_MULTIPLE = 16  # of head dimensions: whole vectors of every instruction set


def _forward(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, slopes: Tensor | None, sinks: Tensor | None,
    seed: Tensor | None, sides: list[int], bottom_right: bool, scale: float, softcap: float, dropout_p: float, slack_q: bool = True,
    slack_k: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(T,N,H), (Tk,K,H), (Tk,K,Hv) -> (T,N,Hv)``, lse ``(N,T)``. Rows that see no key: 0 and -inf."""
    if state.records:
        on_launch("cpu_native", query.shape[0])
    check_operands(query, key, value, cu_q, cu_k)
    rows, heads, _ = query.shape
    out = query.new_empty((rows, heads, value.shape[2]))
    lse = query.new_empty((heads, rows), dtype=torch.float32)
    _launch(
        _native.library().forward, query, key, value, out, lse, cu_q, cu_k, slopes, sinks, seed, sides, bottom_right, scale, softcap,
        dropout_p, slack_q, slack_k,
    )  # fmt: skip
    return out, lse


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    slopes: Tensor | None, sinks: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value and sinks; exactly 0 where nothing is seen."""
    check_operands(query, key, value, cu_q, cu_k, grad, out, lse)
    dq, dk, dv = (x.new_empty(x.shape) for x in (query, key, value))
    dsinks = lse.new_zeros((cu_q.shape[0] - 1 if sinks is not None else 0, query.shape[1]))  # one row a sequence
    _launch(
        _native.library().backward, query, key, value, out, lse, cu_q, cu_k, slopes, sinks, *options, gradients=(grad, dq, dk, dv, dsinks)
    )
    return dq, dk, dv, dsinks.flatten() if sinks is None else dsinks.sum(0)


def _launch(
    run: Callable[[_native.Arguments], None], query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor,
    cu_k: Tensor, slopes: Tensor | None, sinks: Tensor | None, seed: Tensor | None, sides: list[int], bottom_right: bool, scale: float,
    softcap: float, dropout_p: float, slack_q: bool = True, slack_k: bool = True, *, gradients: tuple[Tensor | None, ...] = (None,) * 5,
) -> None:  # fmt: skip
    """Call the kernel. One function without helpers: on short sequences each costs as much as a part of their attention."""
    (rows_q, heads, dim), (rows_k, kv_heads, value_dim) = query.shape, value.shape
    for x in (slopes, sinks):
        if x is not None and (x.shape != (heads,) or x.dtype != torch.float32):
            raise ArgumentError(f"slopes and sinks must be float32 of shape (N,) = ({heads},), but are {tuple(x.shape)} of {x.dtype}.")
    grad, *results = gradients
    in_pairs = query.dtype == torch.bfloat16
    strides: tuple[int, ...] = ()
    pointers = []
    kept = [query, key, value, out, lse, grad, *results, cu_q, cu_k, slopes, sinks]  # what pointers point into
    for i, x in enumerate(kept):
        if x is None:
            pointers.append(0)
            continue
        if i < 3 or i == 5:
            row, head, last = x.stride()
            # A head's numbers must be adjacent; rows and heads may stand anywhere, but pairs of bfloat16 are moved as 32 bits.
            if last != 1 or (in_pairs and (row | head | x.data_ptr() >> 1) % 2):
                kept[i] = x = x.clone(memory_format=torch.contiguous_format)
                row, head, _ = x.stride()
            strides += (row, head)
        else:
            kept[i] = x = x.contiguous()
        pointers.append(x.data_ptr())
    if grad is None:
        strides += (0, 0)
    low, high = sides
    packed = _native.PACKED.pack(
        *pointers, *strides, cu_q.shape[0] - 1, rows_q, rows_k, heads, kv_heads, dim, value_dim, _DTYPES[query.dtype], low, high,
        bottom_right, 0 if seed is None else int(seed), slack_q, slack_k, scale, softcap, dropout_p, -1, not torch.backends.mkldnn.enabled,
    )  # fmt: skip
    try:
        run(_native.Arguments.from_buffer_copy(packed))
    except ValueError:
        check_offsets(cu_q.tolist(), None, rows_q, slack_q)
        check_offsets(cu_k.tolist(), None, rows_k, slack_k)
        raise


_op = define_ops("cpu_native", _forward, _backward, kernel="the compiled kernel")


class CpuNative(Backend):
    """The compiled CPU kernel over packed sequences."""

    name = "cpu_native"
    custom_op = checks_offsets = True
    install = _native.INSTALL
    capabilities = Capabilities(
        devices=frozenset({"cpu"}), dtypes=HALF | {torch.float32}, score_bias=False, batch_invariant=True
    )  # fmt: skip

    def missing(self, problem: Problem) -> str | None:
        if problem.torch_version != torch.__version__ or _native.setting == "0":
            return None  # another machine's torch, which may have been built for; or it is not missing, but not wanted
        return _native.why_not()

    def extra_refusals(self, problem: Problem) -> Iterable[Refusal]:
        if _native.setting == "0" and problem.torch_version == torch.__version__:
            yield Refusal(str(_native.why_not()), "unset it", "machine")
        if 0 in (problem.head_dim, problem.value_head_dim):
            yield Refusal("needs head dimensions of at least 1", "use backend='cpu'")

    def kernel(self, problem: Problem) -> str:
        return "compiled kernel" if _native.why_not() else f"compiled kernel ({_native.library()})"

    def seen_as(self, problem: Problem) -> str:
        return "varlen_attn::cpu_native_forward"

    def run(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
        value_dim = value.shape[-1]
        if query.shape[-1] == value_dim:
            query, key, value = pad_head_dim(_MULTIPLE, query, key, value) if value_dim % _MULTIPLE else (query, key, value)
        else:
            (query, key), (value,) = pad_head_dim(_MULTIPLE, query, key), pad_head_dim(_MULTIPLE, value)
        semantics = call.semantics
        low, high = (None, 0 if semantics.causal else None) if semantics.window is None else semantics.visible_range(0)
        # Drawn outside of the op, which is a pure function of it: recomputation under checkpointing draws the same.
        seed = torch.randint(1 << 62, (), dtype=torch.int64, device="cpu") if semantics.dropout_p else None
        out, lse = _op(
            query, key, value, call.layout_q.cu_seqlens, call.layout_kv.cu_seqlens, call.extras.alibi_slopes, call.extras.sinks, seed,
            [-_UNLIMITED if low is None else low, _UNLIMITED if high is None else high], semantics.causal != "top_left",
            semantics.scale, semantics.softcap or 0.0, semantics.dropout_p, call.layout_q.has_slack, call.layout_kv.has_slack,
        )  # fmt: skip
        return out if value_dim == value.shape[-1] else out[..., :value_dim], lse if semantics.return_lse else None
