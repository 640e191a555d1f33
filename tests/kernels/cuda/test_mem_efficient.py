"""The adapter of the memory-efficient kernel, on a stand-in with the kernel's conventions; on meta tensors; and its refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from varlen_attn import SeqLayout, varlen_attention
from varlen_attn.attention.dispatch import choose
from varlen_attn.kernels.cuda import mem_efficient
from varlen_attn.kernels.cuda.mem_efficient import MemEfficient
from varlen_attn.kernels.problem import Problem, Semantics
from varlen_attn.kernels.values import Extras
from varlen_attn.testing import assert_within_budget, reference_attention

from ..fake_kernels import efficient_backward, efficient_forward, for_cpu, on_cpu

HERE = for_cpu(MemEfficient)


@pytest.fixture
def kernel() -> Iterator[None]:
    with on_cpu(_efficient_attention_forward=efficient_forward, _efficient_attention_backward=efficient_backward):
        yield


def tensors(lengths_q: list[int], lengths_k: list[int], heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths_q), heads[0], dims[0]), (sum(lengths_k), heads[1], dims[0]), (sum(lengths_k), heads[1], dims[1]))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


CASES: dict[str, tuple[list[int], list[int] | None, tuple[int, int], tuple[int, int], dict[str, Any]]] = {
    "self": ([5, 7, 1], None, (2, 2), (16, 16), {}),
    "grouped heads, odd dimensions": ([5, 7, 1], None, (4, 2), (17, 9), dict(causal=True)),
    "empty sequences": ([5, 0, 4, 3], [2, 4, 0, 6], (2, 1), (8, 8), dict(scale=0.4)),
    "bottom-right": ([5, 3, 7], [2, 9, 7], (2, 2), (8, 8), dict(causal=True)),
    "bottom-right, enough keys": ([5, 3], [6, 3], (2, 2), (8, 8), dict(causal=True)),
    "bottom-right, empty sequences": ([5, 0, 4], [2, 9, 0], (2, 2), (8, 8), dict(causal=True)),
    "top-left": ([5, 3, 7], [2, 9, 7], (2, 2), (8, 8), dict(causal="top_left")),
}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference_forward_and_backward(case: str, dtype: torch.dtype) -> None:
    lengths_q, lengths_k, heads, dims, options = CASES[case]
    layouts = (SeqLayout.from_lengths(lengths_q), None if lengths_k is None else SeqLayout.from_lengths(lengths_k))
    qkv = tensors(lengths_q, lengths_k or lengths_q, heads, dims, dtype)
    out, lse = varlen_attention(*qkv, *layouts, backend=HERE, return_lse=True, **options)
    ref, ref_lse = reference_attention(*qkv, *layouts, return_lse=True, **options)
    naive = reference_attention(*qkv, *layouts, dtype=dtype, **options)
    assert_within_budget(out, ref, naive)
    torch.testing.assert_close(lse.double(), ref_lse, atol=1e-6, rtol=1e-6)
    grads, ref_grads, naive_grads = (torch.autograd.grad(x.sum(), qkv) for x in (out, ref, naive))  # a broadcast gradient
    for got, want, eager in zip(grads, ref_grads, naive_grads, strict=True):
        assert_within_budget(got, want.double(), eager, gradient=True)


@pytest.mark.usefixtures("kernel")
def test_large_calls_are_split_over_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's backward multiplies rows and strides in 32 bits."""
    layout = SeqLayout.from_lengths([5, 3])
    qkv = tensors([5, 3], [5, 3], (5, 5), (8, 8), torch.float32)
    want = varlen_attention(*qkv, layout, backend=HERE, return_lse=True)
    monkeypatch.setattr(mem_efficient, "_MAX_ELEMENTS", 8 * 2 * 8)
    got = varlen_attention(*qkv, layout, backend=HERE, return_lse=True)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.usefixtures("kernel")
def test_dropout_is_refused_because_the_backward_drops_other_weights() -> None:
    problem = Problem(device_type="cuda", capability=(9, 0), rocm=False, semantics=Semantics(scale=0.3, dropout_p=0.5), needs_grad=True)
    assert "other attention weights in its backward" in "; ".join(r.reason for r in MemEfficient().refusals(problem))
    plan = choose(problem)
    assert (plan.backend, plan.kernel) == ("sdpa_padded", "aten::_scaled_dot_product_efficient_attention with a mask")
    q, k, v = (x[None].detach().requires_grad_() for x in tensors([6, 5], [6, 5], (2, 2), (8, 8), torch.float32))
    cu = SeqLayout.from_lengths([6, 5]).cu_seqlens
    out, *_ = torch.ops.aten._efficient_attention_forward(q, k, v, None, cu, cu, 6, 6, 0.5, 0, True, scale=0.3)
    (dv,) = torch.autograd.grad(out, v, out.detach())
    assert float(((dv * v).sum() / out.square().sum() - 1).detach().abs()) > 0.05, (
        "the kernel's own rule: the output is linear in the values, and this is not"
    )


def test_meta_tensors_give_shapes() -> None:
    layout = SeqLayout.from_lengths([5, 40])
    query, key, value = (torch.empty(45, n, h, device="meta") for n, h in ((4, 17), (2, 17), (2, 9)))
    semantics = Semantics(causal="bottom_right", scale=0.1, return_lse=True)
    out, lse = MemEfficient().run(query, key, value, layout.to("meta"), layout.to("meta"), semantics, Extras())
    assert out.shape == (45, 4, 9)
    assert lse is not None
    assert lse.shape == (4, 45)


def test_tracing_is_refused_while_torch_can_not_trace_the_backward() -> None:
    """If this fails, torch's meta function has got its missing parameter, and `tracing=False` may go where that torch is needed."""
    q, k, v = (torch.empty(1, 8, 2, 8, device="meta", requires_grad=True) for _ in range(3))
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    out, *_ = torch.ops.aten._efficient_attention_forward(q, k, v, None, cu, cu, 5, 5, 0.0, 0, True, scale=0.1)
    with pytest.raises(TypeError, match="multiple values for argument 'scale'"):
        out.sum().backward()


def test_bfloat16_needs_sm80() -> None:
    def refusals(capability: tuple[int, int], dtype: torch.dtype) -> tuple[Any, ...]:
        return MemEfficient().refusals(Problem(device_type="cuda", capability=capability, rocm=False, dtype=dtype))

    assert not refusals((7, 5), torch.float16)
    assert not refusals((8, 0), torch.bfloat16)
    assert "8.0" in str(refusals((7, 5), torch.bfloat16))
