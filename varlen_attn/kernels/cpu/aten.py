"""Packed sequences on ATen's CPU flash kernel, with a hand-written backward. The backend that every machine has.

Equal lengths share one kernel call: without a copy where they are adjacent, gathered where they are not and short; near-equal short
ones too, padded. No padding at all is one dense call, and so are a few tokens, with a mask between sequences. Causal masks and windows
are cut to the rows and keys that see each other, so a window costs its width and not the length. What the kernel has no argument for
(softcap, dropout, sinks, score bias) is exact eager math, a group of sequences at a time.

The kernel is private to torch (`aten::_scaled_dot_product_flash_attention_for_cpu`); known of it: empty sequences kill the
process with SIGFPE; its log-sum-exp of a row without keys is 0, and short rows of NaN count as such; it has no
dropout and needs Hv == H; its half-precision backward accumulates in half precision, which below 192 tokens is both slower and less exact
than one in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..._state import state
from ..._torch import is_transformed
from ..base import FLOATS, HALF, Backend, Capabilities, Refusal, accumulation_dtype, on_launch, pad_head_dim, zeros_with_grad
from ..dense import attend_dense, is_nan, needs_eager
from ..ops import check_operands, define_ops
from ..problem import Problem
from ..values import Call, Result
from .blocks import Launch, Target, blocks, chunks, read

# Overloads, because looking one up at every call costs microseconds. None in a torch that has dropped these private ops.
_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
_flash: Any = getattr(getattr(torch.ops.aten, _KERNEL, None), "default", None)
_flash_backward: Any = getattr(getattr(torch.ops.aten, _KERNEL + "_backward", None), "default", None)

_LANES = 16  # of the widest vectors, in float32
_WIDE_BACKWARD_BELOW = 192  # tokens: half-precision backward in float32 is 2 to 5 times faster below, measured with AMX


def _forward(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, slopes: Tensor | None, scale: float, causal: str,
    window: list[int], single: bool, slack_q: bool = True, slack_k: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(T,N,H), (Tk,K,H), (Tk,K,H) -> (T,N,H)``, lse ``(N,T)``. Rows that see no key: 0 and -inf."""
    check_operands(query, key, value, cu_q, cu_k)
    launch = Launch(query, key, cu_q, cu_k, slopes, causal, window, single, slack_q, slack_k)
    out, lse = _attend(launch, query, key, value, scale, None)
    if launch.whole and math.isnan(out.sum().item()):
        return _forward(query, key, value, cu_q, cu_k, slopes, scale, causal, window, True, slack_q, slack_k)
    if state.records:
        on_launch("cpu", query.shape[0])
    # Over fewer keys than its vectors have lanes, the kernel takes a row of NaN for one without keys: 0, with a log-sum-exp of exactly 0.
    # With a mask it does not, and gives the same bits else, but short sequences take up to half longer.
    if not launch.whole and launch.shortest < _LANES and lse.count_nonzero().item() < lse.numel():
        out, lse = _attend(launch, query, key, value, scale, query.new_zeros((1, 1, 1, 1), dtype=lse.dtype))
    return out, lse


def _attend(launch: Launch, query: Tensor, key: Tensor, value: Tensor, scale: float, no_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """``no_mask``: for calls over few keys without a mask."""
    if launch.whole:  # as below, in fewer steps, which is where the time of a small batch goes
        block_q, block_k, block_v = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        _, _, is_causal, mask = launch.pieces(0)[0]
        block, lse = _flash(block_q[None], block_k[None], block_v[None], 0.0, is_causal, attn_mask=mask, scale=scale)
        return block[0].transpose(0, 1), lse[0]
    target, lses = Target(launch.queries, query, launch.covers_q), []
    for index, ((q,), (k, v)) in enumerate(zip(read(launch.queries, query), read(launch.keys, key, value), strict=True)):
        pieces = launch.pieces(index)
        if pieces and pieces[0].rows is None:
            mask = no_mask if pieces[0].mask is None and k.shape[2] < _LANES else pieces[0].mask
            block, lse = _flash(q, k, v, 0.0, pieces[0].is_causal, attn_mask=mask, scale=scale)
        else:
            block = target.block(index)
            lse = query.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=accumulation_dtype(query.dtype)).transpose(1, 2)
            for rows, seen, is_causal, mask in pieces:
                few = k[:, :, seen]
                mask = no_mask if mask is None and few.shape[2] < _LANES else mask
                part, part_lse = _flash(q[:, :, rows], few, v[:, :, seen], 0.0, is_causal, attn_mask=mask, scale=scale)
                block[:, :, rows].copy_(part)
                lse[:, :, rows].copy_(part_lse)
        target.put(index, block)
        lses.append(lse)
    return target.rows, launch.lse(lses, query)


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    slopes: Tensor | None, scale: float, causal: str, window: list[int], single: bool, slack_q: bool = True, slack_k: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value; exactly 0 where nothing is seen."""
    check_operands(query, key, value, cu_q, cu_k, grad, out, lse)
    launch = Launch(query, key, cu_q, cu_k, slopes, causal, window, single, slack_q, slack_k)
    half = query.dtype in HALF
    # Under a window a key's gradient is a sum over pieces: half precision would round at every one.
    kv_dtype = torch.float32 if half and max(window) >= 0 else key.dtype
    targets = (
        Target(launch.queries, query, launch.covers_q),
        *[Target(launch.keys, x, launch.covers_k, kv_dtype) for x in (key, value)],
    )
    # At padding, which repeats a token, the gradient of the output is 0: it must not add to its keys' gradients.
    blocks_q = read(launch.queries, query, grad.contiguous(), out, lse.t()[..., None], zeroed=1)
    for index, (block_q, block_k) in enumerate(zip(blocks_q, read(launch.keys, key, value), strict=True)):
        wide = half and (block_q[0].shape[2] < _WIDE_BACKWARD_BELOW or kv_dtype == torch.float32)
        pieces = launch.pieces(index)
        blocks = [] if pieces and pieces[0].rows is None else [target.block(index) for target in targets]
        for rows, seen, is_causal, mask in pieces:
            q, g, o, logs = block_q if rows is None else [x[:, :, rows] for x in block_q]
            k, v = block_k if rows is None else [x[:, :, seen] for x in block_k]
            if wide:
                q, g, o, k, v = q.float(), g.float(), o.float(), k.float(), v.float()
            parts = _flash_backward(g, q, k, v, o, logs.squeeze(-1), 0.0, is_causal, attn_mask=mask, scale=scale)
            if rows is None:
                blocks = parts
                break
            blocks[0][:, :, rows].copy_(parts[0])
            for block, part in zip(blocks[1:], parts[1:], strict=True):
                block[:, :, seen].copy_(part) if launch.covers_k else block[:, :, seen].add_(part)
        for target, block in zip(targets, blocks, strict=True):
            target.put(index, block)
    dq, dk, dv = [target.rows for target in targets]
    if launch.whole and any(math.isnan(x.sum().item()) for x in (dq, dk, dv)):
        return _backward(grad, query, key, value, out, lse, cu_q, cu_k, slopes, scale, causal, window, True, slack_q, slack_k)
    return dq, dk.to(key.dtype), dv.to(value.dtype)


_op = define_ops("cpu", _forward, _backward, kernel="ATen's kernel", lse_by_rows=True)


class Cpu(Backend):
    """ATen's CPU flash kernel over packed sequences."""

    name = "cpu"
    custom_op = checks_offsets = True
    install = "use a torch that has it"
    capabilities = Capabilities(devices=frozenset({"cpu"}), dtypes=FLOATS, batch_invariant=True, transforms=True)

    def missing(self, problem: Problem) -> str | None:
        return None if _flash and _flash_backward else f"this torch has no aten::{_KERNEL} with a backward"

    def extra_refusals(self, problem: Problem) -> Iterable[Refusal]:
        if problem.tracing and (needs_eager(problem.semantics) or problem.transformed):
            yield Refusal(
                "does softcap, dropout, sinks and score biases one sequence at a time, by offsets that tracing cannot read",
                "call it outside the compiled function",
            )

    def kernel(self, problem: Problem) -> str:
        if needs_eager(problem.semantics) or problem.transformed:
            return "eager matmul, softmax, matmul for each group of equal lengths"
        return f"aten::{_KERNEL}"

    def seen_as(self, problem: Problem) -> str:
        return "softmax" if needs_eager(problem.semantics) or problem.transformed else f"aten::{_KERNEL}"

    def run(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
        semantics = call.semantics
        value_dim = value.shape[-1]
        if semantics.batch_invariant and any(x.shape[-1] * x.element_size() % 16 for x in (query, value)):
            # The last bits of products depend on whether rows begin at multiples of 16 bytes.
            query, key, value = pad_head_dim(16 // query.element_size(), query, key, value)
            out, lse = self.run(query, key, value, call)
            return out[..., :value_dim], lse
        if needs_eager(semantics) or is_transformed():
            # Under torch.func and forward-mode AD too: the op below has a backward only, and would give zeros without an error.
            return _run_eager(query, key, value, call)
        if value_dim != query.shape[-1]:
            query, key, value = pad_head_dim(1, query, key, value)
        query, key, value = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
        scale = semantics.factor
        if scale <= 0:  # the kernel scales what it has masked: -inf would become inf or NaN
            query, scale = query * scale, 1.0
        window = [-1 if side is None else side for side in semantics.window or (None, None)]
        out, lse = _op(
            query, key, value, call.layout_q.cu_seqlens, call.layout_kv.cu_seqlens, call.extras.alibi_slopes, scale,
            semantics.causal or "", window, semantics.batch_invariant, call.layout_q.has_slack, call.layout_kv.has_slack,
        )  # fmt: skip
        masked = semantics.window or (semantics.causal and (call.extras.alibi_slopes is not None or call.layout_kv is not call.layout_q))
        if masked and is_nan(lse):
            return self._repaired(query, key, value[..., :value_dim], lse, call)
        return out if out.shape[-1] == value_dim else out[..., :value_dim], lse if semantics.return_lse else None

    def _repaired(self, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, call: Call) -> Result:
        """The kernel adds -inf to scores that it hides, and NaN stays NaN. Sequences with such rows are computed by eager math; all others
        keep their bits."""
        layout = call.layout_q
        of_sequence = torch.zeros(layout.num_seqs + 1, dtype=torch.bool).index_fill_(0, layout.seq_ids[lse.isnan().any(0)], True)
        rows_q, rows_k = (of_sequence[x.seq_ids][:, None, None] for x in call.layouts)
        exact, exact_lse = _run_eager(query, key, value, call)
        out, lse_ = self.run(query.masked_fill(rows_q, 0), key.masked_fill(rows_k, 0), value.masked_fill(rows_k, 0), call)
        return torch.where(rows_q, exact, out), None if lse_ is None or exact_lse is None else torch.where(rows_q[:, 0, 0], exact_lse, lse_)


def _run_eager(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
    """Exact eager attention, a group of equal lengths at a time; autograd does the backward."""
    results, lses = [], []
    groups = list(chunks(*call.layouts, call.semantics.batch_invariant, query.shape[1]))
    spans_q, spans_k = [(g.q_start, g.size, g.len_q) for g in groups], [(g.k_start, g.size, g.len_k) for g in groups]
    for group, q, k, v in zip(groups, blocks(query, spans_q), blocks(key, spans_k), blocks(value, spans_k), strict=True):
        out, lse, _ = attend_dense(q, k, v, call.semantics, call.extras, offset=group.len_k - group.len_q)
        results.append(out.transpose(1, 2).flatten(0, 1))
        if lse is not None:
            lses.append(lse.transpose(0, 1).flatten(1))
    rest = query.shape[0] - sum(g.size * g.len_q for g in groups)
    unseen = [] if groups else call.extras.tensors  # those that no group has used
    results.append(zeros_with_grad((rest, query.shape[1], value.shape[2]), query, key, value, *unseen))
    lses.append(query.new_full((query.shape[1], rest), float("-inf"), dtype=accumulation_dtype(query.dtype)))
    return torch.cat(results), torch.cat(lses, 1) if call.semantics.return_lse else None
