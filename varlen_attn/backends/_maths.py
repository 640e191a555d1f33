"""Exact eager attention on dense blocks, for what the fused kernels have no argument for.

Not the specification (that is `reference`, which shares nothing with this file and is tested against it).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import Semantics
from .base import Extras, ScoreBias, repeat_kv, wide_dtype


def needs_maths(semantics: Semantics, device_type: str = "cpu") -> bool:
    """Whether a call has an option that the device's dense kernel does not take. That of a GPU takes dropout, but not of everything."""
    dropped = semantics.dropout_p if device_type != "cuda" else semantics.dropout_p == 1.0
    return bool(semantics.softcap or dropped or semantics.sinks or semantics.score_bias)


def visible_mask(semantics: Semantics, rows: Tensor, columns: Tensor, offset: int | Tensor) -> Tensor | None:
    """True where query position ``rows`` sees key position ``columns``; None if all is visible. Shapes broadcast."""
    low, high = semantics.visible_range(0)
    shift = 0 if semantics.causal == "top_left" else offset  # visible_range is linear in the offset
    distance = columns - rows - shift
    visible = None if low is None else distance >= low
    if high is not None:
        visible = distance <= high if visible is None else visible & (distance <= high)
    return visible


def alibi_bias(slopes_N: Tensor, rows: Tensor, columns: Tensor, offset: int | Tensor) -> Tensor:
    """``(..., N, Lq, Lk)``: ``-slope * |i + Lk - Lq - j|``; rows ``(Lq, 1)``, columns ``(Lk,)``, offset int or ``(Q,1,1,1)``."""
    return -slopes_N[:, None, None] * (rows + offset - columns).abs()


def score_bias_block(bias: ScoreBias, num_heads: int, len_q: int, len_k: int, device: torch.device) -> Tensor:
    """``(N, Lq, Lk)`` of a score bias given as a tensor ``(N, Sq, Sk)`` or as a callable on positions."""
    if isinstance(bias, Tensor):
        return bias[:, :len_q, :len_k]
    head = torch.arange(num_heads, device=device)[:, None, None]
    rows = torch.arange(len_q, device=device)[None, :, None]
    columns = torch.arange(len_k, device=device)[None, None, :]
    return bias(head, rows, columns)


def score_bias_at(bias: ScoreBias, num_heads: int, rows: Tensor, columns: Tensor) -> Tensor:
    """``(B, N, Lq, Lk)`` of a score bias at positions ``(B,1,Lq,1)`` and ``(B,1,1,Lk)``; -1, before the first token, counts as 0."""
    head = torch.arange(num_heads, device=rows.device)[:, None, None]
    rows, columns = rows.clamp(min=0), columns.clamp(min=0)
    return bias[head, rows, columns] if isinstance(bias, Tensor) else bias(head, rows, columns)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    semantics: Semantics,
    extras: Extras,
    *,
    offset: int | Tensor = 0,
    key_real: Tensor | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``query (B,N,Lq,H)``, ``key (B,K,Lk,H)``, ``value (B,K,Lk,Hv)`` -> ``out (B,N,Lq,Hv)``, ``lse (B,N,Lq)``, detached, if it is
    asked for.

    ``offset`` is ``Lk - Lq`` of the true lengths, an int or ``(B,1,1,1)``; ``key_real (B,1,1,Lk)`` marks keys that exist. ``positions``,
    ``(B,1,Lq,1)`` and ``(B,1,1,Lk)``, are where queries and keys stand in their sequences, if not in their columns.
    Half precision is computed in float32.
    """
    dtype = query.dtype
    wide = wide_dtype(dtype)
    num_heads, len_q, len_k = int(query.shape[1]), query.shape[2], key.shape[2]
    query, key, value = query.to(wide), *repeat_kv(num_heads, key.to(wide), value.to(wide))
    rows, columns = positions or (torch.arange(len_q, device=query.device)[:, None], torch.arange(len_k, device=query.device))

    scores = (query * semantics.factor) @ key.transpose(-1, -2)
    if semantics.softcap is not None:
        scores = semantics.softcap * torch.tanh(scores / semantics.softcap)
    if extras.alibi_slopes is not None:
        scores = scores + alibi_bias(extras.alibi_slopes, rows, columns, offset)
    if extras.score_bias is not None:
        if positions is None:
            bias = score_bias_block(extras.score_bias, num_heads, len_q, len_k, query.device)
        else:
            bias = score_bias_at(extras.score_bias, num_heads, rows, columns)
        scores = scores + bias.to(wide)
    visible = visible_mask(semantics, rows, columns, offset)
    if key_real is not None:
        visible = key_real if visible is None else visible & key_real
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.detach().logsumexp(-1) if semantics.return_lse or extras.score_bias is not None else None
    if extras.score_bias is not None and lse is not None:  # which may be -inf itself
        blind: Tensor | None = torch.isneginf(lse)[..., None]
    else:
        unsure = key_real is not None or _may_be_blind(semantics, offset, len_q, len_k)
        blind = ~visible.any(-1, keepdim=True) if visible is not None and unsure else None
    weights = safe_softmax(scores, blind, extras.sinks)
    out = F.dropout(weights, semantics.dropout_p) @ value
    return out.to(dtype), lse


def _may_be_blind(semantics: Semantics, offset: int | Tensor, len_q: int, len_k: int) -> bool:
    """Whether a query may see no key: what the host knows saves passes over the scores."""
    if isinstance(offset, Tensor):
        return True
    low, high = semantics.visible_range(offset)
    return (high is not None and high < 0) or (low is not None and len_q + low > len_k)


def safe_softmax(scores: Tensor, blind: Tensor | None, sinks_N: Tensor | None = None) -> Tensor:
    """Softmax in which a ``blind`` row, which is -inf throughout, is 0, with gradient 0 (a plain one gives NaN for both)."""
    if blind is not None:
        scores = scores.masked_fill(blind, 0.0)
    if sinks_N is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks_N.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return weights if blind is None else weights.masked_fill(blind, 0.0)
