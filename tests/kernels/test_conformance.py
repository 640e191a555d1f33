"""One suite over all backends: what a backend declares, it runs, exactly; what it refuses, it refuses with a reason.

A backend is added by adding it to BACKENDS; nothing is written here for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from varlen_attn import BACKENDS, BackendRefused, SeqLayout, explain, padded_attention, record, varlen_attention
from varlen_attn.attention.dispatch import Plan
from varlen_attn.kernels.base import Backend
from varlen_attn.testing import assert_within_budget, poison
from varlen_attn.testing.strategies import AttentionCase, Batch, HeadShape, attention_cases, batches, head_shapes, semantics

# Half precision first on a GPU, where most kernels take nothing else: what every backend refuses shows nothing.
DTYPES = {
    "cpu": (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16),
    "cuda": (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32),
}
Results = tuple[Tensor, Tensor | None, tuple[Tensor, ...]]  # output, log-sum-exp, gradients
# Apart from the others: what is compiled for each kind of call on a GPU, and what is built only for some of the tests.
APART = {"flex": [], "cpu_native": [pytest.mark.native_too]}
each_backend = pytest.mark.parametrize("backend", [pytest.param(b, id=b.name, marks=APART.get(b.name, [])) for b in BACKENDS])
# A case is drawn once for all of a group, and its reference computed once.
each_group = pytest.mark.parametrize(
    "group",
    [pytest.param([b for b in BACKENDS if b.name not in APART], id="together")]
    + [pytest.param([b for b in BACKENDS if b.name == name], id=name, marks=marks) for name, marks in APART.items()],
)


@contextmanager
def named(backend: Backend) -> Iterator[None]:
    """Errors say whose they are."""
    try:
        yield
    except Exception as error:
        error.add_note(f"backend: {backend.name}")
        raise


def dtype_for(backend: Backend) -> torch.dtype:
    return torch.float32 if torch.float32 in backend.capabilities.dtypes else torch.bfloat16


def takes_a_plain_call(backend: Backend, device: str) -> bool:
    """Whether it runs here at all: then a test that is refused everything has shown nothing."""
    x = torch.zeros(3, 1, 8, device=device, dtype=dtype_for(backend))
    return not is_refused(lambda: explain(x, x, x, SeqLayout.from_lengths([3], device=device), backend=backend.name), backend)


def assert_all_ran(group: list[Backend], ran: set[str], device: str) -> None:
    idle = [b.name for b in group if b.name not in ran and takes_a_plain_call(b, device)]
    assert not idle, f"refused all that was drawn: {idle}"


def moved(case: AttentionCase, device: str) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, SeqLayout, SeqLayout | None, dict[str, Any]]:
    *qkv, grad = case.tensors(device)
    layout_kv = None if case.layout_kv is None else case.layout_kv.to(device)
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.semantics.items()}
    return (qkv[0], qkv[1], qkv[2]), grad, case.layout.to(device), layout_kv, options


def is_refused(call: Callable[[], Any], backend: Backend) -> bool:
    """Whether the backend refuses; then with reasons and fixes, and so does forcing it."""
    try:
        plan = call()
    except BackendRefused as error:
        text = str(error)
        assert backend.name in text
        assert "Fix: " in text
        return True
    assert not isinstance(plan, Plan) or plan.backend == backend.name, "an order runs, or it is refused"
    return False


def run(qkv: tuple[Tensor, ...], grad: Tensor, layouts: tuple[Any, ...], with_lse: bool = True, **options: Any) -> Results:
    result = varlen_attention(*qkv, *layouts, return_lse=with_lse, **options)
    out, lse = result if with_lse else (result, None)
    return out, lse, torch.autograd.grad(out, qkv, grad)


@each_group
def test_matches_the_reference_forward_and_backward(group: list[Backend], device: str) -> None:
    """R-07, R-08, R-12, R-17, R-21, R-26, R-27, R-43, R-44, R-45: every semantic, head shape, length and dtype."""
    ran: set[str] = set()

    @given(case=attention_cases(DTYPES[torch.device(device).type]))
    def all_match(case: AttentionCase) -> None:
        qkv, grad, layout, layout_kv, options = moved(case, device)
        layouts = (layout, layout_kv)

        @cache
        def reference(dtype: torch.dtype) -> Results:
            inputs = tuple(x.detach().to(dtype).requires_grad_() for x in qkv)
            return run(inputs, grad.to(dtype), layouts, backend="reference", **options)

        for backend in group:
            with named(backend):
                asked = dict(return_lse=backend.capabilities.return_lse, backend=backend.name, **options)
                if is_refused(lambda: explain(*qkv, *layouts, **asked), backend):  # noqa: B023
                    with pytest.raises(BackendRefused):
                        varlen_attention(*qkv, *layouts, **asked)
                    continue
                check(run(qkv, grad, layouts, backend.capabilities.return_lse, backend=backend.name, **options), reference, case, device)
                ran.add(backend.name)

    all_match()
    assert_all_ran(group, ran, device)


def check(got: Results, reference: Callable[[torch.dtype], Results], case: AttentionCase, device: str) -> None:
    """Output, log-sum-exp and gradients against float64; eager attention in the dtype of the case says how far off they may be."""
    (out, lse, grads), (ref, ref_lse, ref_grads), (naive, naive_lse, naive_grads) = got, reference(torch.float64), reference(case.dtype)
    for x in (out, *grads):
        assert x.dtype == case.dtype
        assert x.device.type == torch.device(device).type
    assert_within_budget(out, ref, naive, what="output")
    assert ref_lse is not None
    assert naive_lse is not None
    if lse is not None:
        assert not lse.requires_grad
        assert lse.dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
        assert_within_budget(lse, ref_lse, naive_lse, what="lse")
    for name, x, want, eager in zip(("dq", "dk", "dv"), grads, ref_grads, naive_grads, strict=True):
        assert_within_budget(x, want, eager, gradient=True, what=name)
    blind = torch.isneginf(ref_lse).transpose(0, 1)[..., None]
    assert not out.masked_select(blind).any(), "a query without a visible key gives exactly 0"
    assert not grads[0].masked_select(blind).any(), "and gets exactly 0"


def batch_of(which: list[int], qkv: tuple[Tensor, ...], grad: Tensor, layouts: list[SeqLayout]) -> tuple[Any, Tensor, list[SeqLayout]]:
    """The sequences ``which`` of a batch, as a batch of their own: what `run` takes."""
    lengths = [layout.cu_seqlens.diff().tolist() for layout in layouts]
    *leaves, weights = (
        torch.cat([x[:0], *(x[: sum(own)].split(own)[i] for i in which)]).detach()
        for x, own in zip((*qkv, grad), (lengths[0], lengths[-1], lengths[-1], lengths[0]), strict=True)
    )
    parts = [SeqLayout.from_lengths([own[i] for i in which], device=grad.device) for own in lengths]
    return tuple(x.requires_grad_() for x in leaves), weights, parts


@each_group
def test_other_batches_of_the_same_sequences_give_the_same(group: list[Backend], device: str) -> None:
    """R-20, R-31: in another order, and in two batches. With ``batch_invariant=True`` results and gradients are bitwise the same; on a
    backend that refuses it they are within the budget."""
    ran: set[str] = set()

    @given(case=attention_cases(DTYPES[torch.device(device).type]), data=st.data())
    def all_same(case: AttentionCase, data: st.DataObject) -> None:
        qkv, grad, layout, layout_kv, options = moved(case, device)
        layouts = [layout] if layout_kv is None else [layout, layout_kv]
        order = data.draw(st.permutations(range(layout.num_seqs)))
        cut = data.draw(st.integers(0, len(order)))

        @cache
        def reference(dtype: torch.dtype) -> Results:
            leaves, weights, parts = batch_of(order, qkv, grad, layouts)
            return run(
                tuple(x.detach().to(dtype).requires_grad_() for x in leaves), weights.to(dtype), parts, **options, backend="reference"
            )

        for backend in group:
            with named(backend):
                asked = {**options, "batch_invariant": True, "backend": backend.name}
                exact = not is_refused(lambda: explain(*qkv, *layouts, **asked), backend)  # noqa: B023
                asked["batch_invariant"] = exact
                if not exact and is_refused(lambda: explain(*qkv, *layouts, **asked), backend):  # noqa: B023
                    continue
                halves = [run(*batch_of(which, qkv, grad, layouts), False, **asked) for which in (order[:cut], order[cut:])]
                out, *grads = map(torch.cat, zip(*((half[0], *half[2]) for half in halves), strict=True))
                if exact:
                    whole = run(qkv, grad, layouts, False, **asked)
                    wants, want, _ = batch_of(order, whole[2], whole[0], layouts)
                    assert all(torch.equal(x, y) for x, y in zip((out, *grads), (want, *wants), strict=True))
                else:
                    check((out, None, tuple(grads)), reference, case, device)
                ran.add(backend.name)

    all_same()
    assert_all_ran(group, ran, device)


@each_group
def test_padding_is_never_read(group: list[Backend], device: str) -> None:
    """R-09, R-10: outputs and gradients are bitwise the same for whatever stands in the padding."""
    ran: set[str] = set()

    @given(batch=batches(), shape=head_shapes(), data=st.data())
    def all_agree(batch: Batch, shape: HeadShape, data: st.DataObject) -> None:
        options = {k: v for k, v in data.draw(semantics(shape.heads)).items() if k not in ("window", "alibi_slopes", "score_bias")}
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
        sizes = ((shape.heads, shape.dim), (shape.kv_heads, shape.dim), (shape.kv_heads, shape.value_dim))
        plain = [batch.tensor(*size, salt=salt).to(device) for salt, size in enumerate(sizes)]
        for backend in group:
            with named(backend):
                if never_read(backend, plain, batch, device, options):
                    ran.add(backend.name)

    all_agree()
    assert_all_ran(group, ran, device)


def never_read(backend: Backend, plain: list[Tensor], batch: Batch, device: str, options: dict[str, Any]) -> bool:
    """False if the backend refuses."""
    mask, layout, results = batch.mask.to(device), batch.layout.to(device), []
    for fill in (0.0, 1e4, float("nan"), float("inf")):
        qkv = [poison(x.to(dtype_for(backend)), mask, fill).requires_grad_() for x in plain]
        call = lambda: padded_attention(*qkv, layout=layout, backend=backend.name, **options)  # noqa: B023, E731
        if is_refused(call, backend):
            return False
        out = call()
        grads = torch.autograd.grad(out, qkv, torch.ones_like(out))
        for x in (out, *grads):
            assert not x[mask].any(), "padding rows of results and gradients are exactly 0"
        results.append((out, *grads))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)
    return True


@each_backend
@pytest.mark.parametrize("how", ["window", "causal", "softcap", "alibi_slopes", "sinks", "score_bias", "scale", "mask"])
def test_no_option_is_dropped(backend: Backend, how: str, device: str) -> None:
    """R-02: an option that is accepted changes the result of an input made for it (a dropped one would pass comparisons of rare draws)."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 2, 8, device=device, dtype=dtype_for(backend))
    mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2], device=device)
    options: dict[str, Any] = {
        "window": dict(window=(1, 0)),
        "causal": dict(causal=True),
        "softcap": dict(softcap=0.1),
        "alibi_slopes": dict(alibi_slopes=torch.ones(2, device=device)),
        "sinks": dict(sinks=torch.ones(2, device=device)),
        "score_bias": dict(score_bias=torch.randn(2, 6, 6, device=device)),
        "scale": dict(scale=3.0),
        "mask": {},
    }[how]
    full = torch.zeros_like(mask)
    if is_refused(lambda: padded_attention(x, x, x, mask, backend=backend.name, **options), backend):
        assert how != "mask" or not takes_a_plain_call(backend, device)
        return
    got = padded_attention(x, x, x, full if how != "mask" else mask, backend=backend.name, **options)
    without = padded_attention(x, x, x, full, backend=backend.name)
    assert (got - without).abs().max() > 1e-3


@each_backend
@pytest.mark.parametrize("how", ["fused projection", "heads first", "every other", "one for all rows"])
def test_views_are_as_their_copies(backend: Backend, how: str, device: str) -> None:
    """R-12: query, key and value as models make them: parts of one projection, transposed, strided, expanded; forward and backward."""
    torch.manual_seed(0)
    layout = SeqLayout.from_lengths([5, 9, 2], device=device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    views = {
        "fused projection": lambda: torch.randn(16, 3, 2, 16).unbind(1),
        "heads first": lambda: torch.randn(3, 2, 16, 16).transpose(1, 2).unbind(0),
        "every other": lambda: torch.randn(3, 16, 2, 32)[..., ::2].unbind(0),
        "one for all rows": lambda: torch.randn(3, 1, 2, 16).expand(3, 16, 2, 16).unbind(0),
    }[how]()
    views = tuple(x.to(device, dtype) for x in views)  # keeps strides, except of expanded ones on another device
    grad = torch.randn(16, 2, 16).to(device, dtype)
    results = []
    for inputs in (views, tuple(x.contiguous() for x in views)):
        leaves = tuple(x.detach().requires_grad_() for x in inputs)
        if is_refused(lambda: varlen_attention(*leaves, layout, backend=backend.name), backend):  # noqa: B023
            assert not takes_a_plain_call(backend, device)
            return
        out = varlen_attention(*leaves, layout, backend=backend.name)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@each_backend
def test_the_profiler_sees_what_is_claimed(backend: Backend, device: str) -> None:
    """R-01, R-11: the kernel that a plan names is the kernel that runs; which one did I really get?"""
    layout = SeqLayout.from_lengths([70, 130, 0, 3], device=device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = torch.randn(3, 203, 2, 64).to(device, dtype).unbind(0)
    if is_refused(lambda: varlen_attention(q, k, v, layout, backend=backend.name), backend):
        assert not takes_a_plain_call(backend, device)
        return
    with record(kernels=True) as log:
        varlen_attention(q, k, v, layout, backend=backend.name)
    (call,) = log
    assert call.plan is not None
    assert call.kernels
    assert call.confirmed is (True if backend.seen_as(call.plan.problem) else None), log
