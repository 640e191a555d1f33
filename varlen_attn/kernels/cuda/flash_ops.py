"""What the adapters of flash-attn 3 and 4 share: a pair of custom ops around a library's two functions, and what the libraries lack.

The ops trace (a fake kernel each), record themselves where they run, and have their own autograd: neither library's is used. Inside,
where tensors are real, they do what differs between versions of the libraries or is missing there:

- Sinks. The kernel computes attention without them. With ``joined = log(exp(lse) + exp(sink))`` the output is the kernel's times
  ``exp(lse - joined)``; the backward kernel, given that output and ``joined``, computes the gradients with sinks, because it takes the
  weights as ``exp(score - lse)``. The sink's own gradient is ``-sum_i exp(sink - joined_i) * (dO_i . O_i)``.
- No queries at all, or no keys at all: nothing to launch.
- Addresses and strides of 16 bytes, which the tensor memory accelerator wants, and none that are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..._state import state
from ...layout.seq_layout import SeqLayout
from ..base import Backend, Refusal, on_launch, scale_refusals
from ..ops import define_ops
from ..problem import Problem
from ..values import Call, Result
from .fit import FLASH, aligned, fitted, flash_window

_TILE = 128  # rows of a kernel's block
_MOST_PIECES = 4_095  # sequences that slack rows are cut into: a kernel's grid does not count far (see `kernels.limits`)


Function = Callable[[dict[str, Any]], tuple[Tensor, ...]]


def define_flash_ops(name: str, forward: Function, backward: Function) -> Callable[..., Any]:
    """`define_ops` around a library, whose functions get their arguments by name.

    ``forward`` gets those of `_named`, and returns out and lse ``(N,T)``, which is -inf in rows without keys. ``backward`` gets ``dout``,
    ``out``, ``lse`` and ``deterministic`` too, and returns the gradients of query, key and value.
    """

    def forward_op(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, sinks: Tensor | None, max_q: int, max_k: int,
        scale: float, causal: bool, window: list[int], softcap: float, deterministic: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if state.records:
            on_launch(name, query.shape[0])
        if 0 in (query.shape[0], key.shape[0]):
            return query.new_zeros(query.shape), query.new_full((query.shape[1], query.shape[0]), float("-inf"), dtype=torch.float32)
        out, lse = forward(_named(query, key, value, cu_q, cu_k, max_q, max_k, scale, causal, window, softcap))
        return (out if sinks is None else _with_sinks(out, lse, sinks)), lse

    def backward_op(
        grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
        sinks: Tensor | None, *options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        dsinks = grad.new_zeros((query.shape[1] if sinks is not None else 0,), dtype=torch.float32)
        if 0 in (query.shape[0], key.shape[0]):
            return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape), dsinks
        grad = grad.contiguous()  # a broadcast one is read by its strides, and those of a slice overflow 32 bits (flash-attention#2611)
        if sinks is not None:
            lse = _joined(lse, sinks)
            dsinks = _sinks_gradient(grad, out, lse, sinks)
        given = _named(query, key, value, cu_q, cu_k, *options[:-1])
        return *backward(given | dict(dout=grad, out=out, lse=lse, deterministic=options[-1])), dsinks

    return define_ops(name, forward_op, backward_op, kernel="the kernel", device="default")


def _named(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, causal: bool,
    window: list[int], softcap: float,
) -> dict[str, Any]:  # fmt: skip
    """By flash-attn's names, in memory that the kernels can read. A side of the window that is -1 is unlimited, a softcap of 0 is none."""
    q, k, v = (aligned(x) for x in (query, key, value))
    return dict(
        q=q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k, softmax_scale=scale, causal=causal,
        window_size_left=window[0], window_size_right=window[1], softcap=softcap,
    )  # fmt: skip


def _joined(lse: Tensor, sinks: Tensor) -> Tensor:
    """The log-sum-exp with sinks, ``(N, T)``; finite, also for rows without keys, whose own is -inf."""
    return torch.logaddexp(lse, sinks[:, None])


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    share_TN = torch.sigmoid(lse - sinks[:, None]).t()
    return (out * share_TN[..., None]).to(out.dtype)


def _sinks_gradient(grad: Tensor, out: Tensor, joined: Tensor, sinks: Tensor) -> Tensor:
    delta_NT = (grad.float() * out.float()).sum(-1).t()
    return -((sinks[:, None] - joined).exp() * delta_NT).sum(1)


def covering_offsets(layout_q: SeqLayout, layout_kv: SeqLayout) -> tuple[Tensor, Tensor, int, int]:
    """Offsets of queries and keys, and bounds of their lengths, such that every row belongs to a sequence.

    In capacity mode rows follow the last sequence. flash-attn 3 accepts them and can corrupt that sequence's last block
    (sgl-flash-attn#47, read there; not reproduced here). So they become short sequences of their own, of 128 rows (more only beyond half
    a million rows): as many offsets as the largest tail would need, computed from ``cu_seqlens[-1]`` on the device, those too many empty.
    The caller has zeroed these rows and drops their results.
    """
    max_q, max_k = max(1, layout_q.max_seqlen), max(1, layout_kv.max_seqlen)
    if not (layout_q.has_slack or layout_kv.has_slack):
        return layout_q.cu_seqlens, layout_kv.cu_seqlens, max_q, max_k
    most = max(layout_q.num_rows, layout_kv.num_rows)
    rows = _TILE * max(1, -(-most // (_TILE * _MOST_PIECES)))
    pieces = -(-most // rows)
    cu_q = _cover(layout_q, pieces, rows)
    cu_k = cu_q if layout_kv is layout_q else _cover(layout_kv, pieces, rows)
    return cu_q, cu_k, max(rows, max_q), max(rows, max_k)


def _cover(layout: SeqLayout, pieces: int, rows: int) -> Tensor:
    cu = layout.cu_seqlens
    ends = cu[-1:] + rows * torch.arange(1, pieces + 1, device=cu.device, dtype=cu.dtype)
    return torch.cat([cu, ends.clamp(max=layout.num_rows)])


class FlashOps(Backend):
    """The adapters of both: a library is its ``op``, of `define_flash_ops`, and what it refuses beyond this."""

    custom_op = True
    op: ClassVar[Callable[..., Any]]
    capabilities = replace(FLASH, min_capability=(9, 0), rocm=False, dropout=False, alibi=False)

    def extra_refusals(self, problem: Problem) -> Iterable[Refusal]:
        return scale_refusals(problem)

    @fitted(align=False)
    def run(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
        cu_q, cu_k, max_q, max_k = covering_offsets(*call.layouts)
        semantics = call.semantics
        out, lse = self.op(
            query, key, value, cu_q, cu_k, call.extras.sinks, max_q, max_k, semantics.factor, bool(semantics.causal),
            list(flash_window(semantics)), semantics.softcap or 0.0, semantics.deterministic,
        )  # fmt: skip
        return out, lse
