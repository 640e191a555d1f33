"""Rotary position embeddings of packed or padded rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ArgumentError, DtypeError
from ..layout.checks import check_at_least, describe


def apply_rotary(
    x: Tensor,
    positions: Tensor,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Rotary position embeddings (RoFormer, arXiv:2104.09864) of queries or keys: the same shape and dtype, differentiable.

    Pair ``i`` of the features of a token at position ``p`` is turned by ``p * base ** (-2*i / rotary_dim)``, so that scores depend on
    differences of positions only. Which positions, for packed rows:

    - ``layout.positions`` restart at 0 with each sequence: what a model with position ids per token uses (cumulative sums of the
      mask), and what each sample alone would get.
    - ``layout.columns`` are the columns of the padded row: what a padded model without position ids uses, ``arange(S)``.

    With padding on the right they are equal. With padding on the left they differ by a constant in each sequence, which changes queries
    and keys but no score between them (in exact arithmetic). With padding between tokens the difference varies within
    a sequence, and scores differ too: take what the model was trained with. Never number the packed rows themselves (``arange(T)``)
    where keys are kept for later.

    Args:
        x: ``(..., N, H)``: packed ``(T, N, H)`` or padded ``(B, S, N, H)``; the heads are the last dimension but one.
        positions: of an integer dtype: ``(T,)``, ``(S,)`` or ``(B, S)`` (``(1, S)`` too), the dimensions of ``x`` before the heads,
            leading ones may be left out.
        base: the longest wavelength is about ``2 * pi * base``.
        rotary_dim: only the first so many features are turned, the others stay; all H if left out.
        interleaved: pairs are neighbours ``(0, 1), (2, 3), ...`` (RoFormer, GPT-J), not ``(0, R/2), (1, R/2 + 1), ...`` (GPT-NeoX, Llama).

    Computed in float32 (float64 for a float64 ``x``), whatever the dtype of ``x``. In plain PyTorch, for the default pairs::

        angle = positions[..., None, None] / base ** (torch.arange(0, H, 2) / H)      # (T, 1, H/2)
        a, b = x.float().chunk(2, -1)
        torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).to(x.dtype)

    Raises:
        ArgumentError: an odd or too large ``rotary_dim``, a ``base`` that is not above 0, or shapes or devices that do not fit.
        DtypeError: ``x`` is not floating-point, or ``positions`` are not integers.

    Examples:
        >>> layout = SeqLayout.from_lengths([5, 3])
        >>> apply_rotary(torch.randn(8, 2, 16), layout.positions).shape
        torch.Size([8, 2, 16])
    """
    width = _check_rotary(x, positions, base, rotary_dim)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    frequency_R = 1.0 / base ** (torch.arange(0, width, 2, device=x.device).to(dtype) / width)
    angle = positions.to(dtype)[..., None, None] * frequency_R  # the same for all heads
    cos, sin = angle.cos(), angle.sin()
    turned = x[..., :width].to(dtype)
    a, b = turned.unflatten(-1, (width // 2, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    pair = a * cos - b * sin, b * cos + a * sin
    turned = (torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)


def _check_rotary(x: Tensor, positions: Tensor, base: float, rotary_dim: int | None) -> int:
    """How many features are turned."""
    if not x.is_floating_point():
        raise DtypeError(f"`x` must be floating-point, but is {x.dtype}: convert it with x.float().")
    if not isinstance(positions, Tensor) or positions.dtype == torch.bool or positions.is_floating_point() or positions.is_complex():
        raise DtypeError(
            f"`positions` must be a tensor of integers, but is {describe(positions)}: pass layout.positions, layout.columns or "
            "torch.arange(S); other wavelengths are a matter of `base`."
        )
    _check_positions(x, positions)
    if isinstance(base, bool) or not isinstance(base, int | float) or not 0 < base < math.inf:
        raise ArgumentError(f"`base` must be a number above 0, but is {base!r}: 10000.0 is what most models use.")
    fix = f"an even number up to H = {x.shape[-1]} turns the first so many features"
    width = check_at_least(2, x.shape[-1] if rotary_dim is None else rotary_dim, "rotary_dim", fix)
    if width % 2 or width > x.shape[-1]:
        raise ArgumentError(f"`rotary_dim` must be even and at most H = {x.shape[-1]}, but is {width}: {fix}.")
    return width


def _check_positions(x: Tensor, positions: Tensor) -> None:
    names = (
        f"`positions` must have the dimensions of `x` before (N, H), but have shape {tuple(positions.shape)} where `x` has {tuple(x.shape)}"
    )
    if not 1 <= positions.dim() <= x.dim() - 2:
        raise ArgumentError(f"{names}: `x` is (T, N, H) with positions (T,), or (B, S, N, H) with (S,) or (B, S).")
    if torch.compiler.is_compiling():  # sizes that are data cannot be compared while tracing, but asserted at run time
        torch._check(positions.shape[-1] == x.shape[-3])
        return
    leading = x.shape[-2 - positions.dim() : -2]
    if positions.shape[-1] != leading[-1] or any(have not in (1, need) for have, need in zip(positions.shape, leading, strict=True)):
        raise ArgumentError(
            f"{names}: {positions.shape[-1]} positions for {leading[-1]} tokens. Take them from the layout of this tensor; for heads "
            "before time, pass x.transpose(1, 2)."
        )
    if x.device != positions.device:
        raise ArgumentError(
            f"`positions` are on {positions.device}, but `x` is on {x.device}: call layout.to({str(x.device)!r}) once per batch."
        )
