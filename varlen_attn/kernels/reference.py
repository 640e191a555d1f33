"""The specification: one sequence at a time, eager, any float dtype. In float64 it is the truth that tests compare with."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .base import FLOATS, Backend, Capabilities, accumulation_dtype, zeros_with_grad
from .problem import Problem, Semantics
from .values import Call, Extras, Result


class Reference(Backend):
    """Dull on purpose: the shortest code that says what attention on packed sequences is."""

    name = "reference"
    capabilities = Capabilities(
        devices=frozenset({"cpu", "cuda", "mps", "xpu"}),
        dtypes=FLOATS,
        tracing=False,
        batch_invariant=True,
        transforms=True,
        explicit_only="it is the specification, and slow",
    )

    def kernel(self, problem: Problem) -> str:
        return "eager matmul, softmax, matmul for each sequence"

    def run(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
        out = zeros_with_grad((query.shape[0], query.shape[1], value.shape[2]), query, key, value, *call.extras.tensors)
        lse_dtype = accumulation_dtype(query.dtype)
        lse = query.new_full((query.shape[1], query.shape[0]), float("-inf"), dtype=lse_dtype)
        pairs_q, pairs_k = (itertools.pairwise(layout.cu_seqlens.tolist()) for layout in call.layouts)
        for (q0, q1), (k0, k1) in zip(pairs_q, pairs_k, strict=True):
            if q1 > q0 and k1 > k0:
                rows, out_rows, lse_rows = _one(query[q0:q1], key[k0:k1], value[k0:k1], call.semantics, call.extras)
                out = out.index_put((rows + q0,), out_rows)
                lse[:, rows + q0] = lse_rows.to(lse_dtype)
        return out, lse if call.semantics.return_lse else None


def _one(q: Tensor, k: Tensor, v: Tensor, semantics: Semantics, extras: Extras) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence, and only its query rows that see a key: their indices, outputs ``(R,N,Hv)`` and lse ``(N,R)``."""
    len_q, num_heads = q.shape[:2]
    len_k, num_kv_heads = k.shape[:2]
    i = torch.arange(len_q, device=q.device)[:, None]
    j = torch.arange(len_k, device=q.device)[None, :]
    aligned = i if semantics.causal == "top_left" else i + len_k - len_q
    visible = torch.ones(len_q, len_k, dtype=torch.bool, device=q.device)
    if semantics.causal:
        visible &= j <= aligned
    if semantics.window is not None:
        left, right = semantics.window
        if left is not None:
            visible &= j >= aligned - left
        if right is not None:
            visible &= j <= aligned + right

    rows = visible.any(1).nonzero().squeeze(1)
    group = num_heads // num_kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("inh,jnh->nij", q[rows], k) * semantics.factor
    if semantics.softcap is not None:
        scores = semantics.softcap * torch.tanh(scores / semantics.softcap)
    if extras.alibi_slopes is not None:
        distance = (i + len_k - len_q - j).abs()[rows]
        scores = scores - extras.alibi_slopes[:, None, None].to(q.dtype) * distance
    if extras.score_bias is not None:
        if isinstance(extras.score_bias, Tensor):
            bias = extras.score_bias[:, :len_q, :len_k]
        else:
            heads = torch.arange(num_heads, device=q.device)[:, None, None]
            bias = extras.score_bias(heads, i[None], j[None]).expand(num_heads, len_q, len_k)
        scores = scores + bias[:, rows].to(q.dtype)
    scores = scores.masked_fill(~visible[rows], float("-inf"))
    lse = scores.detach().logsumexp(-1)
    if extras.sinks is not None:
        column = extras.sinks.to(q.dtype)[:, None, None].expand(num_heads, len(rows), 1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = torch.nn.functional.dropout(weights, semantics.dropout_p)
    return rows, torch.einsum("nij,jnh->inh", weights, v), lse
