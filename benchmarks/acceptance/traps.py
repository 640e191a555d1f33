"""Where attention on GPUs has been wrong before: each trap is set for every backend that is here, and for torch beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from varlen_attn import SeqLayout
from varlen_attn.testing import assert_within_budget, reference_attention

from .cases import attend, here, leaves_of
from .findings import Findings, Setting, Tally, half

__all__ = ["large", "traps"]

Tensors = tuple[Tensor, ...]


def traps(setting: Setting, findings: Findings) -> None:
    dtype = setting.dtype
    findings.facts["torch, bool mask of True: values of dq that are not finite (pytorch#196678)"] = _upstream_nan(dtype, setting.device)
    sets: dict[str, Callable[[str], None]] = {
        "rows of very small sums": partial(small_sums, dtype, setting.device),
        "uncovered rows": partial(uncovered_rows, dtype, setting.device),
        "expanded gradient": partial(expanded_gradient, dtype, setting.device),
    }
    for name in ("auto", *here(setting.device)):
        tally = Tally(name)
        for trap, spring in sets.items():
            tally.attempt(trap, partial(spring, name))
        tally.write(findings)


def _tiny_sums(dtype: torch.dtype, device: str, length: int = 704) -> Tensors:
    """q, k, v ``(L, 2, 64)``: every score is about -120, so that a row's log-sum-exp is below -88.7, where exp in float32 is 0."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(length, 2, 64, generator=generator) for _ in range(3))
    q, k = q * 0.1, k * 0.1
    q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(64)
    return tuple(x.to(device, dtype) for x in (q, k, v))


def _upstream_nan(dtype: torch.dtype, device: str) -> int:
    """A fact about torch: what its default choice gives for a mask of nothing but True and a length with ``L % 128 == 64``."""
    q, k, v = (x.transpose(0, 1)[None].clone().requires_grad_() for x in _tiny_sums(dtype, device))
    mask = torch.ones(1, 1, q.shape[2], q.shape[2], dtype=torch.bool, device=device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    (dq,) = torch.autograd.grad(out, [q], torch.randn_like(out))
    return int((~dq.isfinite()).sum())


def small_sums(dtype: torch.dtype, device: str, backend: str) -> None:
    """Raise AssertionError unless gradients are finite, and right, where default masked attention has returned NaN."""
    _as_the_reference(_tiny_sums(dtype, device), SeqLayout.from_lengths([704], device=device), backend)


def uncovered_rows(dtype: torch.dtype, device: str, backend: str) -> None:
    """R-12, R-40: rows beyond the last offset (sgl-flash-attn#47) change no row before it, and are 0 themselves, NaN in them or not."""
    lengths = (100, 0, 233)
    exact = SeqLayout.from_lengths(lengths, device=device)
    slack = SeqLayout.from_key_padding_mask(exact.padding_mask(), capacity=512, validate=False)
    generator = torch.Generator().manual_seed(0)
    qkv = tuple(torch.randn(333, 2, 64, generator=generator).to(device, dtype) for _ in range(3))
    longer = tuple(F.pad(x, (0, 0, 0, 0, 0, 512 - 333), value=float("nan")) for x in qkv)
    _as_the_reference(qkv, exact, backend)
    out, grads = _with_gradients(longer, slack, backend, torch.ones(512, 2, 64, device=device, dtype=dtype))
    for x in (out, *grads):
        assert not bool((x[333:] != 0).any()), "rows beyond the last offset are not 0"
    want = _reference(qkv, exact, torch.float64), _reference(qkv, exact, dtype)
    for got, wide, plain in zip((out, *grads), *want, strict=True):
        assert_within_budget(got[:333], wide, plain, gradient=True, what="covered rows")


def expanded_gradient(dtype: torch.dtype, device: str, backend: str) -> None:
    """``out.sum().backward()``: a gradient of strides 0, which kernels have misread."""
    layout = SeqLayout.from_lengths([33, 70, 1], device=device)
    generator = torch.Generator().manual_seed(0)
    qkv = tuple(torch.randn(104, 2, 64, generator=generator).to(device, dtype) for _ in range(3))
    leaves = leaves_of(qkv)
    grads = torch.autograd.grad(attend(leaves, layout, backend).sum(), leaves)
    for got, wide, plain in zip(grads, _reference(qkv, layout, torch.float64)[1:], _reference(qkv, layout, dtype)[1:], strict=True):
        assert_within_budget(got, wide, plain, gradient=True, what="gradient of a sum")


def _with_gradients(qkv: Tensors, layout: SeqLayout, backend: str, grad: Tensor) -> tuple[Tensor, Tensors]:
    leaves = leaves_of(qkv)
    out = attend(leaves, layout, backend)
    return out.detach(), torch.autograd.grad(out, leaves, grad)


def _reference(qkv: Tensors, layout: SeqLayout, dtype: torch.dtype) -> Tensors:
    """Output, and gradients of its sum."""
    q, k, v = leaves_of(qkv, dtype)
    out = reference_attention(q, k, v, layout, dtype=dtype)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))


def _as_the_reference(qkv: Tensors, layout: SeqLayout, backend: str) -> None:
    out, grads = _with_gradients(qkv, layout, backend, torch.ones_like(qkv[2]))
    for got, wide, plain in zip((out, *grads), _reference(qkv, layout, torch.float64), _reference(qkv, layout, qkv[0].dtype), strict=True):
        assert_within_budget(got, wide, plain, gradient=True)


# -------------------------------------------------------------------- more than kernels count to

ROW = (16, 128)  # N and H
LARGE = 60e9  # bytes of a GPU that holds q, k, v, the output and all gradients of 2^31 elements each, and what a backward adds


def large(setting: Setting, findings: Findings) -> None:
    """R-22: more sequences than a grid has blocks, and more elements than 32 bits count."""
    room = torch.cuda.get_device_properties(0).total_memory if setting.device == "cuda" else 0
    for name in ("auto", *here(setting.device, omit=("reference", "sdpa_padded", "nested", "flex"))):
        tally = Tally(name)
        tally.attempt("70000 sequences", partial(many_sequences, 70_000, half(setting.device), setting.device, name))
        if room > LARGE:
            tally.attempt("2^31 elements", partial(_if_it_fits, f"{name}, 2^31 elements", findings, setting.device))
            torch.cuda.empty_cache()
        tally.write(findings)
    findings.facts["2^31 elements"] = "tried" if room > LARGE else "needs a GPU with more memory"


def _if_it_fits(what: str, findings: Findings, device: str) -> None:
    """A backend that copies may need more than there is: that is a fact, and no wrong result."""
    try:
        many_elements(2**31, half(device), device, what.split(",")[0])
    except torch.OutOfMemoryError:
        findings.facts[what] = "does not fit on this GPU"


def many_sequences(count: int, dtype: torch.dtype, device: str, backend: str) -> None:
    """Sequences of one token and of none: the output is v, the gradient of q is 0."""
    layout = SeqLayout.from_lengths([1, 0] * count, device=device)
    q = torch.randn(count, 2, 64, device=device, dtype=dtype, requires_grad=True)
    v = torch.randn(count, 2, 64, device=device, dtype=dtype, requires_grad=True)
    out = attend((q, q.detach(), v), layout, backend)
    dq, dv = torch.autograd.grad(out, [q, v], torch.ones_like(out))
    assert torch.equal(out, v.detach()), "one token alone attends to itself, so that the output is its value"
    assert bool((dv == 1).all()), "the gradient of a value is that of its output"
    assert float(dq.abs().max()) < 0.05, "the gradient of a query with one key is 0"


def many_elements(elements: int, dtype: torch.dtype, device: str, backend: str, length: int = 1024) -> None:
    """The first and the last of very many rows are what those sequences alone give."""
    count = -(-elements // (length * ROW[0] * ROW[1])) + 1
    layout = SeqLayout.from_lengths([length] * count, device=device)
    generator = torch.Generator(device=device).manual_seed(0)
    shape = (count * length, *ROW)
    qkv = tuple(torch.randn(shape, device=device, dtype=dtype, generator=generator).requires_grad_() for _ in range(3))
    out = attend(qkv, layout, backend)
    grads = torch.autograd.grad(out, qkv, torch.ones_like(out))
    alone = SeqLayout.from_lengths([length], device=device)
    for part in (slice(0, length), slice((count - 1) * length, None)):
        some = tuple(x.detach()[part] for x in qkv)
        for got, wide, plain in zip(
            (out.detach(), *grads), _reference(some, alone, torch.float64), _reference(some, alone, dtype), strict=True
        ):
            assert_within_budget(got[part], wide, plain, gradient=True, what="a sequence at the end")
