"""What models do around attention, on the same layout: rotary embeddings, convolutions over time, batch norm.

Attention that honours the padding is of little use between layers that do not. Three of them, for packed rows:

- **Rotary embeddings**: `apply_rotary` with ``layout.positions`` or ``layout.columns``; which of the two, its docstring says.
- **Convolutions over time** see their neighbours, so packed rows would mix samples, and a padded batch would mix padding into the last
  frames of a sample. `varlen_conv1d` pads with zeros for the length of the call.
- **Batch norm** needs nothing from here: ``nn.BatchNorm1d(C)`` on packed rows ``(T, C)`` takes its statistics over real tokens only,
  where a padded ``(B, C, S)`` counts padding as well::

      rows = norm(rows)                    # nn.BatchNorm1d: mean and variance over T rows, that is x_BSC[~key_padding_mask]

  One limit: slack rows (a layout with ``capacity=``) are zeros and would be counted. Pack exactly where statistics are taken; in
  evaluation they are not, and slack rows do no harm. Norms over the features of each token (layer norm, RMS norm) take rows as they are.
  Norms over the time of each sample (group norm, instance norm) do not: on rows they would normalise each token by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._index import Step
from ._layout_checks import check_at_least, describe
from .errors import ArgumentError, DtypeError, LayoutError
from .layout import SeqLayout

__all__ = ["apply_rotary", "varlen_conv1d"]


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
    and keys but no score between them (in exact arithmetic). With padding between tokens they differ for real, and scores do too:
    take what the model was trained with. Never number the packed rows themselves (``arange(T)``) where keys are kept for later.

    Args:
        x: ``(..., N, H)``: packed ``(T, N, H)`` or padded ``(B, S, N, H)``; heads stand next to last.
        positions: of an integer dtype: ``(T,)``, ``(S,)`` or ``(B, S)`` (``(1, S)`` too), the dimensions of ``x`` before the heads,
            leading ones left out as one likes.
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


def varlen_conv1d(conv: Callable[[Tensor], Tensor], rows: Tensor, layout: SeqLayout) -> tuple[Tensor, SeqLayout]:
    """A convolution over the time of each sequence: packed rows in, packed rows and the layout of their frames out.

    The convolution sees zeros at padding, as each sample alone would at its ends, so a sample's frames never depend on padding
    or on batch-mates. Between two convolutions the zeros have to be restored, because a bias fills them: call this once for each.

    A convolution that keeps lengths (stride 1, ``padding="same"`` or the number that amounts to it) takes any layout and returns the
    same object. Documents of one row are convolved apart. Where a row has padding between tokens, zeros stand in the hole; what
    closes it is ``layout.compact()``, which has the same packed rows. Any other convolution needs padding on the right, and returns
    ``layout.downsample(...)``.

    Args:
        conv: an `nn.Conv1d`, or a module like it: called with ``(B, C_in, S)``, with its attributes ``kernel_size``, ``stride``,
            ``padding`` and ``dilation``. Called by ``__call__``, so hooks and parametrisations work.
        rows: ``(T, C_in)``.
        layout: of the rows.

    The equivalent in plain PyTorch, without the packing of the result::

        conv(x_BSC.masked_fill(key_padding_mask[..., None], 0).transpose(1, 2)).transpose(1, 2)

    Returns:
        ``(T', C_out)`` and its layout.

    Raises:
        ArgumentError: ``conv`` has no such attributes, is a pool that would read the zeros, or has another ``padding_mode`` than "zeros",
            which would read the padded row's ends.
        LayoutError: ``rows`` are not ``(T, C_in)``, the padding stands elsewhere than above, or ``conv`` makes another number of frames
            than its attributes say.
    """
    step = _step(conv)
    if rows.dim() != 2:
        raise LayoutError(
            f"`rows` must be (T, C_in), but have shape {tuple(rows.shape)}: for a padded (B, S, C_in) call layout.pack(x) first."
        )
    if step.stride == step.reach == 1:
        before = after = layout if layout.row_ids is None else layout.compact()
        result = layout
    else:
        before, after = layout, layout.downsample(*step)
        result = after
    x_BSC = before.unpack(rows)
    # torch refuses to convolve less than one frame: zeros make one, which is not taken over.
    short = max(step.reach, 1) - before.padded_len
    x_BSC = F.pad(x_BSC, (0, 0, 0, short)) if short > 0 else x_BSC
    made_BCS = conv(x_BSC.transpose(1, 2))
    columns, expected, made = x_BSC.shape[1], step.frames(x_BSC.shape[1]), made_BCS.shape[-1]
    if made != expected:
        raise LayoutError(
            f"`conv` must make {expected} frames of {columns} columns by its kernel_size, stride, padding and dilation, but made {made}: "
            "pass a module that only convolves, and apply what crops or pads apart from it."
        )
    return after.pack(made_BCS.transpose(1, 2)[:, : after.padded_len]), result


def _step(conv: Any) -> Step:
    if hasattr(conv, "return_indices") or getattr(conv, "ceil_mode", False):
        raise ArgumentError(
            f"`conv` must be a convolution, but is {type(conv).__name__}: the largest value of a window reads the zeros at padding, and "
            "ceil_mode makes frames of them. Pool each sample of layout.split(rows) alone."
        )
    mode = getattr(conv, "padding_mode", "zeros")
    if mode != "zeros":
        raise ArgumentError(
            f"`conv.padding_mode` must be 'zeros', but is {mode!r}: it would fill a sample's end with what stands at the end of the padded "
            "row, not of the sample. Pad each sample before packing, or use zeros."
        )
    padding = getattr(conv, "padding", 0)
    if padding == "same":
        return Step(1, 1, 0, 1)  # as many frames as tokens, which is all that is asked here; with an even kernel no number says it
    return Step(
        _one(conv, "kernel_size", 1),
        _one(conv, "stride", 1),
        0 if padding == "valid" else _one(conv, "padding", 0),
        _one(conv, "dilation", 1),
    )


def _one(conv: Any, name: str, least: int) -> int:
    """An attribute of a convolution of one dimension: a number, or a tuple of one."""
    value = getattr(conv, name, None)
    value = value[0] if isinstance(value, tuple | list) and len(value) == 1 else value
    return check_at_least(least, value, f"conv.{name}", "pass an nn.Conv1d or a module with its attributes")


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
    if torch.compiler.is_compiling():  # sizes that are data can not be compared while tracing, but asserted at run time
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
