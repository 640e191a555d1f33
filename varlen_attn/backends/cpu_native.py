"""The compiled kernel of ``csrc/``: one parallel region over all sequences, heads and blocks of queries, forward and backward.

Optional: ``python -m varlen_attn build-native`` compiles it. Softcap, ALiBi, sinks, windows and dropout run inside the kernel; a score
bias does not. float32 is computed in float32; bfloat16 by bfloat16 products with float32 sums where the CPU has instructions for them,
else, like float16, in float32. A sequence's result is bitwise the same whatever else is in the batch, but for dropout, which is drawn by
the place in the batch.

Its matrix products are those that libtorch exports from oneDNN (`at::native::cpublas::brgemm`, which uses AMX where there is one), or
the kernel's own where libtorch has none for this CPU.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import _native
from .._gather import is_transformed
from ..problem import Problem
from ._ops import define_ops
from .base import HALF, Backend, Call, Capabilities, Refusal, Result, observe, pad_head_dim, state

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in attention.h
_UNLIMITED = 1 << 40  # a side of a window that cuts nothing
_MULTIPLE = 16  # of head dimensions: whole vectors of every instruction set


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    sides: list[int],
    bottom_right: bool,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """``(T,N,H), (Tk,K,H), (Tk,K,Hv) -> (T,N,Hv)``, lse ``(N,T)``. Rows that see no key: 0 and -inf."""
    if state.records:
        observe("cpu_native", query.shape[0])
    out = query.new_empty((*query.shape[:2], value.shape[2]))
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    call = _Call(query, key, value, cu_q, cu_k, slopes, sinks, seed, sides, bottom_right, scale, softcap, dropout_p)
    call.point(out=out, lse=lse)
    _native.library().forward(call.arguments)
    return out, lse


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    sides: list[int],
    bottom_right: bool,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sinks; exactly 0 where nothing is seen."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (query, key, value))
    dsinks = lse.new_zeros((cu_q.shape[0] - 1 if sinks is not None else 0, query.shape[1]))
    call = _Call(query, key, value, cu_q, cu_k, slopes, sinks, seed, sides, bottom_right, scale, softcap, dropout_p)
    grad = _readable(grad)
    call.point(out=out.contiguous(), lse=lse.contiguous(), grad=grad, dq=dq, dk=dk, dv=dv, dsinks=dsinks)
    call.arguments.grad_row, call.arguments.grad_head, _ = grad.stride()
    _native.library().backward(call.arguments)
    return dq, dk, dv, dsinks.flatten() if sinks is None else dsinks.sum(0)


class _Call:
    """The arguments of a call, and the tensors that its pointers point into."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        slopes: Tensor | None,
        sinks: Tensor | None,
        seed: Tensor | None,
        sides: list[int],
        bottom_right: bool,
        scale: float,
        softcap: float,
        dropout_p: float,
    ) -> None:
        query, key, value = (_readable(x) for x in (query, key, value))
        (rows_q, heads, dim), (rows_k, kv_heads, value_dim) = query.shape, value.shape
        if (rows_k, cu_k.numel(), cu_q.dtype, cu_k.dtype) != (key.shape[0], cu_q.numel(), torch.int32, torch.int32):
            raise RuntimeError("offsets must be int32, as many for keys as for queries, and there must be as many keys as values")
        low, high = sides
        self.kept: list[Tensor] = []
        self.arguments = _native.Arguments(
            num_seqs=cu_q.shape[0] - 1, rows_q=rows_q, rows_k=rows_k, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim,
            dtype=_DTYPES[query.dtype], low=low, high=high, bottom_right=bottom_right, seed=0 if seed is None else int(seed),
            scale=scale, softcap=softcap, dropout_p=dropout_p, level=-1, portable=not torch.backends.mkldnn.enabled,
        )  # fmt: skip
        for name, x in (("q", query), ("k", key), ("v", value)):
            setattr(self.arguments, f"{name}_row", x.stride(0))
            setattr(self.arguments, f"{name}_head", x.stride(1))
        optional = {name: x.contiguous() for name, x in (("slopes", slopes), ("sinks", sinks)) if x is not None}
        self.point(q=query, k=key, v=value, cu_q=cu_q.contiguous(), cu_k=cu_k.contiguous(), **optional)

    def point(self, **tensors: Tensor) -> None:
        """Set pointers; what they point into lives as long as this."""
        for name, x in tensors.items():
            self.kept.append(x)
            setattr(self.arguments, name, x.data_ptr())


def _readable(x: Tensor) -> Tensor:
    """A head's numbers must be adjacent; rows and heads may stand anywhere, but pairs of bfloat16 are moved as 32 bits."""
    even = x.dtype != torch.bfloat16 or (x.stride(0) | x.stride(1) | x.data_ptr() >> 1) % 2 == 0
    return x if x.stride(-1) == 1 and even else x.clone(memory_format=torch.contiguous_format)


_op = define_ops("cpu_native", _forward, _backward, kernel="the compiled kernel")


class CpuNative(Backend):
    """The compiled CPU kernel over packed sequences."""

    name = "cpu_native"
    own_op = True
    install = "compile it with `python -m varlen_attn build-native`"
    capabilities = Capabilities(
        devices=frozenset({"cpu"}), dtypes=HALF | {torch.float32}, score_bias=False, batch_invariant=True
    )  # fmt: skip

    def missing(self, problem: Problem) -> str | None:
        if problem.torch_version != torch.__version__:
            return None  # another machine's torch, which may have been built for
        return _native.why_not()

    def extra_refusals(self, problem: Problem) -> Iterable[Refusal]:
        if 0 in (problem.head_dim, problem.value_head_dim):
            yield Refusal("needs head dimensions of at least 1", "order backend='cpu'")
        if problem.transformed:
            yield Refusal("has a backward only, and this is torch.func or forward-mode AD", "order backend='cpu'")

    def kernel(self, problem: Problem) -> str:
        return "compiled kernel" if _native.why_not() else f"compiled kernel ({_native.library()})"

    def seen_as(self, problem: Problem) -> str:
        return "varlen_attn::cpu_native_forward"

    def run(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
        assert not is_transformed()
        value_dim = value.shape[-1]
        query, key = pad_head_dim(_MULTIPLE, query, key)
        (value,) = pad_head_dim(_MULTIPLE, value)
        semantics = call.semantics
        low, high = semantics.visible_range(0)
        # Drawn outside of the op, which is a pure function of it: recomputation under checkpointing draws the same.
        seed = torch.randint(1 << 62, (), dtype=torch.int64, device="cpu") if semantics.dropout_p else None
        out, lse = _op(
            query, key, value, call.layout_q.cu_seqlens, call.layout_kv.cu_seqlens, call.extras.alibi_slopes, call.extras.sinks, seed,
            [-_UNLIMITED if low is None else low, _UNLIMITED if high is None else high], semantics.causal != "top_left",
            semantics.factor, semantics.softcap or 0.0, semantics.dropout_p,
        )  # fmt: skip
        return out[..., :value_dim], lse if semantics.return_lse else None
