"""What models do around attention, on the same layout: rotary embeddings, convolutions over time, batch norm.

Attention that honours the padding is of little use between layers that do not. Three of them, for packed rows:

- **Rotary embeddings**: `apply_rotary` with ``layout.positions`` or ``layout.columns``; which of the two, its docstring says.
- **Convolutions over time** see their neighbours, so packed rows would mix samples, and a padded batch would mix padding into the last
  frames of a sample. `varlen_conv1d` puts as many zeros between two samples as the convolution sees beyond the end of one.
- **Batch norm** needs nothing from here: ``nn.BatchNorm1d(C)`` on packed rows ``(T, C)`` takes its statistics over real tokens only,
  where a padded ``(B, C, S)`` counts padding as well::

      rows = norm(rows)                    # nn.BatchNorm1d: mean and variance over T rows, that is x_BSC[~key_padding_mask]

  One limit: slack rows (a layout with ``capacity=``) are zeros and would be counted. Pack exactly where statistics are taken; in
  evaluation they are not, and slack rows do no harm. Norms over the features of each token (layer norm, RMS norm) take rows as they are.
  Norms over the time of each sample (group norm, instance norm) do not: `varlen_norm` is for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch import is_plain, is_tracing
from ..errors import ArgumentError, LayoutError
from ..kernels.kept import kept
from ..layout.build import Step
from ..layout.checks import check_at_least
from ..layout.seq_layout import SeqLayout
from .token_wise import has_hooks


def varlen_conv1d(conv: Callable[[Tensor], Tensor], rows: Tensor, layout: SeqLayout) -> tuple[Tensor, SeqLayout]:
    """A convolution over the time of each sequence: packed rows in, packed rows and the layout of their frames out.

    Each sample sees zeros beyond its ends, as it would alone, so its frames never depend on padding or on batch-mates. The samples are
    convolved as one long row with zeros between them, or padded where that is shorter; on a CPU a kernel of size 1 is a product on rows.
    Between two convolutions the zeros have to be restored, because a bias fills them: call this once for each.

    A convolution that keeps lengths (stride 1, ``padding="same"`` or the number that amounts to it) takes any layout and returns the
    same object. Documents of one row are convolved separately. Where a row has padding between tokens, zeros are convolved there;
    ``layout.compact()`` has the same packed rows without that padding. Any other convolution needs padding on the right, and returns
    ``layout.downsample(...)``.

    Args:
        conv: an `nn.Conv1d`, or a module like it: called with ``(B, C_in, S)``, of which B may be 1, with its attributes ``kernel_size``,
            ``stride``, ``padding`` and ``dilation``. Called by ``__call__`` where hooks, parametrisations or a subclass would notice.
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
    step, gap = _step(conv)
    if rows.dim() != 2:
        raise LayoutError(
            f"`rows` must be (T, C_in), but have shape {tuple(rows.shape)}: for a padded (B, S, C_in) call layout.pack(x) first."
        )
    keeps = step.stride == step.reach == 1
    result = layout if keeps else layout.downsample(*step)
    untouched = type(conv) is nn.Conv1d and not has_hooks(conv) and "forward" not in vars(conv)
    plain = untouched and rows.is_cpu and is_plain(rows) and is_plain(cast(Any, conv).weight)
    if plain and keeps and not layout.has_slack and conv.weight.shape[2] == conv.groups == 1:  # type: ignore[attr-defined]
        layout._check(rows, (layout.num_rows,), "x")
        return F.linear(rows, conv.weight[..., 0], conv.bias), layout  # type: ignore[attr-defined]
    before, after = kept(layout, layout, ("convolved", step, gap), lambda: _convolved(layout, result, step, gap)) or (layout, result)
    x_BSC = before.unpack(rows)
    # torch refuses to convolve less than one frame: zeros make one, which is not taken over.
    short = max(step.reach, 1) - before.padded_len
    x_BSC = F.pad(x_BSC, (0, 0, 0, short)) if short > 0 else x_BSC
    x_BCS = x_BSC.transpose(1, 2)
    made_BCS = _channels_last(conv, x_BCS) if plain else conv(x_BCS)
    columns, expected, made = x_BSC.shape[1], step.frames(x_BSC.shape[1]), made_BCS.shape[-1]
    if made != expected:
        raise LayoutError(
            f"`conv` must make {expected} frames of {columns} columns by its kernel_size, stride, padding and dilation, but made {made}: "
            "pass a module that only convolves, and apply what crops or pads apart from it."
        )
    return after.pack(made_BCS.transpose(1, 2)[:, : after.padded_len]), result


def _convolved(layout: SeqLayout, frames: SeqLayout, step: Step, gap: int) -> tuple[SeqLayout, SeqLayout] | None:
    """The layouts of what is convolved and of what that gives: one long row of all sequences, with ``gap`` zeros between two of them, where
    that is shorter than the padded batch. None: the layouts as they are.
    """
    size = layout.num_rows + layout.num_seqs * (gap + step.stride - 1)
    if layout.has_holes is not False or is_tracing(layout.cu_seqlens) or size >= layout.num_seqs * layout.max_seqlen:
        if layout.row_ids is None:
            return None
        compact = layout.compact()
        return compact, compact
    # Every sequence begins where a frame does.
    spans_Q = (layout.cu_seqlens.to(torch.int64).diff() + gap + step.stride - 1) // step.stride
    starts_Q = spans_Q.cumsum(0) - spans_Q
    before = _in_one_row(layout, starts_Q * step.stride, size)
    return before, before if frames is layout else _in_one_row(frames, starts_Q, step.frames(size))


def _in_one_row(layout: SeqLayout, starts_Q: Tensor, size: int) -> SeqLayout:
    """The same packed rows, as documents of one padded row of ``size`` columns."""
    rows_T = torch.arange(layout.num_rows, device=layout.device)
    valid_T = layout.valid_rows()
    slots_T = torch.where(valid_T, F.pad(starts_Q, (0, 1)).index_select(0, layout.seq_ids) + layout.positions, size)
    gather_S = rows_T.new_zeros(size + 1).index_copy_(0, slots_T, rows_T + 1)[:size]
    return layout._with(
        batch_size=1,
        padded_len=size,
        max_seqlen=min(size, layout.max_seqlen),
        token_indices=torch.where(valid_T, slots_T, 0),
        gather_indices=gather_S,
        right_padded=False,
        row_ids=torch.zeros_like(starts_Q),
    )


def _channels_last(conv: Any, x_BCS: Tensor) -> Tensor:
    """``conv(x_BCS)`` of an `nn.Conv1d`. torch lays rows out anew for a convolution over one dimension, and not for one over two."""
    by_onednn = torch.backends.mkldnn.is_available() and x_BCS.dtype != torch.float64
    several = 1 == conv.weight.shape[1] < conv.groups < conv.out_channels  # oneDNN in bfloat16 reads columns beyond a window, times 0
    if isinstance(conv.padding, str) or not by_onednn or torch.is_autocast_enabled("cpu") or several:
        return cast(Tensor, conv(x_BCS))
    options = ((1, *conv.stride), (0, *conv.padding), (1, *conv.dilation), conv.groups)
    if conv.groups == 1:
        return F.conv2d(x_BCS.unsqueeze(2), conv.weight.unsqueeze(2), conv.bias, *options).squeeze(2)
    return cast(Tensor, _Grouped.apply(x_BCS, conv.weight, conv.bias, *options))


class _Grouped(torch.autograd.Function):
    """A convolution over two dimensions, the first of size 1, whose weights get their gradient faster from one over one dimension."""

    @staticmethod
    def forward(ctx: Any, x_BCS: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(x_BCS, weight)
        ctx.options = options
        return F.conv2d(x_BCS.unsqueeze(2), weight.unsqueeze(2), bias, *options).squeeze(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (*steps, groups), wanted = ctx.saved_tensors, ctx.options, ctx.needs_input_grad
        wide, narrow = (grad.unsqueeze(2), x.unsqueeze(2), weight.unsqueeze(2)), (grad.contiguous(), x.contiguous(), weight)
        backward, one_less, dx, dw = torch.ops.aten.convolution_backward, [s[1:] for s in steps], None, None
        if wanted[0]:
            dx = backward(*wide, None, *steps, False, [0, 0], groups, [True, False, False])[0].squeeze(2)
        if wanted[1]:
            dw = backward(*narrow, None, *one_less, False, [0], groups, [False, True, False])[1]
        return dx, dw, grad.sum((0, 2)) if wanted[2] else None, *[None] * 4


def _step(conv: Any) -> tuple[Step, int]:
    """And how many zeros must be between two sequences."""
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
    kernel, dilation = _one(conv, "kernel_size", 1), _one(conv, "dilation", 1)
    if padding == "same":  # as many frames as tokens, which is all that is asked here; with an even kernel no number says it
        return Step(1, 1, 0, 1), -(-dilation * (kernel - 1) // 2)
    step = Step(kernel, _one(conv, "stride", 1), 0 if padding == "valid" else _one(conv, "padding", 0), dilation)
    return step, max(step.padding, 1 - step.reach)  # padding wider than the kernel gives frames of zeros alone


def _one(conv: Any, name: str, least: int) -> int:
    """An attribute of a convolution of one dimension: a number, or a tuple of one."""
    value = getattr(conv, name, None)
    value = value[0] if isinstance(value, tuple | list) and len(value) == 1 else value
    return check_at_least(least, value, f"conv.{name}", "pass an nn.Conv1d or a module with its attributes")
