"""The memory-efficient (CUTLASS) kernel with ``cu_seqlens``: the packed path for float32, and for GPUs before sm80 (T4, V100).

`F.scaled_dot_product_attention` calls it for padded or nested tensors only; `aten::_efficient_attention_forward` takes packed ones.
Read in torch's source and headers (2.13), run with torch 2.11 on an H200, and in the tests against a CPU stand-in:

- Autograd comes with the op. Its meta function for the backward lacks the parameter ``out``, so that it cannot be traced.
- Both causal alignments: mask type 1 is top-left, 2 is bottom-right. With more queries than keys, bottom-right is wrong: the kernel
  compares an unsigned ``query_start + offset`` and masks nothing (xformers refuses such blocks). Those first queries see no key
  at all, so they are left out of the call here.
- No grouped heads in backward: key/value heads are repeated. Rows are read in steps of 16 bytes, or by a slower kernel.
- Dropout is refused: with ``cu_seqlens`` the forward computes offsets of the random numbers from 0 keys (``attention.cu``,
  pytorch#115590), so that all heads and sequences drop the same weights, and the backward from ``max_seqlen_k``, so that it drops others.
- The log-sum-exp is padded: ``(Q, N, max_q rounded up to 32)``.
- The backward multiplies row numbers and strides in 32 bits, so that large calls are split over heads.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ...layout.seq_layout import SeqLayout
from ..base import HALF, Backend, Capabilities, Refusal, contiguous_grad, pad_head_dim, repeat_kv, scale_refusals
from ..limits import MAX_SEQUENCES, in_heads
from ..problem import Problem
from ..unseen import without_unseen
from ..values import Call, Result
from .fit import aligned

_MASK_TYPE = {False: 0, "top_left": 1, "bottom_right": 2}
_MAX_ELEMENTS = 2**31 - 1  # of one tensor in one call


class MemEfficient(Backend):
    """`aten::_efficient_attention_forward` on packed tensors."""

    name = "mem_efficient"
    capabilities = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=HALF | {torch.float32},
        min_capability=(5, 0),
        min_torch=(2, 11),
        rocm=False,
        max_sequences=MAX_SEQUENCES,
        window=False,
        softcap=False,
        dropout=False,
        alibi=False,
        score_bias=False,
        sinks=False,
        deterministic=False,
        tracing=False,
        empty_sequences=False,
        slack_rows=False,
    )

    def extra_refusals(self, problem: Problem) -> Iterable[Refusal]:
        yield from scale_refusals(problem)
        if problem.dtype == torch.bfloat16 and (problem.capability or (0, 0)) < (8, 0) and problem.machine == "cuda":
            yield Refusal("needs compute capability 8.0 or newer for bfloat16", "use float16", "machine")
        if problem.semantics.dropout_p:
            yield Refusal("drops other attention weights in its backward than in its forward", "use another backend")

    def kernel(self, problem: Problem) -> str:
        return "aten::_efficient_attention_forward with cu_seqlens (fmha_cutlassF)"

    def seen_as(self, problem: Problem) -> str:
        return "fmha_cutlassF"

    def run(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
        value_dim = value.shape[-1]
        key, value = repeat_kv(query.shape[1], key, value)
        multiple = 8 if query.dtype in HALF else 4
        query, key = pad_head_dim(multiple, query, key)
        (value,) = pad_head_dim(multiple, value)
        out, lse = without_unseen(query, key, value, call, _attend, queries=call.semantics.causal == "bottom_right")
        return out[..., :value_dim], lse if call.semantics.return_lse else None


def _attend(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
    """``out (T,N,Hv)``, lse ``(N,T)``; every query sees a key."""
    heads = query.shape[1]
    if heads > 1 and max(x.numel() for x in (query, key, value)) > _MAX_ELEMENTS:
        return in_heads(query, key, value, call, heads // 2, _attend)
    out, lse, *_ = torch.ops.aten._efficient_attention_forward(
        *(aligned(x.contiguous())[None] for x in (query, key, value)),
        None,
        *(layout.cu_seqlens for layout in call.layouts),
        *(max(_lengths(layout)) for layout in call.layouts),
        0.0,
        _MASK_TYPE[call.semantics.causal],
        True,  # the log-sum-exp, which the backward needs
        scale=call.semantics.scale,
    )
    out = contiguous_grad(out[0])
    if not call.semantics.return_lse:
        return out, None
    return out, lse.detach()[call.layout_q.seq_ids, :, call.layout_q.positions].transpose(0, 1)


def _lengths(layout: SeqLayout) -> tuple[int, ...]:
    assert layout.lengths is not None, "refused where only the device knows them: an empty sequence could hide"
    return layout.lengths
