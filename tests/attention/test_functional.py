"""The calls against formulas written here: the package's own reference is one of the things that are tested."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from varlen_attn import (
    ArgumentError,
    BackendRefused,
    DtypeError,
    LayoutError,
    LayoutWarning,
    SeqLayout,
    padded_attention,
    record,
    use_backend,
    varlen_attention,
    varlen_mha,
)
from varlen_attn.testing import poison
from varlen_attn.testing.strategies import AttentionCase, Batch, attention_cases, batches, masks

CPU_BACKENDS = ("cpu", "sdpa_padded", "reference")
dynamo_warns = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch about itself
on_each = pytest.mark.parametrize("backend", CPU_BACKENDS)


# -------------------------------------------------------------------- the formulas


def sees(i: int, j: int, len_q: int, len_k: int, causal: Any, window: Any) -> bool:
    """Whether query i sees key j, one pair at a time."""
    aligned = i if causal == "top_left" else i + len_k - len_q
    left, right = window or (None, None)
    if causal and j > aligned:
        return False
    if left is not None and j < aligned - left:
        return False
    return right is None or j <= aligned + right


def dull_head(
    q: Tensor, k: Tensor, v: Tensor, head: int, causal: Any, window: Any, scale: float | None, softcap: float | None,
    slopes: Tensor | None, bias: Any, sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One head of one sequence: ``(Lq,H), (Lk,H), (Lk,Hv) -> (Lq,Hv), (Lq,)``, by exponentials."""
    len_q, len_k = len(q), len(k)
    outs, lses = [], []
    for i in range(len_q):
        js = [j for j in range(len_k) if sees(i, j, len_q, len_k, causal, window)]
        if not js:
            outs.append(0.0 * v.sum(0))
            lses.append(q.new_tensor(-math.inf))
            continue
        scores = (k[js] * q[i]).sum(-1) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            scores = scores - slopes[head].double() * torch.tensor([abs(i + len_k - len_q - j) for j in js], dtype=torch.float64)
        if isinstance(bias, Tensor):
            scores = scores + bias[head, i, js].double()
        elif bias is not None:
            scores = scores + torch.stack([bias(torch.tensor(head), torch.tensor(i), torch.tensor(j)) for j in js]).double()
        top = float(scores.detach().max())
        powers = torch.exp(scores - top)
        total = powers.sum()
        lses.append(total.log() + top)
        if sinks is not None:
            total = total + torch.exp(sinks[head].double() - top)
        outs.append((powers[:, None] * v[js]).sum(0) / total)
    return torch.stack(outs), torch.stack(lses).detach()


def dull(
    q: Tensor, k: Tensor, v: Tensor, cu_q: list[int], cu_k: list[int], *, causal: Any = False, window: Any = None,
    scale: float | None = None, softcap: float | None = None, alibi_slopes: Tensor | None = None, score_bias: Any = None,
    sinks: Tensor | None = None, **ignored: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention in float64 with three loops: over sequences, heads and queries."""
    assert set(ignored) <= {"batch_invariant", "deterministic"}
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    rows, lses = [q.new_zeros(0, heads, v.shape[2]) + 0 * (q.sum() + k.sum() + v.sum())], [q.new_zeros(heads, 0)]
    for s in range(len(cu_q) - 1):
        a, b, c, d = cu_q[s], cu_q[s + 1], cu_k[s], cu_k[s + 1]
        if a == b:
            continue
        parts = [
            dull_head(q[a:b, n], k[c:d, n // group], v[c:d, n // group], n, causal, window, scale, softcap, alibi_slopes, score_bias, sinks)
            for n in range(heads)
        ]
        rows.append(torch.stack([p[0] for p in parts], 1))
        lses.append(torch.stack([p[1] for p in parts], 0))
    slack = q.shape[0] - cu_q[-1]
    rows.append(q.new_zeros(slack, heads, v.shape[2]))
    lses.append(q.new_full((heads, slack), -math.inf))
    return torch.cat(rows), torch.cat(lses, 1)


def assert_close64(got: Tensor, want: Tensor, what: str = "result") -> None:
    assert got.shape == want.shape, what
    assert got.dtype == torch.float64, what
    assert torch.equal(got.isfinite(), want.isfinite()), what
    error = (got - want).detach()[want.isfinite()].abs()
    assert not len(error) or float(error.max()) < 1e-10, f"{what}: {float(error.max()):.3g}"


def test_the_comparison_can_fail() -> None:
    x = torch.zeros(3, dtype=torch.float64)
    for other in (x + 1e-9, x.float(), x[:2], x.clone().fill_(math.nan), x.clone().fill_(math.inf)):
        with pytest.raises(AssertionError):
            assert_close64(other, x)


def test_the_formula_is_torchs_on_what_torch_has() -> None:
    """The oracle itself, against `F.scaled_dot_product_attention`: plain, causal of both alignments, grouped heads, float masks."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, h, 4, dtype=torch.float64) for n, h in ((5, 4), (7, 2), (7, 2)))
    i, j = torch.arange(5)[:, None], torch.arange(7)
    slopes = torch.rand(4)
    cases: list[tuple[dict[str, Any], Tensor]] = [
        ({}, torch.zeros(5, 7)),
        (dict(causal="top_left"), torch.zeros(5, 7).masked_fill(j > i, -math.inf)),
        (dict(causal=True), torch.zeros(5, 7).masked_fill(j > i + 2, -math.inf)),
        (dict(window=(1, 2)), torch.zeros(5, 7).masked_fill((j < i + 1) | (j > i + 4), -math.inf)),
        (dict(alibi_slopes=slopes), -slopes.double()[:, None, None] * (i + 2 - j).abs()),
    ]
    for options, mask in cases:
        got, lse = dull(q, k, v, [0, 5], [0, 7], **options)
        wide = (x.transpose(0, 1)[None] for x in (q, k, v))
        want = F.scaled_dot_product_attention(*wide, attn_mask=mask.double(), enable_gqa=True)
        assert_close64(got, want[0].transpose(0, 1), str(options))
        scores = torch.einsum("inh,jnh->nij", q, k.repeat_interleave(2, 1)) / 2 + mask
        assert_close64(lse, scores.logsumexp(-1), "lse")


@on_each
@given(case=attention_cases((torch.float64,), max_len=7))
@settings(max_examples=40)
def test_every_option_against_the_formula(backend: str, case: AttentionCase) -> None:
    """R-07, R-10, R-17, R-26, R-27, R-43, R-44, R-45: forward, log-sum-exp and every gradient; S13, S14; the reference too."""
    q, k, v, grad = case.tensors()
    layout_kv = case.layout if case.layout_kv is None else case.layout_kv
    options = dict(case.semantics)
    if backend == "sdpa_padded":
        options.pop("batch_invariant", None)
    inputs = [q, k, v]
    for name in ("sinks", "score_bias"):
        if isinstance(options.get(name), Tensor):
            options[name] = options[name].double().requires_grad_()
            inputs.append(options[name])
    out, lse = varlen_attention(q, k, v, case.layout, case.layout_kv, return_lse=True, backend=backend, **options)
    want, want_lse = dull(q, k, v, case.layout.cu_seqlens.tolist(), layout_kv.cu_seqlens.tolist(), **options)
    assert_close64(out, want, "output")
    assert_close64(lse, want_lse, "lse")
    assert not lse.requires_grad
    got = torch.autograd.grad(out, inputs, grad, allow_unused=True)
    expected = torch.autograd.grad(want, inputs, grad, allow_unused=True)
    for x, a, b in zip(inputs, got, expected, strict=True):
        zeros = torch.zeros_like(x)
        assert_close64(zeros if a is None else a, zeros if b is None else b, "gradient")


@pytest.mark.parametrize("side", [None, 0, 1, 4, 5, 6])
@on_each
def test_windows_around_the_length(backend: str, side: int | None) -> None:  # R-44, S14: 0, 1, L-1, L, > L
    torch.manual_seed(0)
    layout, layout_kv = SeqLayout.from_lengths([5, 1, 3]), SeqLayout.from_lengths([4, 5, 5])
    q, k, v = (torch.randn(n, 2, 4, dtype=torch.float64) for n in (9, 14, 14))
    for other in (None, 0, 2):
        for causal in (False, "bottom_right", "top_left"):
            for window in ((side, other), (other, side)):
                got = varlen_attention(q, k, v, layout, layout_kv, window=window, causal=causal, backend=backend)
                want, _ = dull(q, k, v, [0, 5, 6, 9], [0, 4, 9, 14], window=window, causal=causal)
                assert_close64(got, want, f"{window} {causal}")


# -------------------------------------------------------------------- derivatives

GRADCHECK: dict[str, dict[str, Any]] = {
    "plain": {},
    "bottom right": dict(causal=True),
    "top left": dict(causal="top_left"),
    "window": dict(window=(1, 0)),
    "scale": dict(scale=0.7),
    "softcap": dict(softcap=1.5),
    "alibi": dict(alibi_slopes=torch.tensor([0.5, 0.1])),
    "sinks": dict(sinks=torch.tensor([0.3, -0.2], dtype=torch.float64)),
    "bias": dict(score_bias=torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 3, 4)),
    "dropout": dict(dropout_p=0.4),
    "all": dict(causal=True, window=(2, None), softcap=2.0, alibi_slopes=torch.tensor([0.5, 0.1]), scale=0.9),
}


@pytest.mark.parametrize("name", GRADCHECK)
@on_each
def test_gradcheck(backend: str, name: str) -> None:
    torch.manual_seed(0)
    layout, layout_kv = SeqLayout.from_lengths([3, 0, 1]), SeqLayout.from_lengths([2, 1, 4])
    options = dict(GRADCHECK[name])
    shapes = ((4, 2, 3), (7, 1, 3), (7, 1, 2))
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    named = [n for n in ("sinks", "score_bias") if n in options]
    inputs += [options.pop(n).clone().requires_grad_() for n in named]

    def call(*args: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same dropout for every evaluation
        extras = dict(zip(named, args[3:], strict=True))
        return varlen_attention(*args[:3], layout, layout_kv, backend=backend, **extras, **options)

    assert gradcheck(call, tuple(inputs))


def test_gradient_of_a_callable_bias() -> None:  # R-43, T5-like tables
    torch.manual_seed(0)
    layout = SeqLayout.from_lengths([3, 2])
    q = torch.randn(5, 2, 3, dtype=torch.float64)
    table = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)

    def call(table: Tensor) -> Tensor:
        return varlen_attention(q, q, q, layout, score_bias=lambda h, i, j: table[h, (i - j) + 3])

    assert gradcheck(call, (table,))
    dense = torch.stack([torch.stack([table[:, i - j + 3] for j in range(3)], -1) for i in range(3)], 1)
    assert_close64(call(table), varlen_attention(q, q, q, layout, score_bias=dense))


@pytest.mark.parametrize("name", [n for n in GRADCHECK if n != "dropout"])
def test_the_reference_can_be_differentiated_twice(name: str) -> None:
    torch.manual_seed(0)
    layout = SeqLayout.from_lengths([2, 0, 1])
    options = dict(GRADCHECK[name])
    inputs = tuple(torch.randn(3, n, 2, dtype=torch.float64, requires_grad=True) for n in (2, 1, 1))
    assert gradgradcheck(lambda *qkv: varlen_attention(*qkv, layout, backend="reference", **options), inputs)


@pytest.mark.parametrize("option", [{}, dict(causal=True), dict(window=(1, 0)), dict(softcap=1.5), dict(sinks=torch.ones(1))], ids=str)
@on_each
def test_a_second_derivative_is_right_or_raises(backend: str, option: dict[str, Any]) -> None:  # R-55, row 38 of 3a: an error, not a zero
    layout = SeqLayout.from_lengths([2, 0, 1])
    q = torch.randn(3, 1, 8, dtype=torch.float64, requires_grad=True)

    def second(backend: str) -> Tensor:
        out = varlen_attention(q, q, q, layout, backend=backend, **option)
        (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        return torch.autograd.grad(grad.sum(), q)[0]

    if backend == "reference" or "softcap" in option or "sinks" in option:  # eager
        assert_close64(second(backend), second("reference"))
        return
    own = r"backend 'cpu' is not differentiable.*backend='reference'"
    with pytest.raises(RuntimeError, match=own if backend == "cpu" else "derivative for aten::.* is not implemented"):
        second(backend)


# -------------------------------------------------------------------- padded batches against dense attention


def dense_attention(q: Tensor, k: Tensor, v: Tensor, q_mask: Tensor, k_mask: Tensor, causal: bool = False) -> Tensor:
    """`F.scaled_dot_product_attention` on ``(B,S,N,H)`` with a mask, one token matrix a row; 0 where nothing is visible."""
    hidden = k_mask[:, None, :].expand(-1, q.shape[1], -1)
    if causal:  # by rank among the real tokens, top-left
        rank_q, rank_k = (~q_mask).cumsum(1), (~k_mask).cumsum(1)
        hidden = hidden | (rank_k[:, None, :] > rank_q[:, :, None])
    blind = hidden.all(-1) | q_mask
    hidden = hidden & ~blind[..., None]
    q, k, v = (poison(x, m, 0.0).transpose(1, 2) for x, m in ((q, q_mask), (k, k_mask), (v, k_mask)))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden[:, None]).transpose(1, 2)
    return out.masked_fill(blind[..., None, None], 0.0)


@on_each
@given(batch=batches(), causal=st.booleans())
@settings(max_examples=30)
def test_padding_of_any_form_against_dense_attention(backend: str, batch: Batch, causal: bool) -> None:
    """R-02, R-15, R-27, R-28, S12; rows 4 and 5 of the peers' wrong answers: left padding and holes."""
    x, mask = batch.tensor(2, 4, dtype=torch.float64, requires_grad=True), batch.mask
    if not x.numel():
        return
    out = padded_attention(x, 2 * x, x + 1, layout=batch.layout, causal=causal, backend=backend)
    want = dense_attention(x, 2 * x, x + 1, mask, mask, causal)
    assert_close64(out, want)
    grad = batch.tensor(2, 4, dtype=torch.float64, salt=1)
    (dx,), (want_dx,) = torch.autograd.grad(out, x, grad), torch.autograd.grad(want, x, grad)
    assert_close64(dx, want_dx)
    assert not dx[mask].any()


@on_each
@given(data=st.data(), q_mask=masks(max_len=6), all_real=st.booleans(), causal=st.booleans())
@settings(max_examples=30)
def test_cross_attention_has_two_masks(backend: str, data: st.DataObject, q_mask: Tensor, all_real: bool, causal: bool) -> None:
    """R-26, S9 and row 1 of the peers' wrong answers: Sq below, equal to and above Sk, each side with its own padding."""
    batch, len_q = q_mask.shape
    len_k = data.draw(st.sampled_from((max(len_q - 2, 0), len_q, len_q + 3)))
    bits = data.draw(st.lists(st.booleans(), min_size=batch * len_k, max_size=batch * len_k))
    k_mask = torch.tensor(bits, dtype=torch.bool).reshape(batch, len_k)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, s, 2, 4, dtype=torch.float64, generator=generator) for s in (len_q, len_k, len_k))
    layout_q = SeqLayout.from_lengths([len_q] * batch, len_q) if all_real else SeqLayout.from_key_padding_mask(q_mask, validate=False)
    layout_k = SeqLayout.from_key_padding_mask(k_mask, validate=False)
    q_hidden = torch.zeros_like(q_mask) if all_real else q_mask
    alignment = dict(causal="top_left") if causal else {}
    got = padded_attention(q, poison(k, k_mask), poison(v, k_mask), layout=layout_q, layout_kv=layout_k, backend=backend, **alignment)
    if q.numel() and k.numel():
        assert_close64(got, dense_attention(q, k, v, q_hidden, k_mask, causal))
    else:
        assert not got.any()


@pytest.mark.native_too
def test_masks_say_what_layouts_say() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 2, 4), torch.randn(2, 5, 2, 4)
    q_mask = torch.tensor([[False, False, True], [True, False, False]])
    k_mask = torch.tensor([[False] * 3 + [True] * 2, [True] + [False] * 4])
    layout_q, layout_k = SeqLayout.from_key_padding_mask(q_mask), SeqLayout.from_key_padding_mask(k_mask)
    by_layout = padded_attention(q, k, k, layout=layout_q, layout_kv=layout_k)
    assert torch.equal(padded_attention(q, k, k, k_mask, query_padding_mask=q_mask), by_layout)
    assert torch.equal(
        padded_attention(q, k, k, k_mask, query_padding_mask=False), padded_attention(q, k, k, layout=None, layout_kv=layout_k)
    )
    assert torch.equal(padded_attention(q, q, q, q_mask), padded_attention(q, q, q, layout=layout_q))
    # So little that it may be computed on the padded batch, by another kernel.
    torch.testing.assert_close(padded_attention(q, q, q), padded_attention(q, q, q, torch.zeros(2, 3, dtype=torch.bool)))
    assert torch.equal(
        padded_attention(q, k, k, query_padding_mask=False),
        padded_attention(q, k, k, torch.zeros(2, 5, dtype=torch.bool), query_padding_mask=False),
    )


@pytest.mark.native_too
@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf")])
def test_little_is_computed_without_a_layout(fill: float) -> None:
    """On padded tensors: the same numbers as packed, whatever padding holds, in results and gradients, and the record says so."""
    mask = torch.tensor([[False] * 5, [False, False, False, True, True], [False, True, False, True, True]])
    inputs = [torch.randn(3, 5, 2, 8).masked_fill(mask[:, :, None, None], fill) for _ in range(3)]
    grad = torch.randn(3, 5, 2, 8).masked_fill(mask[:, :, None, None], fill)
    results = []
    for how in ({"key_padding_mask": mask}, {"layout": SeqLayout.from_key_padding_mask(mask), "backend": "reference"}):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with record() as log:
            out = padded_attention(*leaves, **how)
        assert log.calls[0].backend == ("reference" if "layout" in how else "dense")
        assert (out[mask] == 0).all()
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
        assert (got[mask] == 0).all()


def test_what_is_not_little_or_not_plain_has_a_layout() -> None:
    mask = torch.arange(5) >= torch.tensor([5, 3])[:, None]
    x, empty = torch.randn(2, 5, 2, 8), mask | torch.tensor([[False], [True]])

    def ran(x: Tensor, mask: Tensor, **semantics: Any) -> str:
        with record() as log, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            padded_attention(x, x, x, mask, **semantics)
        return log.calls[0].backend

    assert ran(x, mask) == "dense"
    others = (
        (x.double(), mask),
        (x.bfloat16(), mask),
        (x, empty),
        (x, mask.flip(1)),
        (x, torch.zeros(2, 5).masked_fill(mask, float("-inf"))),
    )
    assert "dense" not in [ran(*other) for other in others]
    assert ran(x, mask, causal=True) == ran(x, mask, backend="cpu") == "cpu"
    assert ran(x.expand(2, 5, 2, 8).repeat(1, 1, 512, 8), mask) == "cpu"
    with use_backend("reference"):
        assert ran(x, mask) == "reference"
    with torch.autocast("cpu", torch.bfloat16):
        assert padded_attention(x, x, x, mask).dtype == torch.bfloat16
    with pytest.warns(LayoutWarning):
        padded_attention(x, x, x, empty)


def test_lse_of_padded_attention() -> None:
    x = torch.randn(2, 3, 2, 4)
    mask = torch.tensor([[False, False, True], [True, False, False]])
    out, lse = padded_attention(x, x, x, mask, return_lse=True)
    assert lse.shape == (2, 2, 3)
    scores = (torch.einsum("binh,bjnh->bnij", x, x) / 2).masked_fill(mask[:, None, None], -math.inf)
    want = scores.logsumexp(-1).masked_fill(mask[:, None], -math.inf)
    torch.testing.assert_close(lse, want)
    assert out.shape == x.shape


# -------------------------------------------------------------------- varlen_mha


def projections(width: int, dtype: torch.dtype = torch.float64, bias: bool = True) -> dict[str, Tensor]:
    torch.manual_seed(5)
    shapes = dict(in_proj_weight=(3 * width, width), out_proj_weight=(width, width))
    if bias:
        shapes |= dict(in_proj_bias=(3 * width,), out_proj_bias=(width,))  # type: ignore[dict-item]
    return {name: (torch.randn(*shape, dtype=dtype) / 3).requires_grad_() for name, shape in shapes.items()}


def torch_mha(x: Tensor, mask: Tensor, heads: int, weights: dict[str, Tensor], causal: bool) -> Tensor:
    """`F.multi_head_attention_forward`, on ``(B,S,D)``."""
    width = x.shape[-1]
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if causal else None
    out, _ = F.multi_head_attention_forward(
        x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1), width, heads,
        weights["in_proj_weight"], weights.get("in_proj_bias"), None, None, False, 0.0,
        weights["out_proj_weight"], weights.get("out_proj_bias"),  # type: ignore[arg-type]
        key_padding_mask=mask, need_weights=False, attn_mask=hidden,
    )  # fmt: skip
    return out.transpose(0, 1)


@pytest.mark.parametrize("bias", [True, False])
@given(batch=batches(), heads=st.sampled_from((1, 2, 4)), causal=st.booleans())
@settings(max_examples=25)
def test_mha_against_torch(bias: bool, batch: Batch, heads: int, causal: bool) -> None:
    """R-09, R-10, R-15, R-16: output shape, padding, values and all parameter gradients, with NaN in the padding of ours."""
    weights = projections(8, bias=bias)
    x, mask = batch.tensor(8, dtype=torch.float64), batch.mask
    poisoned = poison(x, mask).requires_grad_()
    out = varlen_mha(poisoned, layout=batch.layout, num_heads=heads, causal=causal, **weights)
    assert out.shape == x.shape
    assert not out[mask].any()
    grad = batch.tensor(8, dtype=torch.float64, salt=1)
    got = torch.autograd.grad(out, [poisoned, *weights.values()], grad)
    assert not got[0][mask].any()
    real = ~mask.all(1)
    if not real.any():
        assert not any(g.any() for g in got)
        return
    # torch gives NaN for rows without tokens, and poisons every weight gradient with it: ours are compared on the others.
    x, mask, grad = x[real].requires_grad_(), mask[real], grad[real]
    want = poison(torch_mha(x, mask, heads, weights, causal), mask, 0.0)
    blind = causal and bool(mask[:, 0].any())  # left padding under a causal mask: rows of NaN in torch
    if blind:
        return
    assert_close64(out[real], want)
    expected = torch.autograd.grad(want, [x, *weights.values()], grad)
    assert_close64(got[0][real], expected[0], "dx")
    for name, a, b in zip(weights, got[1:], expected[1:], strict=True):
        assert_close64(a, b, name)


@pytest.mark.native_too
def test_mha_forms_agree() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(2, 4, 6), torch.tensor([[False] * 4, [False, False, True, True]])
    layout, weights = SeqLayout.from_key_padding_mask(mask), projections(6, torch.float32)
    padded = varlen_mha(x, mask, num_heads=2, **weights)
    assert torch.equal(varlen_mha(x, layout=layout, num_heads=2, **weights), padded)
    assert torch.equal(varlen_mha(layout.pack(x), layout=layout, num_heads=2, **weights), layout.pack(padded))
    bare = varlen_mha(x, mask, num_heads=2)
    heads = x.view(2, 4, 2, 3)
    torch.testing.assert_close(bare.view(2, 4, 2, 3), padded_attention(heads, heads, heads, mask))  # by another kernel, if so little
    qkv = torch.randn(2, 4, 3, 2, 5)
    stacked = varlen_mha(qkv, mask, causal=True)
    assert torch.equal(stacked, padded_attention(*qkv.unbind(2), mask, causal=True))
    assert torch.equal(varlen_mha(x), varlen_mha(x, torch.zeros_like(mask)))
    assert torch.equal(varlen_mha(x, mask, window=(1, 0)), varlen_mha(x, layout=layout, window=(1, 0)))


@pytest.mark.native_too
def test_packing_once_is_packing_in_every_layer() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(3, 5, 6), torch.arange(5) >= torch.tensor([5, 2, 3])[:, None]
    layout, weights = SeqLayout.from_key_padding_mask(mask), projections(6, torch.float32)
    rows, padded = layout.pack(x), x
    for _ in range(3):
        rows = varlen_mha(rows, layout=layout, num_heads=3, **weights)
        padded = varlen_mha(padded, mask, num_heads=3, **weights)
    assert torch.equal(layout.unpack(rows), padded)


# -------------------------------------------------------------------- nothing to attend to


@pytest.mark.parametrize("rows", ["one", "all", "no batch", "no columns"])
@on_each
def test_rows_without_tokens_give_no_gradient_to_anything(backend: str, rows: str) -> None:
    """R-07, S4 and row 8 of the peers' wrong answers: output 0, gradient 0, no NaN, in weights too."""
    shape = {"no batch": (0, 4), "no columns": (2, 0)}.get(rows, (3, 4))
    mask = torch.zeros(shape, dtype=torch.bool)
    if rows in ("one", "all"):
        mask[1 if rows == "one" else slice(None)] = True
    layout, weights = SeqLayout.from_key_padding_mask(mask, validate=False), projections(6)
    x = poison(torch.randn(*shape, 6, dtype=torch.float64), mask).requires_grad_()
    out = varlen_mha(x, layout=layout, num_heads=2, backend=backend, **weights)
    assert out.shape == x.shape
    assert not out[mask].any()
    grads = torch.autograd.grad(out.sum(), [x, *weights.values()])
    assert not grads[0][mask].any()
    assert all(g.isfinite().all() for g in grads)
    if rows != "one":
        assert not any(g.any() for g in grads)
        return
    kept = x.detach()[[0, 2]].requires_grad_()
    want = torch.autograd.grad(varlen_mha(kept, num_heads=2, **weights).sum(), [kept, *weights.values()])
    for a, b in zip(grads[1:], want[1:], strict=True):
        assert_close64(a, b)


@on_each
def test_queries_whose_keys_are_all_padding(backend: str) -> None:  # R-07, S4
    q, k = (torch.randn(2, 3, 2, 4, requires_grad=True) for _ in range(2))
    k_mask = torch.tensor([[True] * 3, [False, False, True]])
    layout_k = SeqLayout.from_key_padding_mask(k_mask, validate=False)
    out, lse = padded_attention(q, k, k, layout_kv=layout_k, return_lse=True, backend=backend)
    assert not out[0].any()
    assert out[1].all()
    assert torch.isneginf(lse[0]).all()
    assert lse[1].isfinite().all()
    dq, dk = torch.autograd.grad(out.sum(), (q, k))
    assert not dq[0].any()
    assert not dk[0].any()
    assert dk.isfinite().all()


@pytest.mark.parametrize(
    "option", [{}, dict(causal=True), dict(window=(1, 1)), dict(softcap=1.0), dict(sinks=torch.zeros(4)), dict(dropout_p=0.5)], ids=str
)
@on_each
def test_empty_sequences_anywhere(backend: str, option: dict[str, Any]) -> None:
    """R-08, R-17, row 16 of 3a: empty first, last, between and everywhere, longest length 1, grouped heads. Elsewhere a SIGFPE."""
    for lengths, lengths_kv in (
        ([0, 1, 0, 1, 0], [1, 1, 0, 0, 1]), ([0, 0], [0, 0]), ([0, 0], [2, 1]), ([2, 1], [0, 0]), ([], []), ([0, 3], [4, 0]), ([1], [1])
    ):  # fmt: skip
        layout, layout_kv = SeqLayout.from_lengths(lengths), SeqLayout.from_lengths(lengths_kv)
        q = torch.randn(sum(lengths), 4, 8, requires_grad=True)
        k, v = (torch.randn(sum(lengths_kv), 2, 8, requires_grad=True) for _ in range(2))
        out, lse = varlen_attention(q, k, v, layout, layout_kv, return_lse=True, backend=backend, **option)
        assert out.shape == q.shape
        assert lse.shape == (4, sum(lengths))
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(x.isfinite().all() for x in (out, *grads))
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        for start, a, b in zip(starts, lengths, lengths_kv, strict=True):
            if a and not b:
                assert not out[start : start + a].any()


NOTHING = {
    "no sequences": [SeqLayout.from_lengths([], 3)],
    "no columns": [SeqLayout.from_lengths([0, 0], 0)],
    "no tokens": [SeqLayout.from_lengths([0, 0], 3)],
    "slack rows only": [SeqLayout.from_key_padding_mask(torch.ones(2, 3, dtype=torch.bool), capacity=4)],
    "no queries": [SeqLayout.from_lengths([0, 0], 3), SeqLayout.from_lengths([2, 1])],
    "no keys": [SeqLayout.from_lengths([2, 1]), SeqLayout.from_lengths([0, 0], 3)],
    "never both": [SeqLayout.from_lengths([2, 0]), SeqLayout.from_lengths([0, 2])],
}


@pytest.mark.parametrize("extras", [(), ("sinks",), ("score_bias",), ("sinks", "score_bias")], ids=str)
@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "nested", "auto", pytest.param("cpu_native", marks=pytest.mark.native_too)])
def test_gradients_of_nothing_are_zeros(backend: str, name: str, extras: tuple[str, ...]) -> None:
    """For every tensor of the call, never None, over which an optimiser or DDP would stumble."""
    layouts = NOTHING[name]
    q, k, v = (torch.randn(layout.num_rows, 2, 8, requires_grad=True) for layout in (layouts[0], layouts[-1], layouts[-1]))
    made = {"sinks": torch.randn(2, requires_grad=True), "score_bias": torch.randn(2, 3, 3, requires_grad=True)}
    options = {name: made[name] for name in extras}
    try:
        out = varlen_attention(q, k, v, *layouts, backend=backend, **options)
    except BackendRefused:
        if backend not in ("nested", "cpu_native"):
            raise
        return
    out.sum().backward()
    for x in (q, k, v, *options.values()):
        assert x.grad is not None
        assert not x.grad.any()


# -------------------------------------------------------------------- properties


def moved(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order.view(*order.shape, *[1] * (x.dim() - 2)).expand_as(x))


@on_each
@given(batch=batches(), seed=st.integers(0, 999))
@settings(max_examples=20)
def test_where_padding_stands_does_not_matter(backend: str, batch: Batch, seed: int) -> None:
    """R-28: the same tokens in the same order among other padding, and among more of it: bitwise the same."""
    x, mask = batch.tensor(2, 8), batch.mask
    out = padded_attention(x, x, x, layout=batch.layout, backend=backend, causal=True)
    columns = mask.shape[1] + 2
    wide = torch.ones(mask.shape[0], columns, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for row, count in zip(wide, (~mask).sum(1).tolist(), strict=True):
        row[torch.randperm(columns, generator=generator)[:count]] = False
    other = SeqLayout.from_key_padding_mask(wide, validate=False)
    y = other.unpack(batch.layout.pack(x))
    out_other = padded_attention(y, y, y, layout=other, backend=backend, causal=True)
    assert torch.equal(other.pack(out_other), batch.layout.pack(out))


def ragged(lengths: list[int], seed: int = 0) -> tuple[SeqLayout, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(sum(lengths), n, 16, generator=generator) for n in (4, 2, 2))
    return SeqLayout.from_lengths(lengths), q, k, v


LENGTHS = [5, 5, 64, 0, 1, 33, 5, 129]  # equal neighbours share a call; others cross the kernel's blocks
OPTIONS = [{}, dict(causal=True), dict(window=(3, 1)), dict(softcap=2.0), dict(alibi_slopes=torch.arange(1, 5) / 8)]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (17, 17), (8, 5)])
def test_batch_invariant_is_bitwise(dim: int, value_dim: int, backend: str, option: dict[str, Any]) -> None:
    """Alone, in a batch, in another order, in two batches: a sequence's result and gradients have the same bits. Products of rows at odd
    addresses would differ, so dimensions are odd too."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, dim), (1, dim), (1, value_dim), (1, value_dim))
    inputs = [torch.randn(sum(LENGTHS), n, d, generator=generator) for n, d in shapes]
    split = [x.split(LENGTHS) for x in inputs]
    if "alibi_slopes" in option:
        option = dict(alibi_slopes=torch.tensor([0.125]))

    def call(which: Sequence[int]) -> list[Tensor]:
        q, k, v, grad = (torch.cat([parts[i] for i in which]) for parts in split)
        qkv = [x.requires_grad_() for x in (q, k, v)]
        layout = SeqLayout.from_lengths([LENGTHS[i] for i in which])
        out = varlen_attention(*qkv, layout, backend=backend, batch_invariant=True, **option)
        return [out, *torch.autograd.grad(out, qkv, grad)]

    whole = [x.split(LENGTHS) for x in call(range(len(LENGTHS)))]
    for which in ([3, 7, 0, 6, 2, 5, 1, 4], [0, 1, 2], [3, 4, 5, 6, 7], *([i] for i in range(len(LENGTHS)))):
        for got, parts in zip(call(which), whole, strict=True):
            assert torch.equal(got, torch.cat([parts[i] for i in which]))


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@on_each
def test_a_sequence_does_not_see_its_batch_mates(backend: str, option: dict[str, Any]) -> None:
    """R-31: perturb one sequence; outputs and gradients of all others keep their bits."""
    layout, q, k, v = ragged(LENGTHS)
    start, end = layout.cu_seqlens[2:4].tolist()

    def run(*qkv: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = varlen_attention(*leaves, layout, backend=backend, **option)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    before = run(q, k, v)
    for x in (q, k, v):
        x[start:end] = 7 * torch.randn_like(x[start:end])
    after = run(q, k, v)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:start], b[:start])
        assert torch.equal(a[end:], b[end:])
        assert not torch.equal(a[start:end], b[start:end])


@pytest.mark.native_too
def test_a_mask_that_changes_changes_the_result() -> None:  # R-02, S1
    x = torch.randn(2, 4, 8)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    full = varlen_mha(x, mask, **projections(8, torch.float32))
    mask[0, 3] = True
    assert (varlen_mha(x, mask, **projections(8, torch.float32)) - full)[0, :3].abs().max() > 1e-3


def test_square_batches_are_not_transposed() -> None:  # S22: B == S, where a transposed mask has the right shape
    torch.manual_seed(0)
    x = torch.randn(3, 3, 1, 4, dtype=torch.float64)
    mask = torch.tensor([[False, False, True], [False, True, True], [False, False, False]])
    assert_close64(padded_attention(x, x, x, mask), dense_attention(x, x, x, mask, mask))


@pytest.mark.parametrize("how", ["window", "alibi_slopes", "score_bias"])
def test_distances_over_holes_are_refused_unless_stated(how: str) -> None:
    option: dict[str, Any] = {
        "window": dict(window=(1, 1)),
        "alibi_slopes": dict(alibi_slopes=torch.ones(1)),
        "score_bias": dict(score_bias=torch.randn(1, 4, 4, dtype=torch.float64)),
    }[how]
    mask = torch.tensor([[False, True, False, False], [False, False, False, True]])
    x = torch.randn(2, 4, 1, 4, dtype=torch.float64)
    with pytest.raises(LayoutError, match=rf"`{how}` counts distances in packed tokens.*holes='packed'"):
        padded_attention(x, x, x, mask, **option)
    layout = SeqLayout.from_key_padding_mask(mask, holes="packed")
    rows = layout.pack(x)
    want, _ = dull(rows, rows, rows, [0, 3, 6], [0, 3, 6], **option)
    assert_close64(padded_attention(x, x, x, layout=layout, **option), layout.unpack(want))
    trusted = SeqLayout.from_key_padding_mask(mask, capacity=6)  # only the device knows: trusted
    assert_close64(padded_attention(x, x, x, layout=trusted, **option), layout.unpack(want))
    causal = padded_attention(x, x, x, mask, causal=True)
    assert_close64(causal, layout.unpack(dull(rows, rows, rows, [0, 3, 6], [0, 3, 6], causal=True)[0]))


@on_each
def test_slack_rows_are_exactly_zero(backend: str) -> None:  # R-10, S17 and row 13 of the peers' wrong answers
    mask = torch.tensor([[False, False, True], [True, False, False]])
    layout = SeqLayout.from_key_padding_mask(mask, capacity=6)
    q = torch.randn(6, 2, 8)
    q[4:] = math.nan
    q.requires_grad_()
    out, lse = varlen_attention(q, q, q, layout, return_lse=True, backend=backend)
    grad = torch.ones_like(out)
    grad[4:] = math.nan
    (dq,) = torch.autograd.grad(out, q, grad)
    assert out[:4].isfinite().all()
    assert dq[:4].isfinite().all()
    assert not out[4:].any()
    assert not dq[4:].any()
    assert torch.isneginf(lse[:, 4:]).all()


# -------------------------------------------------------------------- dtypes


@pytest.mark.native_too
def test_single_and_double_precision_stay_what_they_are() -> None:
    layout, q, k, v = ragged([40, 7])
    want = varlen_attention(q.double(), k.double(), v.double(), layout)
    assert want.dtype == torch.float64
    assert_close64(want, dull(q.double(), k.double(), v.double(), [0, 40, 47], [0, 40, 47])[0])
    out, lse = varlen_attention(q, k, v, layout, return_lse=True)
    assert out.dtype == lse.dtype == torch.float32
    assert (out - want).abs().max() < 2e-6, "not halved on the way"
    for dtype in (torch.float16, torch.bfloat16):
        out, lse = varlen_attention(q.to(dtype), k.to(dtype), v.to(dtype), layout, return_lse=True)
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert varlen_attention(q.double(), k.double(), v.double(), layout, return_lse=True)[1].dtype == torch.float64


def test_mixed_dtypes_are_named() -> None:  # R-23, row 2 of 3a
    layout, q, k, v = ragged([3])
    with pytest.raises(DtypeError, match=r"query is float32, key is float16, value is bfloat16.*autocast"):
        varlen_attention(q, k.half(), v.bfloat16(), layout)
    with pytest.raises(TypeError):
        varlen_attention(q, k.double(), v, layout)


@pytest.mark.native_too
@on_each
def test_autocast_casts_and_the_result_has_its_dtype(backend: str) -> None:
    layout, q, k, v = ragged([9, 4])
    sinks, slopes = torch.randn(4), torch.rand(4)
    half = q.bfloat16(), k.bfloat16(), v.bfloat16()
    for options in ({}, dict(sinks=sinks), dict(alibi_slopes=slopes), dict(softcap=3.0, score_bias=torch.randn(4, 9, 9))):
        want = varlen_attention(*half, layout, backend=backend, **options)
        with torch.autocast("cpu", torch.bfloat16):
            out = varlen_attention(q, half[1], v.half(), layout, backend=backend, **options)
            plain = varlen_attention(q, k, v, layout, backend=backend, **options)
        assert out.dtype == plain.dtype == torch.bfloat16
        assert torch.equal(plain, want), "nothing is cast a second time, slopes and sinks stay float32"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(DtypeError, match=r"query is float64.*leave autocast"):
        varlen_attention(q.double(), k, v, layout)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(2, 3, 6, requires_grad=True)
        out = varlen_mha(x, num_heads=2, **projections(6, torch.float32))
        out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


# -------------------------------------------------------------------- dropout


@pytest.mark.native_too
def test_dropout_without_saying_whether_this_is_training() -> None:  # R-24, S11
    x = torch.randn(2, 3, 8)
    with pytest.raises(ArgumentError, match=r"`training` must be True or False where dropout_p > 0, but is None \(dropout_p is 0.5\)"):
        varlen_mha(x, dropout_p=0.5)
    plain = varlen_mha(x)
    assert torch.equal(varlen_mha(x, dropout_p=0.5, training=False), plain)
    assert not torch.equal(varlen_mha(x, dropout_p=0.5, training=True), plain)
    assert torch.equal(varlen_mha(x, dropout_p=0.0), plain)


@pytest.mark.native_too
@pytest.mark.parametrize("option", [{}, dict(causal=True), dict(softcap=5.0)], ids=str)
@on_each
def test_dropout_drops_what_it_says(backend: str, option: dict[str, Any]) -> None:
    """R-25, row 18 of 3a: with the identity as value the output is the weights; each is dropped with p, or kept at w / (1 - p)."""
    torch.manual_seed(0)
    count, length, p = 3000, 4, 0.3
    layout = SeqLayout.from_lengths([length] * count)
    one_q, one_k = torch.randn(2, length, 1, 4).unbind()
    q, k = one_q.repeat(count, 1, 1), one_k.repeat(count, 1, 1)
    v = torch.eye(length)[:, None].repeat(count, 1, 1)
    weights = varlen_attention(one_q, one_k, v[:length], SeqLayout.from_lengths([length]), **option)[:, 0]
    out = varlen_attention(q, k, v, layout, dropout_p=p, backend=backend, **option).view(count, length, length)
    visible = weights > 0
    kept = out != 0
    assert not out[:, ~visible].any()
    torch.testing.assert_close(out[kept], (weights / (1 - p)).expand_as(out)[kept])
    draws = kept[:, visible].double()
    assert abs(float(draws.mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / draws.numel())
    spread = 5 * math.sqrt(p / (1 - p) / count)
    assert ((out.mean(0) - weights).abs() <= spread * weights + 1e-7).all(), "the mean over draws is attention without dropout"
    between = torch.corrcoef(draws[:, :4].T)
    assert (between - torch.eye(4)).abs().max() < 0.1, "draws are independent"


@on_each
def test_dropout_is_drawn_from_the_seed(backend: str) -> None:
    layout, q, k, v = ragged([6, 3])

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return varlen_attention(q, k, v, layout, dropout_p=0.5, backend=backend)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not varlen_attention(q, k, v, layout, dropout_p=1.0, backend=backend).any()


# -------------------------------------------------------------------- strides, determinism, global state


@on_each
def test_strided_and_broadcast_inputs_and_gradients(backend: str) -> None:  # R-21, S19, S25, row 9 of 3a
    torch.manual_seed(0)
    layout = SeqLayout.from_lengths([33, 1, 65])  # kv % 32 == 1
    q = torch.randn(4, 8, 99).permute(2, 0, 1)  # last stride 99
    k = torch.randn(99, 1, 8).expand(99, 2, 8)  # stride 0
    v = torch.randn(99, 2, 24)[..., 3:11]
    want = varlen_attention(q.contiguous(), k.contiguous(), v.contiguous(), layout, backend=backend)
    assert torch.equal(varlen_attention(q, k, v, layout, backend=backend), want)

    def grads(make: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = varlen_attention(*leaves, layout, backend=backend)
        make(out).backward()
        return tuple(x.grad for x in leaves)  # type: ignore[misc]

    explicit = grads(lambda out: (out * torch.ones_like(out)).sum())
    for make in (lambda out: out.sum(), lambda out: torch.cat([out, out * 0], -1)[..., :8].sum(), lambda out: out.transpose(0, 2).sum()):
        for a, b in zip(grads(make), explicit, strict=True):
            assert torch.equal(a, b)


@pytest.mark.native_too
def test_many_sequences() -> None:  # more than 65535
    layout = SeqLayout.from_lengths([1, 0] * 70_000)
    q = torch.randn(70_000, 1, 4, requires_grad=True)
    out = varlen_attention(q, q.detach(), 2 * q.detach(), layout)
    torch.testing.assert_close(out, 2 * q)
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert float(dq.abs().max()) < 1e-5


@pytest.mark.native_too
@pytest.mark.parametrize("option", [{}, dict(window=(3, 0)), dict(softcap=2.0)], ids=str)
@on_each
def test_deterministic_mode_repeats_bits_and_raises_nothing(backend: str, option: dict[str, Any]) -> None:  # R-42, S26, row 37 of 3a
    layout, q, k, v = ragged([40, 0, 33, 40, 40])
    weights = projections(8, torch.float32)
    mask = torch.arange(9) >= torch.tensor([9, 4, 0, 1])[:, None]
    x = torch.randn(4, 9, 8)
    padded = SeqLayout.from_key_padding_mask(mask, validate=False)
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(20):
            leaves = [t.clone().requires_grad_() for t in (q, k, v, x)]
            out = varlen_attention(*leaves[:3], layout, backend=backend, **option)
            rows = varlen_mha(padded.pack(leaves[3]), layout=padded, num_heads=2, **weights)
            loss = (
                out.square().sum() + padded.pool(rows, "mean").square().sum() + padded.pool(rows, "max").sum() + padded.unpack(rows).sum()
            )
            results.append([out.detach(), *torch.autograd.grad(loss, leaves)])
    finally:
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def sdp_flags() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled())


@on_each
def test_global_sdpa_flags_are_neither_set_nor_read(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-11, rows 18 and 20 of 3a: not for the length of a call, not after an exception; all of them off changes nothing."""
    layout, q, k, v = ragged([5, 3])
    before, want = sdp_flags(), varlen_attention(q, k, v, layout, backend=backend)

    def forbidden(*args: Any) -> None:
        raise AssertionError("a global SDPA flag was set")

    with monkeypatch.context() as patch:
        for name in ("flash", "mem_efficient", "math", "cudnn"):
            patch.setattr(torch.backends.cuda, f"enable_{name}_sdp", forbidden)
        for name in ("flash", "mem_efficient", "math", "cudnn", "overrideable"):
            patch.setattr(torch._C, f"_set_sdp_use_{name}", forbidden)
        varlen_attention(q, k, v, layout, backend=backend, causal=True, return_lse=True)
        with pytest.raises(LayoutError):
            varlen_attention(q, k[1:], v, layout, backend=backend)
        with pytest.raises(ZeroDivisionError):
            varlen_attention(q, k, v, layout, backend=backend, score_bias=lambda h, i, j: 1 / 0)
    assert sdp_flags() == before
    with torch.nn.attention.sdpa_kernel([]):
        assert not any(sdp_flags())
        assert torch.equal(varlen_attention(q, k, v, layout, backend=backend), want)
    assert sdp_flags() == before


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.native_too
@pytest.mark.parametrize("option", [{}, dict(causal=True)], ids=str)
def test_no_matrix_of_scores(option: dict[str, Any]) -> None:
    """R-53: memory grows with the tokens, not with (B, S, S), and not with the padding."""
    lengths = [200, 150, 3, 7, 120, 90]
    layout = SeqLayout.from_lengths(lengths, 400)
    x = torch.randn(layout.num_rows, 16, requires_grad=True)
    weights = projections(16, torch.float32)
    with _Largest() as largest:
        varlen_mha(x, layout=layout, num_heads=2, **option, **weights).sum().backward()
    assert largest.numel <= 3 * 16 * sum(lengths)
    with _Largest() as control:
        varlen_mha(x, layout=layout, num_heads=2, backend="sdpa_padded", causal=True, **weights)
    assert control.numel > 3 * 16 * sum(lengths), "the counter counts"


# -------------------------------------------------------------------- checkpoints and graphs


@pytest.mark.native_too
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_checkpoint_recomputes_the_same(use_reentrant: bool, autocast: bool, dropout_p: float) -> None:  # R-41, row 35 of 3a
    layout, weights = SeqLayout.from_lengths([4, 0, 7]), projections(8, torch.float32)
    x = torch.randn(11, 8)

    def block(x: Tensor) -> Tensor:
        return varlen_mha(x, layout=layout, num_heads=2, dropout_p=dropout_p, training=True, **weights)

    def run(wrap: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            out = wrap(wrap(leaf))
        for w in weights.values():
            w.grad = None
        out.float().square().sum().backward()
        return [out, *(t.grad for t in (leaf, *weights.values()))]  # type: ignore[misc]

    for a, b in zip(run(block), run(lambda x: checkpoint(block, x, use_reentrant=use_reentrant)), strict=True):
        assert torch.equal(a, b)


class _Counting:
    """`aot_eager` that counts the graphs it compiles."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(module, inputs)


TOTALS = ([5, 2, 0], [1, 3, 1], [1, 0, 0], [0, 0, 0], [8, 1, 0], [2, 1, 1], [4, 4, 2], [8, 8, 8], [0, 0, 3])


@pytest.mark.native_too
@dynamo_warns
def test_one_graph_for_all_totals() -> None:
    """R-18, row 36 of 3a: fullgraph, forward and backward, many totals including 0 and 1, at most two compilations."""
    import torch._dynamo  # before the layouts: they mark themselves where it is loaded

    torch._dynamo.reset()
    counting, weights = _Counting(), projections(8, torch.float32)

    @torch.compile(fullgraph=True, backend=counting)
    def compiled(x: Tensor, layout: SeqLayout) -> Tensor:
        return varlen_mha(x, layout=layout, num_heads=2, causal=True, **weights)

    for lengths in TOTALS:
        layout = SeqLayout.from_lengths(lengths, 8)
        x = torch.randn(3, 8, 8, requires_grad=True)
        out, want = compiled(x, layout), varlen_mha(x, layout=layout, num_heads=2, causal=True, **weights)
        torch.testing.assert_close(out, want)
        grads, wanted = (torch.autograd.grad(y.square().sum(), [x, *weights.values()]) for y in (out, want))
        for a, b in zip(grads, wanted, strict=True):
            torch.testing.assert_close(a, b)
    assert counting.graphs <= 2
    torch._dynamo.reset()


@dynamo_warns
def test_a_layout_made_inside_the_graph() -> None:
    import torch._dynamo

    torch._dynamo.reset()
    counting = _Counting()

    @torch.compile(fullgraph=True, backend=counting)
    def compiled(x: Tensor, mask: Tensor) -> Tensor:
        return varlen_mha(x, mask, num_heads=2)

    for lengths in TOTALS:
        mask = torch.arange(8) >= torch.tensor(lengths)[:, None]
        x = torch.randn(3, 8, 8)
        layout = SeqLayout.from_key_padding_mask(mask, validate=False)
        torch.testing.assert_close(compiled(x, mask), varlen_mha(x, layout=layout, num_heads=2))
    assert counting.graphs <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("option", [("", [-1, -1], None), ("bottom_right", [-1, -1], None), ("", [2, 0], torch.arange(1, 5) / 8)], ids=str)
@pytest.mark.parametrize("lengths", [[3, 0, 5], [4, 4], [0, 0]], ids=str)
def test_our_ops_pass_opcheck(lengths: list[int], option: tuple[str, list[int], Tensor | None]) -> None:
    layout, q, k, v = ragged(lengths)
    causal, window, slopes = option
    rest = (layout.cu_seqlens, layout.cu_seqlens, slopes, 0.25, causal, window, False)
    ops = torch.ops.varlen_attn
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.cpu_forward.default, (*inputs, *rest))
    out, lse = ops.cpu_forward(q, k, v, *rest)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.cpu_backward.default, (torch.randn_like(out), q, k, v, out, lse, *rest), test_utils=tests)


def test_forced_backends_run_or_refuse() -> None:
    layout, q, k, v = ragged([3, 2])
    with record() as log:
        for backend in CPU_BACKENDS:
            varlen_attention(q, k, v, layout, backend=backend)
    assert [c.backend for c in log.calls] == list(CPU_BACKENDS)
    with pytest.raises(BackendRefused, match=r"(?s)'sdpa_padded' was requested.*batch-mates.*Fix: drop `batch_invariant`"):
        varlen_attention(q, k, v, layout, backend="sdpa_padded", batch_invariant=True)


@pytest.mark.native_too
def test_fake_and_meta_tensors_have_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    layout, q, k, v = ragged([3, 2])
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (q, k, v)]
        out, lse = varlen_attention(*fake, torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, layout), return_lse=True)
    assert (out.shape, lse.shape, out.device.type) == (q.shape, (4, 5), "cpu")
    meta = [x.to("meta") for x in (q, k, v)]
    assert varlen_attention(*meta, layout.to("meta")).shape == q.shape


@pytest.mark.parametrize("option", [{}, dict(causal=True), dict(window=(1, 0)), dict(softcap=2.0), dict(return_lse=True)], ids=str)
@on_each
def test_a_default_device_does_not_reach_into_a_call(backend: str, option: dict[str, Any]) -> None:
    layout, q, k, v = ragged([3, 0, 2])
    want = varlen_attention(q, k, v, layout, backend=backend, **option)
    with torch.device("meta"):
        got = varlen_attention(q, k, v, layout, backend=backend, **option)
    assert all(torch.equal(a, b) for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True))


# -------------------------------------------------------------------- transforms, sinks that are off


@pytest.mark.native_too
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's, when it first differentiates forward
def test_forward_mode_derivatives_are_right_on_the_backend_that_auto_picks() -> None:
    """R-55: the packed kernel has a backward only; under `torch.func` the same numbers come from eager maths."""
    layout, q, k, v = ragged([3, 0, 4])
    q, k, v = q.double(), k.double(), v.double()
    tangent = torch.ones_like(q)

    def call(x: Tensor, backend: str) -> Tensor:
        return varlen_attention(x, k, v, layout, backend=backend)

    got = torch.func.jvp(lambda x: call(x, "auto"), (q,), (tangent,))
    want = torch.func.jvp(lambda x: call(x, "reference"), (q,), (tangent,))
    assert want[1].abs().max() > 1e-3
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    with record() as log:
        torch.func.jvp(lambda x: call(x, "auto"), (q,), (tangent,))
    assert "eager" in log.calls[0].kernel, "the record says what ran"
    gradient = torch.func.grad(lambda x: call(x, "auto").square().sum())(q)
    torch.testing.assert_close(gradient, torch.func.grad(lambda x: call(x, "reference").square().sum())(q), rtol=0, atol=1e-12)


@on_each
def test_sinks_of_minus_infinity_are_no_sinks(backend: str) -> None:
    """R-07: also for a query that sees no key."""
    query, key = torch.randn(3, 2, 4, requires_grad=True), torch.randn(1, 2, 4)
    layouts = SeqLayout.from_lengths([3]), SeqLayout.from_lengths([1])
    off = torch.full((2,), -torch.inf)
    got = varlen_attention(query, key, key, *layouts, causal=True, sinks=off, backend=backend)
    torch.testing.assert_close(got, varlen_attention(query, key, key, *layouts, causal=True, backend=backend))
    assert torch.autograd.grad(got.sum(), query)[0].isfinite().all()


@pytest.mark.native_too
def test_flops_are_those_of_real_tokens() -> None:
    """Two matrix products forward, five backward, on the pairs of each sequence."""
    from torch.utils.flop_counter import FlopCounterMode

    lengths, heads, dim = [5, 0, 3], 2, 4
    layout, q, k, v = ragged(lengths)
    q, k, v = (torch.randn(8, heads, dim, requires_grad=True) for _ in range(3))
    varlen_attention(q, k, v, layout, backend="cpu")  # a counter knows what was registered before it was made
    with FlopCounterMode(display=False) as counter:
        out = varlen_attention(q, k, v, layout, backend="cpu")
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 4 * (25 + 9) * heads * dim
    assert counter.get_total_flops() == forward * 7 // 2


def test_a_value_that_is_refused_is_refused_after_its_equal_too() -> None:
    """What a call is checked for is decided once a signature, and 1 is equal to True there."""
    layout = SeqLayout.from_lengths([2, 3])
    x = torch.randn(5, 2, 8)
    for right, wrong in (
        (dict(causal=True), dict(causal=1)),
        (dict(window=(1, 0)), dict(window=(True, False))),
        (dict(scale=0.5), dict(scale=np.float32(0.5))),
        (dict(softcap=2.0), dict(softcap=np.float32(2.0))),
    ):
        varlen_attention(x, x, x, layout, **right)
        with pytest.raises(ArgumentError):
            varlen_attention(x, x, x, layout, **wrong)
