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

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError, LayoutError
from ..layout.build import Step
from ..layout.checks import check_at_least
from ..layout.seq_layout import SeqLayout


def varlen_conv1d(conv: Callable[[Tensor], Tensor], rows: Tensor, layout: SeqLayout) -> tuple[Tensor, SeqLayout]:
    """A convolution over the time of each sequence: packed rows in, packed rows and the layout of their frames out.

    The convolution sees zeros at padding, as each sample alone would at its ends, so a sample's frames never depend on padding
    or on batch-mates. Between two convolutions the zeros have to be restored, because a bias fills them: call this once for each.

    A convolution that keeps lengths (stride 1, ``padding="same"`` or the number that amounts to it) takes any layout and returns the
    same object. Documents of one row are convolved separately. Where a row has padding between tokens, zeros are convolved there;
    ``layout.compact()`` has the same packed rows without that padding. Any other convolution needs padding on the right, and returns
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
        LayoutError: ``rows`` are not ``(T, C_in)``, the padding is elsewhere than above, or ``conv`` makes another number of frames
            than its attributes say.

    Examples:
        >>> conv, layout = nn.Conv1d(16, 8, 3, stride=2), SeqLayout.from_lengths([5, 3])
        >>> rows, frames = varlen_conv1d(conv, torch.randn(8, 16), layout)
        >>> rows.shape, frames.lengths
        (torch.Size([3, 8]), (2, 1))
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
            f"`conv.padding_mode` must be 'zeros', but is {mode!r}: it would fill a sample's end with what is at the end of the padded "
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
