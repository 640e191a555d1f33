"""What our own tests stand on, public because users have padded batches to test too.

The only comparison of attention results that is accepted here is an error budget: the error against float64 may be twice the error
that plain eager attention makes in the same dtype (three times for gradients). It needs no hand-picked tolerance, and it is the rule
of flash-attn's own tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention.functional import varlen_attention
from ..errors import BackendRefused
from ..kernels.base import Backend
from ..layout.seq_layout import SeqLayout
from ._invariance import InvarianceReport, check_padding_invariance

__all__ = [
    "InvarianceReport",
    "assert_within_budget",
    "check_padding_invariance",
    "conformance",
    "error_budget",
    "poison",
    "reference_attention",
]

# Rounding steps of the largest value that are always allowed, because eager attention is sometimes exact: with one key its softmax
# is exactly 1 and the gradient of the query exactly 0, where a kernel that recomputes the weights rounds terms that cancel.
_BAND = {"result": {True: 2, False: 8}, "gradient": {True: 4, False: 64}}  # by half precision or not


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SeqLayout,
    layout_kv: SeqLayout | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    **semantics: Any,
) -> Any:
    """`varlen_attention` by the specification, in ``dtype``: float64 is the truth, the dtype of a result its eager competitor.

    Shapes and semantics as `varlen_attention`; gradients flow back to the tensors given, in their dtype.

    Examples:
        >>> x, layout = torch.randn(8, 2, 16), SeqLayout.from_lengths([5, 3])
        >>> exact, plain = (reference_attention(x, x, x, layout, dtype=dtype) for dtype in (torch.float64, torch.float32))
        >>> assert_within_budget(varlen_attention(x, x, x, layout), exact, plain)
    """
    query, key, value = (x.to(dtype) for x in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        return varlen_attention(query, key, value, layout, layout_kv, backend="reference", **semantics)


def error_budget(ref64: Tensor, naive: Tensor, dtype: torch.dtype, *, gradient: bool = False) -> float:
    """The largest absolute error allowed: 2 times the error of ``naive`` (3 for gradients), plus a few rounding steps of ``dtype``.

    Examples:
        >>> exact = torch.ones(3, dtype=torch.float64)
        >>> error_budget(exact, exact.float() + 1e-3, torch.float32) > 2e-3
        True
    """
    if ref64.numel() == 0:
        return 0.0
    steps = _BAND["gradient" if gradient else "result"][dtype in (torch.float16, torch.bfloat16)]
    magnitude = max(1.0, float(ref64.abs().max()))
    factor = 3.0 if gradient else 2.0
    return factor * float((naive.double() - ref64).abs().max()) + steps * torch.finfo(dtype).eps * magnitude


def assert_within_budget(out: Tensor, ref64: Tensor, naive: Tensor, *, gradient: bool = False, what: str = "result") -> None:
    """Assert ``error(out) <= 2 * error(naive)`` (3 for gradients), both against ``ref64``, plus a few rounding steps.

    Args:
        out: what is tested, any float dtype.
        ref64: the same in float64.
        naive: the same by plain eager attention in ``out``'s dtype.
        gradient: allow a factor of 3.
        what: name for the message.

    Raises:
        AssertionError: shapes differ, ``out`` is not finite where ``ref64`` is, or the error is above the budget.

    Examples:
        >>> exact = torch.ones(3, dtype=torch.float64)
        >>> assert_within_budget(exact.float() + 0.1, exact, exact.float())
        Traceback (most recent call last):
        AssertionError: result: error 0.1 is above the budget ...
    """
    assert out.shape == ref64.shape == naive.shape, f"{what}: shapes are {out.shape}, {ref64.shape} and {naive.shape}"
    assert ref64.dtype == torch.float64, f"{what}: the reference must be float64, but is {ref64.dtype}"
    if out.numel() == 0:
        return
    out64, ref64, naive = out.detach().double(), ref64.detach(), naive.detach()
    infinite = ~ref64.isfinite()
    assert torch.equal(out64[infinite], ref64[infinite]), f"{what}: infinities differ"
    out64, ref64, naive = out64[~infinite], ref64[~infinite], naive[~infinite]
    assert bool(out64.isfinite().all()), f"{what}: {int((~out64.isfinite()).sum())} values are not finite"
    if out64.numel() == 0:
        return
    error = float((out64 - ref64).abs().max())
    allowed = error_budget(ref64, naive, out.dtype, gradient=gradient)
    assert error <= allowed, (
        f"{what}: error {error:.3g} is above the budget {allowed:.3g} "
        f"(plain eager attention in {out.dtype} makes {float((naive.double() - ref64).abs().max()):.3g})"
    )


def conformance(backend: Backend, device: str = "cpu", *, dtypes: tuple[torch.dtype, ...] = (torch.float32,), examples: int = 200) -> int:
    """Hold a backend of your own against the specification: outputs, log-sum-exp and gradients of drawn calls. Needs hypothesis.

    Calls have lengths, head shapes and options of every kind, empty sequences and queries that see no key among them. What the backend
    refuses by its `Capabilities` is passed over; what it accepts must be within the error budget.

    Args:
        backend: an object, not a name.
        device, dtypes: of the tensors.
        examples: calls that are drawn.

    Returns:
        How many of them it ran.

    Raises:
        AssertionError: a result is outside of its budget, or every call was refused. The smallest call that fails is shown.

    Examples:
        >>> from varlen_attn.kernels.cpu.aten import Cpu  # a backend of this package
        >>> conformance(Cpu(), examples=10) > 0
        True
    """
    from .strategies import AttentionCase, attention_cases, each

    can, ran = backend.capabilities, 0
    attend: Any = varlen_attention

    def matches(case: AttentionCase) -> None:
        nonlocal ran
        *qkv, grad = case.tensors(device)
        layouts = [None if x is None else x.to(device) for x in (case.layout, case.layout_kv)]
        options: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.semantics.items()}

        def results(by: Backend | str, dtype: torch.dtype) -> dict[str, Tensor]:
            inputs = [x.detach().to(dtype).requires_grad_(can.grad) for x in qkv]
            found = attend(*inputs, *layouts, return_lse=can.return_lse, backend=by, **options)
            out, *lse = found if can.return_lse else [found]
            gradients = torch.autograd.grad(out, inputs, grad.to(dtype)) if can.grad else ()
            return {"output": out} | dict(zip(["lse"], lse, strict=False)) | dict(zip(("dq", "dk", "dv"), gradients, strict=False))

        try:
            got = results(backend, case.dtype)
        except BackendRefused:
            return
        exact, naive = results("reference", torch.float64), results("reference", case.dtype)
        for name, x in got.items():
            assert_within_budget(x, exact[name], naive[name], gradient=name[0] == "d", what=f"{name} of {backend.name}")
        ran += 1

    each(attention_cases(dtypes), matches, examples)
    assert ran, f"{backend.name} refused all of {examples} calls: see explain(..., backend=...).details()"
    return ran


def poison(x: Tensor, key_padding_mask: Tensor, value: float = float("nan")) -> Tensor:
    """A copy of ``x (B, S, ...)`` with ``value`` at padding (where ``key_padding_mask (B, S)`` is True).

    A result that changes, or is not finite, has read padding.

    Examples:
        >>> mask = torch.arange(5) >= torch.tensor([5, 3])[:, None]
        >>> x = poison(torch.randn(2, 5, 16), mask)
        >>> bool(varlen_mha(x, mask, num_heads=2).isnan().any())  # padding is not read
        False
    """
    mask = key_padding_mask.bool().view(*key_padding_mask.shape, *[1] * (x.dim() - 2))  # additive masks too: 0 is a token
    return x.masked_fill(mask, value)
