"""Jagged nested tensors and `F.scaled_dot_product_attention`, which picks flash, memory-efficient or eager attention for them.

Read in torch's ``nested/_internal/sdpa.py`` (2.11 to 2.13); run with torch 2.11 on an H200, and in the tests on a CPU:

- No masks, no grouped heads, no empty sequences; causal needs a fused kernel, so there is none on a CPU ("No viable backend").
- Causal of unequal lengths is bottom-right on flash and top-left on the memory-efficient kernel, whichever is picked: refused.
- On a GPU dropout is refused: torch may pick the memory-efficient kernel, whose backward drops other weights (see `mem_efficient`).
- The fused kernels want one head dimension, a multiple of 8; they get zero columns and the scale of the true one.
- It reads the shortest and longest length from the device unless told: they are host facts here, and are passed.
- Nested tensors do not survive recomputation by ``checkpoint(use_reentrant=False)``: request another backend there.
- The eager path (CPU) copies every sequence and is several times slower than `cpu`, so it is never chosen there by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layout.seq_layout import SeqLayout
from ..base import FLOATS, Backend, Capabilities, Refusal
from ..limits import MAX_GRADIENT, MAX_SEQUENCES
from ..problem import Problem
from ..values import Call, Result
from .fit import aligned, fitted


class Nested(Backend):
    """`F.scaled_dot_product_attention` on jagged nested tensors, from packed rows and back without a copy."""

    name = "nested"
    capabilities = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=FLOATS,
        min_capability=(5, 0),
        rocm=False,
        torch_flash=True,
        max_head_dim=256,
        max_sequences=MAX_SEQUENCES,
        max_gradient=MAX_GRADIENT,
        gqa=False,
        causal_top_left=False,
        window=False,
        softcap=False,
        alibi=False,
        score_bias=False,
        sinks=False,
        return_lse=False,
        deterministic=False,
        tracing=False,  # the eager path cannot be traced, and lengths are unknown then
        empty_sequences=False,
        slack_rows=False,
    )

    def extra_refusals(self, problem: Problem) -> Iterable[Refusal]:
        on_cpu = problem.device_type == "cpu"
        if on_cpu and problem.requested != self.name:
            yield Refusal("is never chosen by itself on a CPU: it is slower than `cpu` there", f"request it with backend={self.name!r}")
        if not on_cpu and problem.dtype == torch.float64:
            yield Refusal("has no fused kernel for float64 on a GPU", "convert the tensors to float32")
        if not on_cpu and problem.dtype == torch.bfloat16 and (problem.capability or (8, 0)) < (8, 0):
            yield Refusal("has no fused kernel for bfloat16 on GPUs before compute capability 8.0", "use float16", "machine")
        if problem.semantics.dropout_p and not on_cpu:
            yield Refusal(
                "may run the memory-efficient kernel, which drops other attention weights in its backward than in its forward",
                "use another backend",
            )
        if problem.semantics.causal and on_cpu:
            yield Refusal("has no causal attention on a CPU", "use another backend")
        if problem.semantics.causal == "bottom_right" and not on_cpu and not problem.self_attention:
            yield Refusal(
                "aligns causal attention of unequal lengths by whichever kernel torch picks", "use one layout for queries and keys"
            )

    def kernel(self, problem: Problem) -> str:
        if problem.device_type == "cpu":
            return "F.scaled_dot_product_attention on jagged tensors (eager matmul, softmax, matmul)"
        return "F.scaled_dot_product_attention on jagged tensors (torch picks flash or memory-efficient)"

    def seen_as(self, problem: Problem) -> str:
        return "softmax|_math" if problem.device_type == "cpu" else "flash_fwd_(kernel|splitkv)|fmha_cutlassF"

    @fitted(align=True)
    def run(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
        (q,) = _jagged(call.layout_q, query)
        k, v = _jagged(call.layout_kv, key, value)
        with warnings.catch_warnings():
            # The eager path makes nested tensors of the older kind, which announce themselves as a prototype.
            warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors", category=UserWarning)
            out = F.scaled_dot_product_attention(
                q, k, v, dropout_p=call.semantics.dropout_p, is_causal=bool(call.semantics.causal), scale=call.semantics.scale
            )
        return out.transpose(1, 2).values(), None


def _jagged(layout: SeqLayout, *tensors_TNH: Tensor) -> list[Tensor]:
    """``(T, N, H) -> (Q, N, j, H)`` each, sharing one offsets tensor, with the bounds that would else be read back. torch has no kernel for
    rows that are parts of something wider, such as a fused projection; and it marks what it is given, so that it gets views."""
    assert layout.lengths is not None  # refused otherwise: an empty sequence could hide
    offsets = layout.cu_seqlens.to(torch.int64)
    low, high = min(layout.lengths), max(layout.lengths)
    rows = [aligned(x.view_as(x).contiguous()) for x in tensors_TNH]
    return [torch.nested.nested_tensor_from_jagged(x, offsets=offsets, min_seqlen=low, max_seqlen=high).transpose(1, 2) for x in rows]
