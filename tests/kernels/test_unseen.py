"""Leaving out queries that see no key changes nothing but what the kernel gets to see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from varlen_attn import SeqLayout, varlen_attention
from varlen_attn.kernels.problem import Semantics
from varlen_attn.kernels.unseen import without_unseen
from varlen_attn.kernels.values import Call, Result


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [
        ([5, 3, 7], [2, 9, 7]),
        ([4, 0, 2, 0], [0, 3, 2, 0]),
        ([0, 3, 0], None),
        ([3, 2], [3, 4]),
        ([2, 3], [0, 0]),
    ],
)
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("queries", [False, True])
def test_results_and_gradients_stay(lengths_q: list[int], lengths_k: list[int] | None, return_lse: bool, queries: bool) -> None:
    layout = SeqLayout.from_lengths(lengths_q)
    layout_kv = layout if lengths_k is None else SeqLayout.from_lengths(lengths_k)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(n, 2, 8, generator=generator, requires_grad=True) for n in (sum(lengths_q), *[layout_kv.num_rows] * 2))

    def attend(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Result:
        layout_q, layout_kv = call.layouts
        assert layout_q.lengths is not None
        assert layout_kv.lengths is not None
        assert all(a > 0 and b > 0 and (a <= b or not queries) for a, b in zip(layout_q.lengths, layout_kv.lengths, strict=True))
        assert (layout_q is layout_kv) == (lengths_k is None)
        result = varlen_attention(query, key, value, layout_q, layout_kv, causal=True, return_lse=return_lse, backend="reference")
        return result if return_lse else (result, None)

    out, lse = without_unseen(query, key, value, Call(layout, layout_kv, Semantics(return_lse=return_lse)), attend, queries=queries)
    want, want_lse = varlen_attention(query, key, value, layout, layout_kv, causal=True, return_lse=True, backend="reference")
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse) if lse is not None else not return_lse
    if layout_kv.num_rows:
        for got, expected in zip(*(torch.autograd.grad(x.sum(), query, allow_unused=True) for x in (out, want)), strict=True):
            assert (got is None and expected is None) or torch.equal(got, expected)
