"""Jagged nested tensors on a CPU, where torch runs them by eager attention: exact, silent, and never chosen by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from varlen_attn import BackendRefused, SeqLayout, explain, varlen_attention
from varlen_attn.kernels.cuda.nested import Nested
from varlen_attn.kernels.problem import Problem, Semantics
from varlen_attn.testing import assert_within_budget, reference_attention


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "dims"),
    [([5, 7, 1], None, (16, 16)), ([3, 0, 5, 2, 4], [4, 2, 0, 6, 1], (17, 9)), ([0, 0], None, (8, 8)), ([], None, (8, 8))],
    ids=["self", "cross, empty sequences, odd dimensions", "all empty", "no sequences"],
)
def test_matches_the_reference_forward_and_backward(lengths_q: Any, lengths_k: Any, dims: Any, dtype: torch.dtype) -> None:
    """R-12, R-32; warnings are errors here, and torch's own about prototypes must not reach the caller."""
    layouts = (SeqLayout.from_lengths(lengths_q), None if lengths_k is None else SeqLayout.from_lengths(lengths_k))
    tk = sum(lengths_q if lengths_k is None else lengths_k)
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths_q), 2, dims[0]), (tk, 2, dims[0]), (tk, 2, dims[1]))
    qkv = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    out = varlen_attention(*qkv, *layouts, scale=0.3, backend="nested")
    assert type(out) is torch.Tensor
    assert not out.is_nested
    ref, naive = (reference_attention(*qkv, *layouts, scale=0.3, dtype=d) for d in (torch.float64, dtype))
    assert_within_budget(out, ref, naive)
    grads, ref_grads, naive_grads = (torch.autograd.grad(x.sum(), qkv) for x in (out, ref, naive))
    for got, want, eager in zip(grads, ref_grads, naive_grads, strict=True):
        assert_within_budget(got, want.double(), eager, gradient=True)


def test_dropout_drops() -> None:
    x = torch.ones(6, 2, 8)
    out = varlen_attention(x, x, x, SeqLayout.from_lengths([6]), dropout_p=0.5, backend="nested")
    assert out.unique().numel() > 1
    assert out.mean().item() == pytest.approx(1.0, abs=0.6)


def test_is_not_chosen_by_itself_on_a_cpu() -> None:
    x = torch.zeros(3, 2, 8)
    plan = explain(x, x, x, SeqLayout.from_lengths([3]))
    (decision,) = (d for d in plan.decisions if d.backend == "nested")
    assert "never chosen by itself on a CPU" in str(decision)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (dict(num_heads=4, num_kv_heads=2), "as many key/value heads"),
        (dict(semantics=Semantics(causal="top_left")), "top-left"),
        (dict(semantics=Semantics(causal="bottom_right"), self_attention=False), "whichever kernel torch picks"),
        (dict(semantics=Semantics(window=(1, 1))), "window"),
        (dict(semantics=Semantics(softcap=1.0)), "softcap"),
        (dict(semantics=Semantics(alibi=True)), "ALiBi"),
        (dict(semantics=Semantics(sinks=True)), "sinks"),
        (dict(semantics=Semantics(score_bias=True)), "score bias"),
        (dict(semantics=Semantics(return_lse=True)), "log-sum-exp"),
        (dict(semantics=Semantics(deterministic=True), needs_grad=True), "deterministic"),
        (dict(semantics=Semantics(dropout_p=0.1)), "other attention weights in its backward"),
        (dict(host_lengths=False), "empty sequences"),
        (dict(tracing=True), "torch.compile"),
        (dict(head_dim=264), "256"),
        (dict(dtype=torch.float64), "float64"),
    ],
    ids=str,
)
def test_preconditions_are_refusals(fields: dict[str, Any], reason: str) -> None:
    machine = dict(device_type="cuda", capability=(8, 0), rocm=False, dtype=torch.float16)
    assert not Nested().refusals(Problem(**machine))
    assert not Nested().refusals(Problem(**machine, semantics=Semantics(causal="bottom_right")))
    assert reason in "; ".join(r.reason for r in Nested().refusals(Problem(**{**machine, **fields})))


def test_causal_on_a_cpu_is_refused_and_not_left_to_torch() -> None:
    x = torch.zeros(3, 2, 8)
    with pytest.raises(BackendRefused, match="no causal attention on a CPU"):
        varlen_attention(x, x, x, SeqLayout.from_lengths([3]), causal=True, backend="nested")
