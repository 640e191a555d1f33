"""One small batch, forward and backward, for each backend in a process of its own: whoever crashes here is left out of later stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from varlen_attn import BACKENDS, BackendRefused, SeqLayout
from varlen_attn.testing import assert_within_budget, reference_attention

from ..measure import Absent
from .cases import attend, leaves_of
from .findings import Findings, Setting, Stage, one_line
from .processes import APART

__all__ = ["of_backend", "parts", "run"]

LENGTHS = (37, 0, 5, 128, 64)
SECONDS = 20.0


def parts(setting: Setting) -> tuple[Stage, ...]:
    names = [b.name for b in BACKENDS if setting.device in b.capabilities.devices and b.name not in ("reference", *APART)]
    return tuple(Stage(name, "", partial(of_backend, name), SECONDS) for name in names)


def of_backend(name: str, setting: Setting, findings: Findings) -> None:
    """Raise AssertionError unless output and gradients are as near to float64 as plain attention is."""
    layout = SeqLayout.from_lengths(LENGTHS, device=setting.device)
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(layout.num_rows, 4, 64, generator=generator).to(setting.device, setting.dtype) for _ in range(4)]
    causal = name != "nested"  # it has no causal attention
    try:
        found = _results(qkv, lambda leaves: attend(leaves, layout, name, causal=causal))
    except BackendRefused as refusal:
        raise Absent(one_line(refusal, 1000)) from None
    exact, plain = (
        _results([x.to(dtype) for x in qkv], partial(_reference, layout, dtype, causal)) for dtype in (torch.float64, setting.dtype)
    )
    errors = [float((x.double() - y).abs().max() / y.abs().max()) for x, y in zip(found, exact, strict=True)]
    findings.facts["relative errors of out, dq, dk, dv"] = [f"{error:.1e}" for error in errors]
    for what, got, wide, naive in zip(("output", "dq", "dk", "dv"), found, exact, plain, strict=True):
        assert_within_budget(got, wide, naive, gradient=True, what=what)
    findings.check(name, True, f"relative error of the output {errors[0]:.1e}")


def _reference(layout: SeqLayout, dtype: torch.dtype, causal: bool, leaves: Sequence[Tensor]) -> Tensor:
    query, key, value = leaves
    out: Tensor = reference_attention(query, key, value, layout, dtype=dtype, causal=causal)
    return out


def _results(tensors: list[Tensor], attention: Callable[[Sequence[Tensor]], Tensor]) -> tuple[Tensor, ...]:
    leaves = leaves_of(tensors[:3])
    out = attention(leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, tensors[3]))


def run(setting: Setting, findings: Findings) -> None:
    """All of them in this process."""
    for part in parts(setting):
        with findings.trying(part.name):
            part.run(setting, findings)
