"""Packed sequences on ATen's CPU flash kernel, with a hand-written backward. The backend that every machine has.

Equal adjacent lengths share one kernel call, without a mask and without a copy; no padding at all is one dense call. Causal masks
and windows are cut to the rows and keys that see each other, so a window costs its width and not the length. What the kernel has no
argument for (softcap, dropout, sinks, score bias) is exact eager maths, a group of sequences at a time.

The kernel is private to torch (`aten::_scaled_dot_product_flash_attention_for_cpu`); known of it: empty sequences kill the
process with SIGFPE; its log-sum-exp of a row without keys is 0; it has no dropout and needs Hv == H; its half-precision backward
accumulates in half precision, which below 192 tokens is both slower and less exact than one in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import SeqLayout
from ..problem import Problem, Semantics
from ._maths import alibi_bias, attend, needs_maths, visible_mask
from .base import FLOATS, HALF, Backend, Capabilities, Extras, Refusal, connected_zeros, observe, pad_head_dim

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_WIDE_BACKWARD_BELOW = 192  # tokens: half-precision backward in float32 is 2 to 5 times faster below, measured with AMX
_WINDOW_ROWS = 256  # query rows of one call under a window: enough to fill the kernel's blocks, few enough to skip keys
_MATHS_SCORES = 1 << 24  # score elements of one eager call: 64 MB in float32


class Group(NamedTuple):
    """``size`` adjacent sequences of equal lengths, by their first packed rows."""

    q_start: int
    k_start: int
    size: int
    len_q: int
    len_k: int


class Tile(NamedTuple):
    """Rows ``r0..r1`` of a sequence and the keys ``k0..k1`` that they see."""

    r0: int
    r1: int
    k0: int
    k1: int


def _groups(cu_q: list[int], cu_k: list[int], single: bool) -> Iterator[Group]:
    """Sequences without queries are left out; ``single`` keeps every sequence apart."""
    run: Group | None = None
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
        len_q, len_k = q1 - q0, k1 - k0
        if len_q == 0:
            # Its keys, if any, lie between those of its neighbours: they must not share a call.
            if len_k and run is not None:
                yield run
                run = None
            continue
        if run is not None and not single and (len_q, len_k) == (run.len_q, run.len_k):
            run = run._replace(size=run.size + 1)
            continue
        if run is not None:
            yield run
        run = Group(q0, k0, 1, len_q, len_k)
    if run is not None:
        yield run


def _tiles(group: Group, semantics: Semantics) -> Iterator[Tile]:
    """The rows that see a key, cut for windows; every row of a tile sees at least one of its keys."""
    low, high = semantics.visible_range(group.len_k - group.len_q)
    first = 0 if high is None else max(0, -high)
    last = group.len_q if low is None else min(group.len_q, group.len_k - low)
    step = last - first if low is None else max(_WINDOW_ROWS, (high or 0) - low)
    for r0 in range(first, last, max(step, 1)):
        r1 = min(r0 + step, last)
        k0 = 0 if low is None else max(0, r0 + low)
        k1 = group.len_k if high is None else min(group.len_k, r1 + high)
        if k1 > k0:
            yield Tile(r0, r1, k0, k1)


def _tile_mask(tile: Tile, group: Group, semantics: Semantics, slopes: Tensor | None, dtype: torch.dtype) -> tuple[bool, Tensor | None]:
    """``(is_causal, additive mask or None)`` of one kernel call."""
    offset = group.len_k - group.len_q
    low, high = semantics.visible_range(offset)
    rows, keys = tile.r1 - tile.r0, tile.k1 - tile.k0
    shift = tile.r0 - tile.k0
    low_cuts = low is not None and rows - 1 + low + shift > 0
    high_cuts = high is not None and high + shift < keys - 1
    if slopes is None and not low_cuts and (not high_cuts or high == -shift):
        return high_cuts, None
    i = torch.arange(tile.r0, tile.r1)[:, None]
    j = torch.arange(tile.k0, tile.k1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bias = torch.zeros(rows, keys, dtype=wide) if slopes is None else alibi_bias(slopes.to(wide), i, j, offset)[None]
    visible = visible_mask(semantics, i, j, offset)
    return False, bias if visible is None else bias.masked_fill(~visible, float("-inf"))


def _rows(x: Tensor, start: int, group: Group, length: int, lo: int, hi: int) -> Tensor:
    """``(size, heads, hi - lo, dim)`` view of a group's rows ``lo..hi``, without a copy."""
    block = x[start : start + group.size * length].view(group.size, length, *x.shape[1:])
    return block[:, lo:hi].transpose(1, 2)


class _Call:
    """What forward and backward share: groups, their tiles and their masks."""

    def __init__(self, cu_q: Tensor, cu_k: Tensor, causal: str, window: list[int], slopes: Tensor | None, single: bool):
        left, right = (None if side < 0 else side for side in window)
        sides = None if left is None and right is None else (left, right)
        self.semantics = Semantics(causal=causal or False, window=sides)  # type: ignore[arg-type]
        self.slopes = slopes
        self.groups = list(_groups(cu_q.tolist(), cu_k.tolist(), single))

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[Group, Tile, bool, Tensor | None]]:
        for group in self.groups:
            if group.len_k == 0:
                continue
            for tile in _tiles(group, self.semantics):
                yield group, tile, *_tile_mask(tile, group, self.semantics, self.slopes, dtype)

    def is_one_dense_call(self, query: Tensor, key: Tensor) -> bool:
        """Whether one tile covers all rows: then the kernel's own output is the result, without a copy."""
        if len(self.groups) != 1 or not self.groups[0].len_k:
            return False
        group = self.groups[0]
        whole = Tile(0, group.len_q, 0, group.len_k)
        covers = (group.size * group.len_q, group.size * group.len_k) == (query.shape[0], key.shape[0])
        return covers and list(_tiles(group, self.semantics)) == [whole]


@torch.library.custom_op("varlen_attn::cpu_forward", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: str,
    window: list[int],
    slopes: Tensor | None,
    single: bool,
) -> tuple[Tensor, Tensor]:
    """``(T,N,H), (Tk,K,H), (Tk,K,H) -> (T,N,H)``, lse ``(N,T)``. Rows that see no key: 0 and -inf."""
    observe("cpu", query.shape[0])
    call = _Call(cu_q, cu_k, causal, window, slopes, single)
    dense = call.is_one_dense_call(query, key)
    out = query.new_empty(0) if dense else query.new_zeros(query.shape)
    lse = query.new_full((query.shape[1], query.shape[0]), float("-inf"), dtype=_lse_dtype(query))
    for group, tile, is_causal, mask in call.tiles(query.dtype):
        q = _rows(query, group.q_start, group, group.len_q, tile.r0, tile.r1)
        k, v = (_rows(x, group.k_start, group, group.len_k, tile.k0, tile.k1) for x in (key, value))
        result, result_lse = _flash(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
        if dense:
            out = result.transpose(1, 2).reshape(query.shape)
        else:
            _rows(out, group.q_start, group, group.len_q, tile.r0, tile.r1).copy_(result)
        _lse_rows(lse, group, tile).copy_(result_lse)
    return out.contiguous(), lse


@_forward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, causal: str, window: list[int],
    slopes: Tensor | None, single: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=_lse_dtype(query))
    return query.new_empty(query.shape), lse


@torch.library.custom_op("varlen_attn::cpu_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: str,
    window: list[int],
    slopes: Tensor | None,
    single: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; exactly 0 where nothing is seen."""
    call = _Call(cu_q, cu_k, causal, window, slopes, single)
    half = query.dtype in HALF
    # Under a window a key's gradient is a sum over tiles: half precision would round at every one.
    kv_dtype = torch.float32 if half and call.semantics.window is not None else key.dtype
    grads = query.new_zeros(query.shape), key.new_zeros(key.shape, dtype=kv_dtype), value.new_zeros(value.shape, dtype=kv_dtype)
    dense = call.is_one_dense_call(query, key)
    for group, tile, is_causal, mask in call.tiles(query.dtype):
        g, q, o = (_rows(x, group.q_start, group, group.len_q, tile.r0, tile.r1) for x in (grad, query, out))
        k, v = (_rows(x, group.k_start, group, group.len_k, tile.k0, tile.k1) for x in (key, value))
        if half and (group.len_q < _WIDE_BACKWARD_BELOW or kv_dtype == torch.float32):
            g, q, k, v, o = (x.float() for x in (g, q, k, v, o))
        parts = _flash_backward(g, q, k, v, o, _lse_rows(lse, group, tile), 0.0, is_causal, attn_mask=mask, scale=scale)
        if dense:
            dq, dk, dv = (p.transpose(1, 2).reshape(x.shape).to(x.dtype) for p, x in zip(parts, (query, key, value), strict=True))
            return dq.contiguous(), dk.contiguous(), dv.contiguous()
        _rows(grads[0], group.q_start, group, group.len_q, tile.r0, tile.r1).copy_(parts[0])
        for total, part in zip(grads[1:], parts[1:], strict=True):
            _rows(total, group.k_start, group, group.len_k, tile.k0, tile.k1).add_(part)
    return grads[0], grads[1].to(key.dtype), grads[2].to(value.dtype)


@_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    scale: float, causal: str, window: list[int], slopes: Tensor | None, single: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_q, cu_k, *ctx.options, slopes, ctx.single = inputs
    out, lse = output
    # Without this the log-sum-exp would look differentiable and its gradient be dropped without a word.
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, out, lse, cu_q, cu_k, slopes)


def _autograd(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, slopes = ctx.saved_tensors
    grads = _backward(grad.contiguous(), *saved, *ctx.options, slopes, ctx.single)
    return (*grads, *[None] * 7)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _lse_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _lse_rows(lse_NT: Tensor, group: Group, tile: Tile) -> Tensor:
    """``(size, N, rows)`` view of ``lse (N,T)``."""
    block = lse_NT[:, group.q_start : group.q_start + group.size * group.len_q].view(-1, group.size, group.len_q)
    return block[..., tile.r0 : tile.r1].transpose(0, 1)


class Cpu(Backend):
    """ATen's CPU flash kernel over packed sequences."""

    name = "cpu"
    own_op = True
    capabilities = Capabilities(devices=frozenset({"cpu"}), dtypes=FLOATS, batch_invariant=True)

    def missing(self, problem: Problem) -> str | None:
        if hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
            return None
        return "this torch has no aten::_scaled_dot_product_flash_attention_for_cpu"

    def extra_refusals(self, problem: Problem) -> Iterable[Refusal]:
        if problem.tracing and needs_maths(problem.semantics):
            yield Refusal(
                "does softcap, dropout, sinks and score biases one sequence at a time, by offsets that tracing can not read",
                "call it outside the compiled function",
            )

    def kernel(self, problem: Problem) -> str:
        if needs_maths(problem.semantics):
            return "eager matmul, softmax, matmul for each group of equal lengths"
        return "aten::_scaled_dot_product_flash_attention_for_cpu"

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout_q: SeqLayout,
        layout_kv: SeqLayout,
        semantics: Semantics,
        extras: Extras,
    ) -> tuple[Tensor, Tensor | None]:
        if needs_maths(semantics):
            return _run_maths(query, key, value, layout_q, layout_kv, semantics, extras)
        value_dim = value.shape[-1]
        query, key, value = pad_head_dim(1, query, key, value)
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        window = [-1 if side is None else side for side in semantics.window or (None, None)]
        out, lse = _forward(
            query, key, value, layout_q.cu_seqlens, layout_kv.cu_seqlens, semantics.factor, semantics.causal or "", window,
            extras.alibi_slopes, semantics.batch_invariant,
        )  # fmt: skip
        return out[..., :value_dim], lse if semantics.return_lse else None


def _run_maths(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout_q: SeqLayout,
    layout_kv: SeqLayout,
    semantics: Semantics,
    extras: Extras,
) -> tuple[Tensor, Tensor | None]:
    """Exact eager attention, a group of equal lengths at a time; autograd does the backward."""
    blocks: list[Tensor] = []
    lse = query.new_full((query.shape[1], query.shape[0]), float("-inf"), dtype=_lse_dtype(query))
    done = 0
    for group in _chunks(layout_q, layout_kv, semantics.batch_invariant, query.shape[1]):
        q = _rows(query, group.q_start, group, group.len_q, 0, group.len_q)
        k, v = (_rows(x, group.k_start, group, group.len_k, 0, group.len_k) for x in (key, value))
        out, out_lse = attend(q, k, v, semantics, extras, offset=group.len_k - group.len_q)
        blocks.append(out.transpose(1, 2).flatten(0, 1))
        _lse_rows(lse, group, Tile(0, group.len_q, 0, 0)).copy_(out_lse)
        done = group.q_start + group.size * group.len_q
    blocks.append(connected_zeros((query.shape[0] - done, query.shape[1], value.shape[2]), query, key, value))
    return torch.cat(blocks), lse if semantics.return_lse else None


def _chunks(layout_q: SeqLayout, layout_kv: SeqLayout, single: bool, num_heads: int) -> Iterator[Group]:
    """Groups, cut so that the scores of one fit into memory."""
    for group in _groups(layout_q.cu_seqlens.tolist(), layout_kv.cu_seqlens.tolist(), single):
        step = max(1, _MATHS_SCORES // max(1, num_heads * group.len_q * group.len_k))
        for first in range(0, group.size, step):
            yield Group(
                group.q_start + first * group.len_q,
                group.k_start + first * group.len_k,
                min(step, group.size - first),
                group.len_q,
                group.len_k,
            )
