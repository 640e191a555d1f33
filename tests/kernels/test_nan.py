"""A NaN in a query or key stays one, however short its sequence is, and reaches nobody who does not see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from varlen_attn import SeqLayout, varlen_attention
from varlen_attn.kernels.cpu import build as _native

pytestmark = pytest.mark.native_too
LENGTHS = [*range(1, 10), 15, 16, 17, 20]
LAYOUT = SeqLayout.from_lengths(LENGTHS)
BACKENDS = ("cpu", "cpu_native", "sdpa_padded", "reference", "nested")


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (1, 0)}, {"batch_invariant": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["query", "key", "one row of it"])
def test_nan_stays(where: str, backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    if backend == "cpu_native" and (_native.why_not() or dtype == torch.float64):
        pytest.skip("does not run here")
    if (backend == "nested" and options) or (backend == "sdpa_padded" and "batch_invariant" in options):
        pytest.skip("does not support it")
    heads = 2 if backend == "nested" else 1
    query, key, value, grad = (torch.randn(LAYOUT.num_rows, n, 16).to(dtype) for n in (2, heads, heads, 2))
    sick = torch.zeros(LAYOUT.num_rows, dtype=torch.bool)
    for number in (0, 2, 5, 7, 9, 11):  # of 1, 3, 6, 8, 15 and 17 tokens
        start, end = LAYOUT.cu_seqlens[number : number + 2].tolist()
        sick[start : start + 1 if where == "one row of it" else end] = True
    (key if where == "key" else query)[sick] = float("nan")
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out, lse = varlen_attention(*leaves, LAYOUT, backend=backend, **options, **({} if backend == "nested" else {"return_lse": True})), None
    if isinstance(out, tuple):
        out, lse = out
        assert torch.equal(lse.isnan(), sick.expand(2, -1))
    assert torch.equal(out.isnan(), sick[:, None, None].expand_as(out))
    gradients = torch.autograd.grad(out, leaves, grad)
    ids = LAYOUT.seq_ids
    same_sequence = (ids[:, None] == ids[sick]).any(1)
    for x in gradients:
        assert not x[~same_sequence].isnan().any()
    assert gradients[0][sick].isnan().all()
    assert gradients[1][sick].isnan().all()


def test_scores_of_zero_are_not_taken_for_it() -> None:
    """A single key with a score of 0 has the log-sum-exp by which a lost NaN is known."""
    query, value = torch.zeros(3, 1, 16), torch.randn(3, 1, 16)
    layout = SeqLayout.from_lengths([1, 2])
    out, lse = varlen_attention(query, query, value, layout, backend="cpu", return_lse=True)
    torch.testing.assert_close(out, torch.cat([value[:1], value[1:].mean(0, keepdim=True).expand(2, -1, -1)]))
    torch.testing.assert_close(lse[0], torch.tensor([0.0, 2.0, 2.0]).log1p().clamp(max=0.0) + torch.tensor([0.0, 0.6931472, 0.6931472]))


HIDING: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "causal window": {"causal": True, "window": (3, 0)},
    "causal ALiBi": {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.25])},
    "causal softcap": {"causal": True, "softcap": 5.0},
    "causal, more keys than queries": {"causal": True},
}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("what", HIDING)
@pytest.mark.parametrize("backend", ["cpu", "cpu_native", "sdpa_padded"])
def test_a_key_that_a_query_does_not_see_never_changes_its_row(backend: str, what: str, number: float) -> None:
    if backend == "cpu_native" and _native.why_not():
        pytest.skip("does not run here")
    options, layout = HIDING[what], SeqLayout.from_lengths([1, 5, 20, 300])
    layout_q = SeqLayout.from_lengths([1, 3, 19, 250]) if "more keys" in what else layout
    query, key, value = (torch.randn(x.num_rows, 2, 16) for x in (layout_q, layout, layout))
    sick = key.clone()
    sick[[0, 4, 17, 180]] = number
    before, out, right = (
        varlen_attention(query, k, value, layout_q, layout, backend=name, return_lse=True, **options)
        for k, name in ((key, backend), (sick, backend), (sick, "reference"))
    )
    assert torch.equal(out[0].isnan(), right[0].isnan())
    unseen = ~(varlen_attention(query, key, value, layout_q, layout, backend="reference", **options) != right[0]).any(-1).any(-1)
    assert 20 < unseen.sum() < layout_q.num_rows
    torch.testing.assert_close(out[0][unseen], before[0][unseen])
    torch.testing.assert_close(out[1][:, unseen], before[1][:, unseen])


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (0, 0)}, {"causal": True, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_no_key_gives_zero_beside_nan(backend: str, where: str, options: dict[str, Any]) -> None:
    """Output and gradient, whatever it holds itself, and what the keys and values of its sequence hold."""
    if (backend == "cpu_native" and _native.why_not()) or (backend == "nested" and options):
        pytest.skip("does not run here")
    layout, keys = SeqLayout.from_lengths([3, 5, 4]), SeqLayout.from_lengths([0, 2, 4])
    query, key, value, grad = (torch.randn(n, 2, 16) for n in (12, 6, 6, 12))
    {"query": query, "key": key, "value": value}[where][:] = float("nan")
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = varlen_attention(*leaves, layout, keys, backend=backend, **options)
    blind = torch.arange(12) < (6 if options else 3)
    gradients = torch.autograd.grad(out, leaves, grad)
    assert torch.equal(out.isnan().any(-1).any(-1), ~blind)
    assert not out[blind].any()
    assert not gradients[0][blind].any()
