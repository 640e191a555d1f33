"""Packed sequences on ATen's CPU flash kernel, with a hand-written backward. The backend that every machine has.

Equal lengths share one kernel call: without a copy where they are adjacent, gathered where they are not and short; near-equal short
ones too, padded. No padding at all is one dense call. Causal masks and windows are cut to the rows and keys that see each other, so a
window costs its width and not the length. What the kernel has no argument for (softcap, dropout, sinks, score bias) is exact eager
maths, a group of sequences at a time.

The kernel is private to torch (`aten::_scaled_dot_product_flash_attention_for_cpu`); known of it: empty sequences kill the
process with SIGFPE; its log-sum-exp of a row without keys is 0; it has no dropout and needs Hv == H; its half-precision backward
accumulates in half precision, which below 192 tokens is both slower and less exact than one in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._gather import is_transformed
from ..problem import Problem
from ._cpu_plan import Launch, Target, blocks, chunks
from ._maths import attend, needs_maths
from ._ops import define_ops
from .base import FLOATS, HALF, Backend, Call, Capabilities, Refusal, Result, connected_zeros, observe, pad_head_dim, state, wide_dtype

# Overloads, because looking one up at every call costs microseconds. None in a torch that has dropped these private ops.
_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
_flash: Any = getattr(getattr(torch.ops.aten, _KERNEL, None), "default", None)
_flash_backward: Any = getattr(getattr(torch.ops.aten, _KERNEL + "_backward", None), "default", None)

_WIDE_BACKWARD_BELOW = 192  # tokens: half-precision backward in float32 is 2 to 5 times faster below, measured with AMX


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    slopes: Tensor | None,
    scale: float,
    causal: str,
    window: list[int],
    single: bool,
) -> tuple[Tensor, Tensor]:
    """``(T,N,H), (Tk,K,H), (Tk,K,H) -> (T,N,H)``, lse ``(N,T)``. Rows that see no key: 0 and -inf."""
    if state.records:
        observe("cpu", query.shape[0])
    call = Launch(query, key, (cu_q, cu_k), causal, window, slopes, single)
    if call.is_plain:
        return _plain_forward(call, query, key, value, scale)
    out = (query.new_empty if call.covers()[0] else query.new_zeros)(query.shape)
    target, lses = call.query_target(out), []
    for index, ((q,), (k, v)) in enumerate(zip(call.queries(query), call.keys(key, value), strict=True)):
        o = target.block(index)
        lse = query.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=wide_dtype(query.dtype)).transpose(1, 2)
        for rows, seen, is_causal, mask in call.masked_tiles(index, query.dtype):
            result, result_lse = _flash(q[:, :, rows], k[:, :, seen], v[:, :, seen], 0.0, is_causal, attn_mask=mask, scale=scale)
            o[:, :, rows].copy_(result)
            lse[:, :, rows].copy_(result_lse)
        target.put(index, o)
        lses.append(lse)
    return out, call.lse(lses, query)


def _plain_forward(call: Launch, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The usual case in as few steps as can be: on short sequences each costs as much as a part of their attention."""
    causal = bool(call.semantics.causal)
    pairs = zip(call.groups, call.queries(query), call.keys(key, value), strict=True)
    if call.is_whole:  # the kernel's own output is the result, without a copy
        ((_, (q,), (k, v)),) = pairs
        result, lse = _flash(q, k, v, 0.0, causal, scale=scale)
        return result.transpose(1, 2).reshape(query.shape).contiguous(), call.lse([lse], query)
    out = (query.new_empty if call.plan.covers_q else query.new_zeros)(query.shape)
    target, lses = call.query_target(out), []
    for index, (group, (q,), (k, v)) in enumerate(pairs):
        mask = None if causal else group.key_mask(query.dtype)
        result, lse = _flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        target.put(index, result)
        lses.append(lse)
    return out, call.lse(lses, query)


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
    scale: float,
    causal: str,
    window: list[int],
    single: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; exactly 0 where nothing is seen."""
    call = Launch(query, key, (cu_q, cu_k), causal, window, slopes, single)
    if call.is_plain:
        return _plain_backward(call, grad, query, key, value, out, lse, scale)
    half = query.dtype in HALF
    # Under a window a key's gradient is a sum over tiles: half precision would round at every one.
    kv_dtype = torch.float32 if half and call.semantics.window is not None else key.dtype
    covered_q, covered_k = call.covers()
    dq = query.new_empty(query.shape) if covered_q else query.new_zeros(query.shape)
    dk, dv = ((x.new_empty if covered_k else x.new_zeros)(x.shape, dtype=kv_dtype) for x in (key, value))
    targets = call.query_target(dq), call.key_target(dk), call.key_target(dv)
    blocks_q = call.queries(query, grad.contiguous(), out, lse.t()[..., None])
    for index, (block_q, block_k) in enumerate(zip(blocks_q, call.keys(key, value), strict=True)):
        wide = half and (call.groups[index].len_q < _WIDE_BACKWARD_BELOW or kv_dtype == torch.float32)
        to_q, *to_kv = (target.block(index) for target in targets)
        for rows, seen, is_causal, mask in call.masked_tiles(index, query.dtype):
            q, g, o, logs = (x[:, :, rows] for x in block_q)
            k, v = (x[:, :, seen] for x in block_k)
            if wide:
                q, g, o, k, v = (x.float() for x in (q, g, o, k, v))
            parts = _flash_backward(g, q, k, v, o, logs[..., 0], 0.0, is_causal, attn_mask=mask, scale=scale)
            to_q[:, :, rows].copy_(parts[0])
            for to, part in zip(to_kv, parts[1:], strict=True):
                to[:, :, seen].copy_(part) if covered_k else to[:, :, seen].add_(part)
        for target, block in zip(targets, (to_q, *to_kv), strict=True):
            target.put(index, block)
    return dq, dk.to(key.dtype), dv.to(value.dtype)


def _plain_backward(
    call: Launch, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    causal, inputs = bool(call.semantics.causal), (query, key, value)
    grads: list[Tensor] = []
    targets: list[Target] = []
    if not call.is_whole:
        covered = call.plan.covers_q, call.plan.covers_k, call.plan.covers_k
        grads = [(x.new_empty if c else x.new_zeros)(x.shape) for x, c in zip(inputs, covered, strict=True)]
        targets = [call.query_target(grads[0]), call.key_target(grads[1]), call.key_target(grads[2])]
    # At padding, which repeats a token, the gradient of the output is 0: it must not add to its keys' gradients.
    blocks_q = call.queries(query, grad.contiguous(), out, lse.t()[..., None], zeroed=1)
    for index, (group, (q, g, o, logs), (k, v)) in enumerate(zip(call.groups, blocks_q, call.keys(key, value), strict=True)):
        mask = None if causal else group.key_mask(query.dtype)
        if query.dtype in HALF and group.len_q < _WIDE_BACKWARD_BELOW:
            q, g, o, k, v = (x.float() for x in (q, g, o, k, v))
        parts = _flash_backward(g, q, k, v, o, logs.squeeze(-1), 0.0, causal, attn_mask=mask, scale=scale)
        if call.is_whole:
            grads = [part.transpose(1, 2).reshape(x.shape).to(x.dtype).contiguous() for part, x in zip(parts, inputs, strict=True)]
        for target, part in zip(targets, parts, strict=False):
            target.put(index, part)
    return grads[0], grads[1], grads[2]


_op = define_ops("cpu", _forward, _backward, kernel="ATen's kernel", lse_by_rows=True)


class Cpu(Backend):
    """ATen's CPU flash kernel over packed sequences."""

    name = "cpu"
    own_op = True
    install = "use a torch that has it"
    capabilities = Capabilities(devices=frozenset({"cpu"}), dtypes=FLOATS, batch_invariant=True)

    def missing(self, problem: Problem) -> str | None:
        return None if _flash and _flash_backward else f"this torch has no aten::{_KERNEL} with a backward"

    def extra_refusals(self, problem: Problem) -> Iterable[Refusal]:
        if problem.tracing and needs_maths(problem.semantics):
            yield Refusal(
                "does softcap, dropout, sinks and score biases one sequence at a time, by offsets that tracing can not read",
                "call it outside the compiled function",
            )

    def kernel(self, problem: Problem) -> str:
        if needs_maths(problem.semantics) or problem.transformed:
            return "eager matmul, softmax, matmul for each group of equal lengths"
        return f"aten::{_KERNEL}"

    def seen_as(self, problem: Problem) -> str:
        return "softmax" if needs_maths(problem.semantics) or problem.transformed else f"aten::{_KERNEL}"

    def run(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
        semantics = call.semantics
        if needs_maths(semantics) or is_transformed():
            # Under torch.func and forward-mode AD too: the op below has a backward only, and would give zeros without an error.
            return _run_maths(query, key, value, call)
        value_dim = value.shape[-1]
        query, key, value = pad_head_dim(1, query, key, value)
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        scale = semantics.factor
        if scale <= 0:  # the kernel scales what it has masked: -inf would become inf or NaN
            query, scale = query * scale, 1.0
        window = [-1 if side is None else side for side in semantics.window or (None, None)]
        out, lse = _op(
            query, key, value, call.layout_q.cu_seqlens, call.layout_kv.cu_seqlens, call.extras.alibi_slopes, scale,
            semantics.causal or "", window, semantics.batch_invariant,
        )  # fmt: skip
        return out[..., :value_dim], lse if semantics.return_lse else None


def _run_maths(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
    """Exact eager attention, a group of equal lengths at a time; autograd does the backward."""
    results, lses = [], []
    groups = list(chunks(*call.layouts, call.semantics.batch_invariant, query.shape[1]))
    spans_q, spans_k = [(g.q_start, g.size, g.len_q) for g in groups], [(g.k_start, g.size, g.len_k) for g in groups]
    for group, q, k, v in zip(groups, blocks(query, spans_q), blocks(key, spans_k), blocks(value, spans_k), strict=True):
        out, lse = attend(q, k, v, call.semantics, call.extras, offset=group.len_k - group.len_q)
        results.append(out.transpose(1, 2).flatten(0, 1))
        if lse is not None:
            lses.append(lse.transpose(0, 1).flatten(1))
    rest = query.shape[0] - sum(g.size * g.len_q for g in groups)
    results.append(connected_zeros((rest, query.shape[1], value.shape[2]), query, key, value))
    lses.append(query.new_full((query.shape[1], rest), float("-inf"), dtype=wide_dtype(query.dtype)))
    return torch.cat(results), torch.cat(lses, 1) if call.semantics.return_lse else None
