"""Packing as two gathers, one for each direction, each the other's backward.

A gather needs no atomic add (the backward of a plain ``index_select`` does), so it is deterministic, and it never reads a padding
slot: NaN there can not leak.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad


def is_tracing(*tensors: Tensor) -> bool:
    """Whether values must not be read: under `torch.compile`, `torch.export` or `torch.jit.trace`, or on fake tensors."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    return any(isinstance(t, FakeTensor) for t in tensors)


def trace_quietly() -> None:
    """Under `torch.jit.trace` sizes are tensors, and each check of a shape would warn that it is no part of the graph. torch ignores such
    warnings of its own files likewise, and for the whole process."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"(varlen_attn|einops)\b")  # type: ignore[attr-defined]


def mark_unbacked(tensor: Tensor) -> None:
    """Tell `torch.compile` that the number of packed rows is data: one graph for all of 0, 1, 2, ...

    Only where dynamo is loaded already: its import costs 0.8 s and nobody compiles without it.
    """
    if "torch._dynamo" in sys.modules and not is_tracing(tensor):
        from torch._dynamo.decorators import mark_unbacked

        mark_unbacked(tensor, 0)


class Pack(torch.autograd.Function):
    """Rows of the padded tensor, in packed order. ``valid_T`` is None unless there are slack rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_indices: Tensor, gather_indices: Tensor, valid_T: Tensor | None) -> Tensor:
        ctx.save_for_backward(token_indices, gather_indices, valid_T)
        return gather_rows(x, token_indices, valid_T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return Unpack.apply(grad, *ctx.saved_tensors, 0), None, None, None


class Unpack(torch.autograd.Function):
    """Rows of the packed tensor at their places in the padded one, ``pad_value`` elsewhere."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        token_indices: Tensor,
        gather_indices: Tensor,
        valid_T: Tensor | None,
        pad_value: float,
    ) -> Tensor:
        ctx.save_for_backward(token_indices, gather_indices, valid_T)
        return scatter_rows(x, gather_indices, pad_value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return Pack.apply(grad, *ctx.saved_tensors), None, None, None, None


def gather_rows(x: Tensor, token_indices: Tensor, valid_T: Tensor | None) -> Tensor:
    if valid_T is None:
        return x.index_select(0, token_indices)
    if x.shape[0] == 0:
        return x.new_zeros((token_indices.shape[0], *x.shape[1:]))
    rows = x.index_select(0, token_indices)
    return torch.where(valid_T.view(-1, *[1] * (x.dim() - 1)), rows, rows.new_zeros(()))


def scatter_rows(x: Tensor, gather_indices: Tensor, pad_value: float) -> Tensor:
    # The padding row stands first, so that its index (0) does not depend on T, which is data.
    padding_row = x.new_full((1, *x.shape[1:]), pad_value)
    return torch.cat([padding_row, x]).index_select(0, gather_indices)


def needs_plain_gathers() -> bool:
    """Where our two functions would be in the way: under `torch.func`, and under `torch.jit.trace`, which could not save them."""
    return is_transformed() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def is_transformed() -> bool:
    """Under `torch.func` or forward-mode AD, for which plain indexing has all rules and our two functions have none."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
