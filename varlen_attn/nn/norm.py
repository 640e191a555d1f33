"""Norms over the time of each sequence, on packed rows."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError, LayoutError
from ..layout.seq_layout import SeqLayout


def varlen_norm(norm: nn.Module, rows: Tensor, layout: SeqLayout) -> Tensor:
    """A norm over time: packed rows in, packed rows out; padding is counted nowhere.

    `nn.GroupNorm` and `nn.InstanceNorm1d` take the mean and variance of each sequence, as on that sample alone, `nn.BatchNorm1d` those of
    all real rows. Running statistics are updated as torch updates them: those of an instance norm with the mean over the sequences that
    have rows. torch refuses a sample of one frame in an instance norm; here its variance is 0, as of a group norm.

    Args:
        norm: an `nn.GroupNorm`, `nn.InstanceNorm1d` or `nn.BatchNorm1d`, with its weights. The first two are not called, so their hooks
            do not run.
        rows: ``(T, C)``.
        layout: of the rows.

    The equivalent for one sample in plain PyTorch::

        norm(x_LC.T[None])[0].T

    Raises:
        ArgumentError: ``norm`` is another module. Norms over the features of each token, such as `nn.LayerNorm`, take rows as they are.
        LayoutError: ``rows`` are not ``(T, C)``, or a batch norm would count slack rows.

    Examples:
        >>> norm, layout = nn.GroupNorm(4, 16), SeqLayout.from_lengths([5, 3])
        >>> varlen_norm(norm, torch.randn(8, 16), layout).shape
        torch.Size([8, 16])
    """
    kind, made = type(norm), cast(Any, norm)
    if kind not in (nn.GroupNorm, nn.InstanceNorm1d, nn.BatchNorm1d):
        raise ArgumentError(
            f"`norm` must be an nn.GroupNorm, nn.InstanceNorm1d or nn.BatchNorm1d, but is a {kind.__name__}: call a norm over the features "
            "of each token on rows as they are, and any other on each sample of layout.split(rows)."
        )
    channels = made.num_channels if kind is nn.GroupNorm else made.num_features
    if rows.dim() != 2:
        raise LayoutError(f"`rows` must be (T, C), but have shape {tuple(rows.shape)}: for a padded (B, S, C) call layout.pack(x) first.")
    layout._check(rows, (layout.num_rows, channels), "rows")
    valid_T1 = layout.valid_rows()[:, None] if layout.has_slack else None
    rows = rows if valid_T1 is None else torch.where(valid_T1, rows, 0)
    given = kind is not nn.GroupNorm and made.running_mean is not None and not norm.training
    if kind is nn.BatchNorm1d:
        if not given and (valid_T1 is not None or layout.ranks):
            has = "slack rows: build it without `capacity`" if valid_T1 is not None else "rows of one rank: call eval()"
            raise LayoutError(f"`layout` must be exact for the statistics of a batch norm, but has {has}.")
        out = norm(rows)
    elif given:
        out = norm(rows.T[None])[0].T
    else:
        out = _over_time(made, rows, layout, made.num_groups if kind is nn.GroupNorm else channels)
    return cast(Tensor, out) if valid_T1 is None else torch.where(valid_T1, out, 0)


def _over_time(norm: Any, rows: Tensor, layout: SeqLayout, groups: int) -> Tensor:
    own_T = layout.seq_ids
    of_rows = lambda x_QG: F.pad(x_QG, (0, 0, 0, 1)).index_select(0, own_T)[..., None]  # noqa: E731 (one more, for slack rows)
    wide = (rows.float() if rows.element_size() < 4 else rows).unflatten(1, (groups, -1))
    mean_QG = layout.pool(wide.mean(2), "mean")
    centred = wide - of_rows(mean_QG)
    var_QG = layout.pool(centred.square().mean(2), "mean")
    out: Tensor = (centred * of_rows((var_QG + norm.eps).rsqrt())).flatten(1)
    if getattr(norm, "running_mean", None) is not None:
        lengths_Q1 = layout.cu_seqlens.diff()[:, None]
        count = (lengths_Q1 > 0).sum()
        unbiased = var_QG * lengths_Q1 / (lengths_Q1 - 1).clamp(min=1)
        for running, new in ((norm.running_mean, mean_QG), (norm.running_var, unbiased)):
            mean = new.detach().sum(0) / count.clamp(min=1)
            running.lerp_(mean.to(running.dtype), (norm.momentum or 0.0) * (count > 0).to(running.dtype))
    out = out if norm.weight is None else out * norm.weight
    return (out if norm.bias is None else out + norm.bias).to(rows.dtype)
